"""Statistics per row on a GPU: layer and RMS norm over the last axes or over channels, and group norm without space.

A tile is [rows, features]. Rows of a matrix have their features side by side; over the channels of (n, c, s) the rows
lie side by side and their features s apart. Where a row fits into a tile it is read once; otherwise it is read again,
out of the cache. Backward, every program goes through its share of the rows and keeps its part of the gradients of
weight and bias, which ``triton_tile.total`` adds in a fixed order: nothing is atomic.

``summed`` is for blocks that add before they normalise: there ``x + residual`` is what is normalised, and it is an
output of its own, whose gradient comes back with that of y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton_tile import activated, gated, merge_two, moments, packed, unpacked

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off
# ruff: noqa: RET505  (both branches of what Triton decides when it compiles must be branches)


@triton.jit
def rows_of(block, blocks, phase, period, rows, BR: tl.constexpr, WIDE: tl.constexpr):
    """Sample, rows [BR], which of them exist. Rows of one phase share a weight: every ``period``-th."""
    if WIDE:  # before anything is multiplied
        block = block + tl.full([], 0, tl.int64)
    r = phase + period * (block % blocks * BR + tl.arange(0, BR))
    return block // blocks, r, r < rows


@triton.jit
def away(j, feature_stride, WIDE: tl.constexpr):
    """How far features are from the first one of their row."""
    if WIDE:
        j = j.to(tl.int64)
    return j * feature_stride


@triton.jit
def bytes_at(
    sample, r, inside, start, end, rows, features, ALONG_ROWS: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
):
    """Where the bits of a tile are, a byte for eight neighbours, of which the first speaks for all; which exist."""
    if ALONG_ROWS:
        first = tl.min(tl.reshape(r, [BR // 8, 8]), 1)
        there = tl.max(tl.reshape(inside.to(tl.int32), [BR // 8, 8]), 1) != 0
        j = start + tl.arange(0, BF)
        run = (sample * features + j) * ((rows + 15) // 16 * 2)
        return (first // 8)[:, None] + run[None, :], there[:, None] & (j < end)[None, :]
    else:
        j = start + 8 * tl.arange(0, BF // 8)
        run = r * ((features + 15) // 16 * 2)
        return run[:, None] + (j // 8)[None, :], inside[:, None] & (j < end)[None, :]


@triton.jit
def read(x, residual, offsets, mask, PRE: tl.constexpr, EVICT: tl.constexpr):
    """What is normalised."""
    v = tl.load(x + offsets, mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if PRE:
        v += tl.load(residual + offsets, mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        v = v.to(x.dtype.element_ty).to(tl.float32)  # what is stored is what is normalised, then and in backward
    return v


@triton.jit
def row_moments(v, valid, CENTER: tl.constexpr):
    if CENTER:
        count, mean, m2 = moments(v, valid)
    else:
        count = tl.sum(valid.to(tl.float32), 1)
        mean, m2 = tl.zeros_like(count), tl.sum(v * v, 1)
    return count, mean, m2


@triton.jit
def feature(pointer, at, mask, otherwise, offset, ALONG_ROWS: tl.constexpr):
    """A parameter [1, BF], plus what some models leave out of it.

    Where features are neighbours it is loaded as a row of the tile, in the layout that the tile has; where rows are, a
    thread would load it once for each of its eight rows.
    """
    if pointer is None:
        return tl.where(mask, otherwise, 0.0)[None, :]
    elif ALONG_ROWS:
        return tl.load(pointer + at, mask, other=0.0).to(tl.float32)[None, :] + offset
    else:
        return tl.load(pointer + at[None, :], mask[None, :], other=0.0).to(tl.float32) + offset


@triton.jit
def finish(
    v, residual, weight, bias, y, bits, summed, offsets, valid, sample, r, inside, start, end, at, there, mean, rstd,
    rows, features, slope, offset, PRE: tl.constexpr, ACTIVATION: tl.constexpr, ALONG_ROWS: tl.constexpr,
    BR: tl.constexpr, BF: tl.constexpr,
):
    """From the values of a tile, whose features are start..end, to its outputs."""
    z = (v - mean[:, None]) * rstd[:, None] * feature(weight, at, there, 1.0, offset, ALONG_ROWS)
    z += feature(bias, at, there, 0.0, 0.0, ALONG_ROWS)
    if PRE:
        if summed is not None:
            tl.store(summed + offsets, v, valid)
    elif residual is not None:
        z += tl.load(residual + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if bits is not None:
        byte, whole = bytes_at(sample, r, inside, start, end, rows, features, ALONG_ROWS, BR, BF)
        tl.store(bits + byte, packed((z > 0) & valid, 0 if ALONG_ROWS else 1), whole)
    tl.store(y + offsets, activated(z, slope, ACTIVATION), valid, eviction_policy="evict_first")


@triton.jit
def forward(
    x, residual, weight, bias, y, bits, stats, summed, blocks, period, rows, features, row_stride, feature_stride,
    sample_stride, units, slope, eps, offset, PRE: tl.constexpr, CENTER: tl.constexpr, ACTIVATION: tl.constexpr,
    ALONG_ROWS: tl.constexpr, ONE: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    phase = pid % period
    sample, r, inside = rows_of(pid // period, blocks, phase, period, rows, BR, WIDE)
    base = sample * sample_stride + r * row_stride
    unit = sample * rows + r
    if ONE:
        j = tl.arange(0, BF)
        there, along = j < features, away(j, feature_stride, WIDE)
        offsets, valid = base[:, None] + along[None, :], inside[:, None] & there[None, :]
        v = read(x, residual, offsets, valid, PRE, "evict_first")
        _, mean, m2 = row_moments(v, valid, CENTER)
        rstd = 1.0 / tl.sqrt_rn(m2 / features + eps)
        finish(
            v, residual, weight, bias, y, bits, summed, offsets, valid, sample, r, inside, 0, features,
            phase * features + j, there, mean, rstd, rows, features, slope, offset, PRE, ACTIVATION, ALONG_ROWS, BR, BF,
        )
    else:
        count = tl.zeros([BR], tl.float32)
        mean = tl.zeros([BR], tl.float32)
        m2 = tl.zeros([BR], tl.float32)
        for start in range(0, features, BF):
            j = start + tl.arange(0, BF)
            there, along = j < features, away(j, feature_stride, WIDE)
            valid = inside[:, None] & there[None, :]
            v = read(x, residual, base[:, None] + along[None, :], valid, PRE, "evict_last")
            more, other, other_m2 = row_moments(v, valid, CENTER)
            count, mean, m2 = merge_two(count, mean, m2, more, other, other_m2)
        rstd = 1.0 / tl.sqrt_rn(m2 / features + eps)
        for start in range(0, features, BF):
            j = start + tl.arange(0, BF)
            there, along = j < features, away(j, feature_stride, WIDE)
            offsets, valid = base[:, None] + along[None, :], inside[:, None] & there[None, :]
            v = read(x, residual, offsets, valid, PRE, "evict_first")
            finish(
                v, residual, weight, bias, y, bits, summed, offsets, valid, sample, r, inside, start, features,
                phase * features + j, there, mean, rstd, rows, features, slope, offset, PRE, ACTIVATION, ALONG_ROWS, BR,
                BF,
            )
    tl.store(stats + unit, mean, inside)
    tl.store(stats + units + unit, rstd, inside)


@triton.jit
def look(
    x, dy, residual, weight, bias, bits, offsets, valid, sample, r, inside, start, end, at, there, mean, rstd, rows,
    features, slope, offset, ACTIVATION: tl.constexpr, ALONG_ROWS: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The normalised input, the gradient before the activation (both 0 where there is no element), and the weights."""
    v = tl.load(x + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
    dz = tl.load(dy + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
    hat = tl.where(valid, (v - mean[:, None]) * rstd[:, None], 0.0)
    w = feature(weight, at, there, 1.0, offset, ALONG_ROWS)
    if bits is not None:
        byte, whole = bytes_at(sample, r, inside, start, end, rows, features, ALONG_ROWS, BR, BF)
        kept = unpacked(tl.load(bits + byte, whole, other=0), 0 if ALONG_ROWS else 1)
        dz = tl.where(kept != 0, dz, 0.0)
    elif ACTIVATION is not None:
        z = hat * w + feature(bias, at, there, 0.0, 0.0, ALONG_ROWS)
        if residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
        dz = gated(dz, z, slope, ACTIVATION)
    return hat, tl.where(valid, dz, 0.0), w


@triton.jit
def write(dx, dresidual, dsummed, offsets, valid, hat, dz, w, rstd, one, two):
    if dresidual is not None:
        tl.store(dresidual + offsets, dz, valid, eviction_policy="evict_first")
    if dx is not None:
        inner = (w * dz - one[:, None] - hat * two[:, None]) * rstd[:, None]
        if dsummed is not None:
            inner += tl.load(dsummed + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(dx + offsets, inner, valid, eviction_policy="evict_first")


@triton.jit
def add_to(partial, at, more, mask):
    """A barrier behind it: who adds here next may be another thread of this program."""
    if partial is not None:
        tl.store(partial + at, tl.load(partial + at, mask, other=0.0) + more, mask)


@triton.jit
def backward(
    x, dy, residual, weight, bias, bits, stats, dsummed, dx, dresidual, of_weight, of_bias, blocks, per, all_blocks,
    period, rows, features, row_stride, feature_stride, sample_stride, units, slope, offset, CENTER: tl.constexpr,
    ACTIVATION: tl.constexpr, ALONG_ROWS: tl.constexpr, ONE: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):
    """of_weight and of_bias: (programs per phase, period * features) of float32; 0 before, unless ONE."""
    phase = tl.program_id(0) % period
    program = tl.program_id(0) // period
    own = (program * period + phase) * features
    dw = tl.zeros([BR, BF], tl.float32)  # summed over the rows at the end: a sum makes threads wait for each other
    db = tl.zeros([BR, BF], tl.float32)
    for block in tl.range(program * per, tl.minimum(program * per + per, all_blocks), num_stages=STAGES):
        sample, r, inside = rows_of(block, blocks, phase, period, rows, BR, WIDE)
        base = sample * sample_stride + r * row_stride
        unit = sample * rows + r
        mean = tl.load(stats + unit, inside, other=0.0)
        rstd = tl.load(stats + units + unit, inside, other=0.0)
        one = tl.zeros([BR], tl.float32)
        if ONE:
            j = tl.arange(0, BF)
            there, along = j < features, away(j, feature_stride, WIDE)
            offsets, valid = base[:, None] + along[None, :], inside[:, None] & there[None, :]
            hat, dz, w = look(
                x, dy, residual, weight, bias, bits, offsets, valid, sample, r, inside, 0, features,
                phase * features + j, there, mean, rstd, rows, features, slope, offset, ACTIVATION, ALONG_ROWS, BR, BF,
                "evict_first",
            )
            if of_weight is not None:
                dw += dz * hat
            if of_bias is not None:
                db += dz
            two = tl.sum(w * dz * hat, 1) / features
            if CENTER:
                one = tl.sum(w * dz, 1) / features
            write(dx, dresidual, dsummed, offsets, valid, hat, dz, w, rstd, one, two)
        else:
            two = tl.zeros([BR], tl.float32)
            for start in range(0, features, BF):
                j = start + tl.arange(0, BF)
                there, along = j < features, away(j, feature_stride, WIDE)
                offsets, valid = base[:, None] + along[None, :], inside[:, None] & there[None, :]
                hat, dz, w = look(
                    x, dy, residual, weight, bias, bits, offsets, valid, sample, r, inside, start, features,
                    phase * features + j, there, mean, rstd, rows, features, slope, offset, ACTIVATION, ALONG_ROWS, BR,
                    BF, "evict_last",
                )
                add_to(of_weight, own + j, tl.sum(dz * hat, 0), there)
                add_to(of_bias, own + j, tl.sum(dz, 0), there)
                tl.debug_barrier()
                two += tl.sum(w * dz * hat, 1) / features
                if CENTER:
                    one += tl.sum(w * dz, 1) / features
            for start in range(0, features, BF):
                j = start + tl.arange(0, BF)
                there, along = j < features, away(j, feature_stride, WIDE)
                offsets, valid = base[:, None] + along[None, :], inside[:, None] & there[None, :]
                hat, dz, w = look(
                    x, dy, residual, weight, bias, bits, offsets, valid, sample, r, inside, start, features,
                    phase * features + j, there, mean, rstd, rows, features, slope, offset, ACTIVATION, ALONG_ROWS, BR,
                    BF, "evict_first",
                )
                write(dx, dresidual, dsummed, offsets, valid, hat, dz, w, rstd, one, two)
    if ONE:
        j = tl.arange(0, BF)
        if of_weight is not None:
            tl.store(of_weight + own + j, tl.sum(dw, 0), j < features)
        if of_bias is not None:
            tl.store(of_bias + own + j, tl.sum(db, 0), j < features)
