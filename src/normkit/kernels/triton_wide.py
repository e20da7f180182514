"""Few rows, wider than a tile: each is split over programs, because there are too few to fill a GPU.

A program owns a range of the features of some rows. First pass: it leaves its part of their statistics, or of their
sums, and the gradients of weight and bias from these rows. Second pass: it merges all parts of its rows, and writes;
the programs of the last features start first: those are what the cache still holds. What an element means is said in
``triton_rows``; nothing is atomic here either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton_rows import bit_of, look, read, row_moments, scaled, shifted, write
from normkit.kernels.triton_tile import activated, merge_along, merge_two, packed

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off


@triton.jit
def some_rows(first, rows, BR: tl.constexpr, WIDE: tl.constexpr):
    """Rows [BR, 1], and which of them exist."""
    if WIDE:
        first = first + tl.zeros([1, 1], tl.int64)
    r = first + tl.arange(0, BR)[:, None]
    return r, r < rows


@triton.jit
def measure(
    x, residual, partials, rows, features, per, parts, size, PRE: tl.constexpr, CENTER: tl.constexpr,
    BR: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):
    """First pass: count, mean and m2 of the features of a program, each (rows, parts) of float32."""
    part = tl.program_id(1)
    r, inside = some_rows(tl.program_id(0) * BR, rows, BR, WIDE)
    end = tl.minimum(part * per + per, features)
    count = tl.zeros([BR, 1], tl.float32)
    mean = tl.zeros([BR, 1], tl.float32)
    m2 = tl.zeros([BR, 1], tl.float32)
    for start in range(part * per, end, BF):
        j = start + tl.arange(0, BF)[None, :]
        valid = inside & (j < end)
        v = read(x, residual, r * features + j, valid, PRE, "evict_last")
        more, other, other_m2 = row_moments(v, valid, CENTER)
        count, mean, m2 = merge_two(count, mean, m2, more, other, other_m2)
    here = partials + r * parts + part
    tl.store(here, count, inside)
    tl.store(here + size, mean, inside)
    tl.store(here + 2 * size, m2, inside)


@triton.jit
def normalise(
    x, residual, weight, bias, y, bits, stats, summed, partials, rows, features, per, parts, size, eps, slope, offset,
    PRE: tl.constexpr, CENTER: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr,
    BF: tl.constexpr, WIDE: tl.constexpr,
):
    """Second pass."""
    part = parts - 1 - tl.program_id(1)
    r, inside = some_rows(tl.program_id(0) * BR, rows, BR, WIDE)
    index = tl.arange(0, PARTS)[None, :]
    mask = inside & (index < parts)
    here = partials + r * parts + index
    _, mean, m2 = merge_along(
        tl.load(here, mask, other=0.0), tl.load(here + size, mask, other=0.0),
        tl.load(here + 2 * size, mask, other=0.0),
    )
    rstd = 1.0 / tl.sqrt_rn(m2 / features + eps)
    if part == 0:
        tl.store(stats + r, mean, inside)
        tl.store(stats + rows + r, rstd, inside)
    end = tl.minimum(part * per + per, features)
    for start in range(part * per, end, BF):
        j = start + tl.arange(0, BF)[None, :]
        valid = inside & (j < end)
        offsets = r * features + j
        v = read(x, residual, offsets, valid, PRE, "evict_first")
        z = (v - mean) * rstd * scaled(weight, j, j < end, offset) + shifted(bias, j, j < end)
        if PRE:
            if summed is not None:
                tl.store(summed + offsets, v, valid)
        elif residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if bits is not None:
            byte = bit_of(0, r, j, rows, features, False) + tl.zeros_like(valid.to(tl.int32))
            byte = tl.min(tl.reshape(byte, [BR, BF // 8, 8]), 2)
            whole = tl.max(tl.reshape(valid.to(tl.int32), [BR, BF // 8, 8]), 2) > 0
            tl.store(bits + byte, packed((z > 0) & valid, 1), whole)
        tl.store(y + offsets, activated(z, slope, ACTIVATION), valid, eviction_policy="evict_first")


@triton.jit
def sum_up(
    x, dy, residual, weight, bias, bits, stats, partials, of_weight, of_bias, rows, features, per, parts, size, slope,
    offset, ACTIVATION: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):
    """First pass of backward: the sums of w dz and of w dz hat, (rows, parts) each.

    of_weight and of_bias: (blocks of rows, features) of float32.
    """
    part = tl.program_id(1)
    r, inside = some_rows(tl.program_id(0) * BR, rows, BR, WIDE)
    own = tl.program_id(0).to(tl.int64) * features
    mean = tl.load(stats + r, inside, other=0.0)
    rstd = tl.load(stats + rows + r, inside, other=0.0)
    one = tl.zeros([BR, 1], tl.float32)
    two = tl.zeros([BR, 1], tl.float32)
    end = tl.minimum(part * per + per, features)
    for start in range(part * per, end, BF):
        j = start + tl.arange(0, BF)[None, :]
        hat, dz, w = look(
            x, dy, residual, weight, bias, bits, r * features + j, inside & (j < end), 0, r, j, j, mean, rstd, rows,
            features, slope, offset, ACTIVATION, False, "evict_last",
        )
        one += tl.sum(w * dz, 1, keep_dims=True)
        two += tl.sum(w * dz * hat, 1, keep_dims=True)
        if of_weight is not None:
            tl.store(of_weight + own + j, tl.sum(dz * hat, 0, keep_dims=True), j < end)
        if of_bias is not None:
            tl.store(of_bias + own + j, tl.sum(dz, 0, keep_dims=True), j < end)
    here = partials + r * parts + part
    tl.store(here, one, inside)
    tl.store(here + size, two, inside)


@triton.jit
def differentiate(
    x, dy, residual, weight, bias, bits, stats, partials, dsummed, dx, dresidual, rows, features, per, parts, size,
    slope, offset, CENTER: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr,
    BF: tl.constexpr, WIDE: tl.constexpr,
):
    """Second pass of backward."""
    part = parts - 1 - tl.program_id(1)
    r, inside = some_rows(tl.program_id(0) * BR, rows, BR, WIDE)
    mean = tl.load(stats + r, inside, other=0.0)
    rstd = tl.load(stats + rows + r, inside, other=0.0)
    index = tl.arange(0, PARTS)[None, :]
    mask = inside & (index < parts)
    here = partials + r * parts + index
    one = tl.zeros([BR, 1], tl.float32)
    if CENTER:
        one = tl.sum(tl.load(here, mask, other=0.0), 1, keep_dims=True) / features
    two = tl.sum(tl.load(here + size, mask, other=0.0), 1, keep_dims=True) / features
    end = tl.minimum(part * per + per, features)
    for start in range(part * per, end, BF):
        j = start + tl.arange(0, BF)[None, :]
        valid, offsets = inside & (j < end), r * features + j
        hat, dz, w = look(
            x, dy, residual, weight, bias, bits, offsets, valid, 0, r, j, j, mean, rstd, rows, features, slope, offset,
            ACTIVATION, False, "evict_first",
        )
        write(dx, dresidual, dsummed, offsets, valid, hat, dz, w, rstd, one, two)
