"""What happens to one tile of numbers in a Triton kernel: moments and how they merge, activations, bits of a ReLU.

A tile has two axes. All arithmetic is in float32. Nothing here knows where a tile lies in memory.

What belongs to a row or a column of a tile is a vector, ``v[:, None]`` only where it meets the tile: as a tile of one
column it would be kept, loaded and computed once for each of the eight neighbours that a thread has.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ruff: noqa: RET505  (both branches of what Triton decides when it compiles must be branches)


@triton.jit
def moments(v, valid):
    """Count, mean and squared deviations along axis 1; what is not valid must be 0 in ``v``.

    The mean is corrected by what its own rounding left over: far from zero the deviations would keep that error.
    """
    count = tl.sum(valid.to(tl.float32), 1)
    number = tl.maximum(count, 1.0)
    mean = tl.sum(v, 1) / number
    off = tl.where(valid, v - mean[:, None], 0.0)
    rest = tl.sum(off, 1)
    return count, mean + rest / number, tl.sum(off * off, 1) - rest * rest / number


@triton.jit
def merge_two(count, mean, m2, more, other, other_m2):
    """The rule of Chan, Golub & LeVeque."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    delta = other - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * (count * share)


@triton.jit
def merge_along(count, mean, m2):
    """The same for all entries along axis 1; an entry that counts 0 must be 0."""
    total = tl.sum(count, 1)
    number = tl.maximum(total, 1.0)
    rough = tl.sum(count * mean, 1) / number
    delta = tl.where(count > 0, mean - rough[:, None], 0.0)
    rest = tl.sum(count * delta, 1) / number
    delta = tl.where(count > 0, delta - rest[:, None], 0.0)
    return total, rough + rest, tl.sum(m2 + count * delta * delta, 1)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activated(z, slope, ACTIVATION: tl.constexpr):
    """NaN survives every one of these, as in torch."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def gated(dy, z, slope, ACTIVATION: tl.constexpr):
    """``dy`` times the derivative at ``z``."""
    if ACTIVATION == "relu":
        dy = tl.where(z > 0, dy, 0.0)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * slope)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dy = dy * (0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        dy = dy * (s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z))
    return dy


@triton.jit
def packed(above, AXIS: tl.constexpr):
    """Eight neighbours along an axis to one byte, the first of them to its lowest bit."""
    A: tl.constexpr = above.shape[0]
    B: tl.constexpr = above.shape[1]
    place = tl.arange(0, 8)
    if AXIS == 1:
        apart = tl.reshape(above.to(tl.int32), [A, B // 8, 8]) << place[None, None, :]
        return tl.sum(apart, 2).to(tl.uint8)
    else:
        apart = tl.reshape(above.to(tl.int32), [A // 8, 8, B]) << place[None, :, None]
        return tl.sum(apart, 1).to(tl.uint8)


@triton.jit
def unpacked(bytes, AXIS: tl.constexpr):
    """The inverse of :func:`packed`: 0 or 1 for every element."""
    A: tl.constexpr = bytes.shape[0]
    B: tl.constexpr = bytes.shape[1]
    place = tl.arange(0, 8)
    if AXIS == 1:
        apart = (bytes.to(tl.int32)[:, :, None] >> place[None, None, :]) & 1
        return tl.reshape(apart, [A, 8 * B])
    else:
        apart = (bytes.to(tl.int32)[:, None, :] >> place[None, :, None]) & 1
        return tl.reshape(apart, [8 * A, B])


@triton.jit
def total(partials, dweight, dbias, parts, width, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Partial gradients of weight and bias, (2, parts, width), to the gradients: always added in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    of_weight = tl.zeros([PARTS, BLOCK], tl.float32)
    of_bias = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & inside[None, :]
        here = partials + (part.to(tl.int64) * width)[:, None] + at[None, :]  # parts times a width of millions
        if dweight is not None:
            of_weight += tl.load(here, mask, other=0.0)
        if dbias is not None:
            of_bias += tl.load(here + size, mask, other=0.0)
    if dweight is not None:
        tl.store(dweight + at, tl.sum(of_weight, 0), inside)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(of_bias, 0), inside)
