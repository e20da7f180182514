#!/usr/bin/env bash
# Builds the driver with the kernels of one instruction set and runs it. First argument: how many cases.
# -march=native takes the widest registers of this machine; MARCH=x86-64 and the like take others.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=build/sanitize
mkdir -p "$target"
flags=(-std=c++17 -g -O1 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi
       "-march=${MARCH:-native}" -fsanitize=address,undefined -fno-sanitize-recover=all -Isrc/normkit/csrc)
objects=()
for source in src/normkit/csrc/{choose,table,planes,columns,rows,tiles,lstm}.cpp tests/sanitize/driver.cpp; do
    object="$target/$(basename "$source" .cpp).o"
    if [[ ! -e $object || -n $(find src/normkit/csrc tests/sanitize -newer "$object" -name '*.[ch]*') ]]; then
        "${CXX:-g++}" "${flags[@]}" -c "$source" -o "$object"
    fi
    objects+=("$object")
done
"${CXX:-g++}" "${flags[@]}" "${objects[@]}" -o "$target/driver"
exec "$target/driver" "$@"
