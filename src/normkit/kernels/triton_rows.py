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

from normkit.kernels.triton_tile import activated, gated, merge_two, moments, packed

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off
# ruff: noqa: RET505  (both branches of what Triton decides when it compiles must be branches)


@triton.jit
def rows_of(block, blocks, phase, period, rows, BR: tl.constexpr, WIDE: tl.constexpr):
    """Sample, rows [BR, 1], which of them exist. Rows of one phase share a weight: every ``period``-th."""
    if WIDE:  # before anything is multiplied
        block = block + tl.zeros([1, 1], tl.int64)
    r = phase + period * (block % blocks * BR + tl.arange(0, BR)[:, None])
    return block // blocks, r, r < rows


@triton.jit
def bit_of(sample, r, j, rows, features, ALONG_ROWS: tl.constexpr):
    """The byte of the mask where these elements are."""
    if ALONG_ROWS:
        return (sample * features + j) * ((rows + 15) // 16 * 2) + r // 8
    else:
        return r * ((features + 15) // 16 * 2) + j // 8


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
        count = tl.sum(valid.to(tl.float32), 1, keep_dims=True)
        mean, m2 = tl.zeros_like(count), tl.sum(v * v, 1, keep_dims=True)
    return count, mean, m2


@triton.jit
def scaled(pointer, at, mask, offset):
    """Weight, plus the 1 that some models leave out of it."""
    if pointer is None:
        return tl.full([1, 1], 1.0, tl.float32)
    else:
        return tl.load(pointer + at, mask, other=0.0).to(tl.float32) + offset


@triton.jit
def shifted(pointer, at, mask):
    if pointer is None:
        return tl.zeros([1, 1], tl.float32)
    else:
        return tl.load(pointer + at, mask, other=0.0).to(tl.float32)


@triton.jit
def forward(
    x, residual, weight, bias, y, bits, stats, summed, blocks, period, rows, features, row_stride, feature_stride,
    sample_stride, units, eps, slope, offset, PRE: tl.constexpr, CENTER: tl.constexpr, ACTIVATION: tl.constexpr,
    ALONG_ROWS: tl.constexpr, ONE: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr,
):
    pid = tl.program_id(0)
    phase = pid % period
    sample, r, inside = rows_of(pid // period, blocks, phase, period, rows, BR, WIDE)
    base = sample * sample_stride + r * row_stride
    if ONE:
        j = tl.arange(0, BF)[None, :]
        valid = inside & (j < features)
        v = read(x, residual, base + j * feature_stride, valid, PRE, "evict_first")
        count, mean, m2 = row_moments(v, valid, CENTER)
    else:
        count = tl.zeros([BR, 1], tl.float32)
        mean = tl.zeros([BR, 1], tl.float32)
        m2 = tl.zeros([BR, 1], tl.float32)
        for start in range(0, features, BF):
            j = start + tl.arange(0, BF)[None, :]
            valid = inside & (j < features)
            v = read(x, residual, base + j * feature_stride, valid, PRE, "evict_last")
            more, other, other_m2 = row_moments(v, valid, CENTER)
            count, mean, m2 = merge_two(count, mean, m2, more, other, other_m2)
    rstd = 1.0 / tl.sqrt_rn(m2 / tl.maximum(count, 1.0) + eps)
    unit = sample * rows + r
    tl.store(stats + unit, mean, inside)
    tl.store(stats + units + unit, rstd, inside)
    for start in range(0, features, BF):
        j = start + tl.arange(0, BF)[None, :]
        valid = inside & (j < features)
        offsets = base + j * feature_stride
        if not ONE:
            v = read(x, residual, offsets, valid, PRE, "evict_first")
        at = phase * features + j
        z = (v - mean) * rstd * scaled(weight, at, j < features, offset) + shifted(bias, at, j < features)
        if PRE:
            if summed is not None:
                tl.store(summed + offsets, v, valid)
        elif residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if bits is not None:
            byte = bit_of(sample, r, j, rows, features, ALONG_ROWS) + tl.zeros_like(valid.to(tl.int32))
            if ALONG_ROWS:
                byte = tl.min(tl.reshape(byte, [BR // 8, 8, BF]), 1)
                whole = tl.max(tl.reshape(valid.to(tl.int32), [BR // 8, 8, BF]), 1) > 0
                tl.store(bits + byte, packed((z > 0) & valid, 0), whole)
            else:
                byte = tl.min(tl.reshape(byte, [BR, BF // 8, 8]), 2)
                whole = tl.max(tl.reshape(valid.to(tl.int32), [BR, BF // 8, 8]), 2) > 0
                tl.store(bits + byte, packed((z > 0) & valid, 1), whole)
        tl.store(y + offsets, activated(z, slope, ACTIVATION), valid, eviction_policy="evict_first")


@triton.jit
def look(
    x, dy, residual, weight, bias, bits, offsets, valid, sample, r, j, at, mean, rstd, rows, features, slope, offset,
    ACTIVATION: tl.constexpr, ALONG_ROWS: tl.constexpr, EVICT: tl.constexpr,
):
    """The normalised input, the gradient before the activation (both 0 where there is no element), and the weight."""
    v = tl.load(x + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
    hat = tl.where(valid, (v - mean) * rstd, 0.0)
    dz = tl.load(dy + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
    w = scaled(weight, at, j < features, offset)
    if bits is not None:
        kept = tl.load(bits + bit_of(sample, r, j, rows, features, ALONG_ROWS), valid, other=0).to(tl.int32)
        bit = (r if ALONG_ROWS else j) % 8
        dz = tl.where((kept >> bit.to(tl.int32)) & 1 != 0, dz, 0.0)
    elif ACTIVATION is not None:
        z = hat * w + shifted(bias, at, j < features)
        if residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
        dz = gated(dz, z, slope, ACTIVATION)
    return hat, tl.where(valid, dz, 0.0), w


@triton.jit
def write(dx, dresidual, dsummed, offsets, valid, hat, dz, w, rstd, one, two):
    if dresidual is not None:
        tl.store(dresidual + offsets, dz, valid, eviction_policy="evict_first")
    if dx is not None:
        inner = (w * dz - one - hat * two) * rstd
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
    WIDE: tl.constexpr,
):
    """of_weight and of_bias: (programs per phase, period * features) of float32; 0 before, unless ONE."""
    phase = tl.program_id(0) % period
    program = tl.program_id(0) // period
    own = (program * period + phase) * features
    dw = tl.zeros([1, BF], tl.float32)
    db = tl.zeros([1, BF], tl.float32)
    for block in range(program * per, tl.minimum(program * per + per, all_blocks)):
        sample, r, inside = rows_of(block, blocks, phase, period, rows, BR, WIDE)
        base = sample * sample_stride + r * row_stride
        unit = sample * rows + r
        mean = tl.load(stats + unit, inside, other=0.0)
        rstd = tl.load(stats + units + unit, inside, other=0.0)
        one = tl.zeros([BR, 1], tl.float32)
        if ONE:
            j = tl.arange(0, BF)[None, :]
            valid = inside & (j < features)
            hat, dz, w = look(
                x, dy, residual, weight, bias, bits, base + j * feature_stride, valid, sample, r, j, phase * features
                + j, mean, rstd, rows, features, slope, offset, ACTIVATION, ALONG_ROWS, "evict_first",
            )
            dw += tl.sum(dz * hat, 0, keep_dims=True)
            db += tl.sum(dz, 0, keep_dims=True)
            two = tl.sum(w * dz * hat, 1, keep_dims=True) / features
            if CENTER:
                one = tl.sum(w * dz, 1, keep_dims=True) / features
            write(dx, dresidual, dsummed, base + j * feature_stride, valid, hat, dz, w, rstd, one, two)
        else:
            two = tl.zeros([BR, 1], tl.float32)
            for start in range(0, features, BF):
                j = start + tl.arange(0, BF)[None, :]
                valid = inside & (j < features)
                hat, dz, w = look(
                    x, dy, residual, weight, bias, bits, base + j * feature_stride, valid, sample, r, j,
                    phase * features + j, mean, rstd, rows, features, slope, offset, ACTIVATION,
                    ALONG_ROWS, "evict_last",
                )
                add_to(of_weight, own + j, tl.sum(dz * hat, 0, keep_dims=True), j < features)
                add_to(of_bias, own + j, tl.sum(dz, 0, keep_dims=True), j < features)
                tl.debug_barrier()
                two += tl.sum(w * dz * hat, 1, keep_dims=True) / features
                if CENTER:
                    one += tl.sum(w * dz, 1, keep_dims=True) / features
            for start in range(0, features, BF):
                j = start + tl.arange(0, BF)[None, :]
                valid = inside & (j < features)
                hat, dz, w = look(
                    x, dy, residual, weight, bias, bits, base + j * feature_stride, valid, sample, r, j,
                    phase * features + j, mean, rstd, rows, features, slope, offset, ACTIVATION,
                    ALONG_ROWS, "evict_first",
                )
                write(dx, dresidual, dsummed, base + j * feature_stride, valid, hat, dz, w, rstd, one, two)
    if ONE:
        j = tl.arange(0, BF)[None, :]
        if of_weight is not None:
            tl.store(of_weight + own + j, dw, j < features)
        if of_bias is not None:
            tl.store(of_bias + own + j, db, j < features)
