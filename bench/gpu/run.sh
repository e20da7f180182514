#!/usr/bin/env bash
# Works through queue.txt on a machine with a GPU: parity first, then every timing that this commit does not have yet.
# Run it where normkit is installed; the argument is the directory of the records.
set -euo pipefail
cd "$(dirname "$0")/../.."
device=${DEVICE:-cuda}
queue=${QUEUE:-bench/gpu/queue.txt}

python - "$device" <<'PYTHON' || exit 2
import sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("error: torch sees no GPU here.\n  run this on a machine with one, with a build of torch for CUDA")
PYTHON

commit=$(git rev-parse --short=12 HEAD)
[ -z "$(git status --porcelain --untracked-files=no)" ] || commit+="-changed"
records=${1:-records/bench/gpu}/$commit

while read -r name arguments; do
  case $name in '' | '#'*) continue ;; esac
  if [ -e "$records/$name/report.html" ]; then
    echo "$name: measured at $commit already"
    continue
  fi
  rm -rf "${records:?}/$name" # what an interrupted run has left
  echo "$name: normkit bench --device $device $arguments"
  status=0
  set -f # the stars are for normkit, not for the shell
  # shellcheck disable=SC2086 # several words
  normkit bench --device "$device" --out "$records/$name" $arguments </dev/null || status=$?
  set +f
  if [ "$status" -ne 0 ]; then
    echo "error: $name ended with status $status (1: parity is red); nothing behind it is timed" >&2
    exit "$status"
  fi
done <"$queue"
