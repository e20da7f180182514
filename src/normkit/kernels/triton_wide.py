"""Few rows, wider than a tile: each is split over programs, because there are too few to fill a GPU.

A program owns a range of the features of some rows. First pass: it leaves its part of their statistics, or of their
sums, and the gradients of weight and bias from these rows. Second pass: it merges all parts of its rows, and writes;
the programs of the last features start first: those are what the cache still holds. What an element means is said in
``triton_rows``; nothing is atomic here either.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton_rows import finish, look, read, write
from normkit.kernels.triton_tile import merge_along

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off


@triton.jit
def some_rows(first, rows, BR: tl.constexpr, WIDE: tl.constexpr):
    """Rows [BR], and which of them exist."""
    if WIDE:
        first = first + tl.full([], 0, tl.int64)
    r = first + tl.arange(0, BR)
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
    count = tl.zeros([BF], tl.float32)
    mean = tl.zeros([BR, BF], tl.float32)
    m2 = tl.zeros([BR, BF], tl.float32)
    for start in range(part * per, end, BF):  # every place of a tile has moments of its own, as in triton_channels
        j = start + tl.arange(0, BF)
        valid = inside[:, None] & (j < end)[None, :]
        v = read(x, residual, (r * features)[:, None] + j[None, :], valid, PRE, "evict_last")
        count += (j < end).to(tl.float32)
        if CENTER:
            off = tl.where(valid, v - mean, 0.0)
            mean += off * (1.0 / tl.maximum(count, 1.0))[None, :]
            m2 += off * (v - mean)
        else:
            m2 += v * v
    count, mean, m2 = merge_along(tl.where(inside[:, None], count[None, :], 0.0), mean, m2)
    here = partials + r * parts + part
    tl.store(here, count, inside)
    tl.store(here + size, mean, inside)
    tl.store(here + 2 * size, m2, inside)


@triton.jit
def normalise(
    x, residual, weight, bias, y, bits, stats, summed, partials, rows, features, per, parts, size, slope, eps, offset,
    PRE: tl.constexpr, CENTER: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr,
    BF: tl.constexpr, WIDE: tl.constexpr,
):
    """Second pass."""
    part = parts - 1 - tl.program_id(1)
    r, inside = some_rows(tl.program_id(0) * BR, rows, BR, WIDE)
    index = tl.arange(0, PARTS)
    mask = inside[:, None] & (index < parts)[None, :]
    here = partials + (r * parts)[:, None] + index[None, :]
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
        j = start + tl.arange(0, BF)
        there = j < end
        offsets, valid = (r * features)[:, None] + j[None, :], inside[:, None] & there[None, :]
        v = read(x, residual, offsets, valid, PRE, "evict_first")
        finish(
            v, residual, weight, bias, y, bits, summed, offsets, valid, 0, r, inside, start, end, j, there, mean, rstd,
            rows, features, slope, offset, PRE, ACTIVATION, False, BR, BF,
        )


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
    one = tl.zeros([BR, BF], tl.float32)
    two = tl.zeros([BR, BF], tl.float32)
    end = tl.minimum(part * per + per, features)
    for start in range(part * per, end, BF):
        j = start + tl.arange(0, BF)
        there = j < end
        offsets, valid = (r * features)[:, None] + j[None, :], inside[:, None] & there[None, :]
        hat, dz, w = look(
            x, dy, residual, weight, bias, bits, offsets, valid, 0, r, inside, start, end, j, there, mean, rstd, rows,
            features, slope, offset, ACTIVATION, False, BR, BF, "evict_last",
        )
        one += w * dz
        two += w * dz * hat
        if of_weight is not None:
            tl.store(of_weight + own + j, tl.sum(dz * hat, 0), there)
        if of_bias is not None:
            tl.store(of_bias + own + j, tl.sum(dz, 0), there)
    here = partials + r * parts + part
    tl.store(here, tl.sum(one, 1), inside)
    tl.store(here + size, tl.sum(two, 1), inside)


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
    index = tl.arange(0, PARTS)
    mask = inside[:, None] & (index < parts)[None, :]
    here = partials + (r * parts)[:, None] + index[None, :]
    one = tl.zeros([BR], tl.float32)
    if CENTER:
        one = tl.sum(tl.load(here, mask, other=0.0), 1) / features
    two = tl.sum(tl.load(here + size, mask, other=0.0), 1) / features
    end = tl.minimum(part * per + per, features)
    for start in range(part * per, end, BF):
        j = start + tl.arange(0, BF)
        there = j < end
        offsets, valid = (r * features)[:, None] + j[None, :], inside[:, None] & there[None, :]
        hat, dz, w = look(
            x, dy, residual, weight, bias, bits, offsets, valid, 0, r, inside, start, end, j, there, mean, rstd, rows,
            features, slope, offset, ACTIVATION, False, BR, BF, "evict_first",
        )
        write(dx, dresidual, dsummed, offsets, valid, hat, dz, w, rstd, one, two)
