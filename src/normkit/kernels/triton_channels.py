"""Statistics per channel or per group of channels on a GPU: (n, c, s) or (n, s, c) in memory.

A program owns a block of channels of one section (all samples for batch norm, one sample for group and instance norm)
and some of its tiles, [channels, positions] each. First pass: every program leaves count, mean and squared deviations
of its channels. Second pass: every program merges what it needs of these by itself, so that there is no third launch,
and goes through its tiles backwards, the last ones first: those are what the cache still holds. Where one program has
all tiles of its channels (``FROM="input"``), one launch does both passes. Backward is the same with the sums of dz and
of dz (x - mean).

Nothing is added atomically and no program waits for another: the same device gives the same bits, and the programs may
run one after the other, as they do in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton_tile import activated, gated, merge_along, merge_two, moments, packed

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off
# ruff: noqa: RET505  (both branches of what Triton decides when it compiles must be branches)


@triton.jit
def block_of(pid, c, stretch, blocks, per_stretch, BC: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Section, first channel of the stretch, channels [BC, 1], which of them exist.

    A stretch is as many whole groups as fit into a block, or one group that takes several blocks.
    """
    section, block = pid // blocks, pid % blocks
    if WIDE:
        section = section.to(tl.int64)
    begin = block // per_stretch * stretch
    end = tl.minimum(begin + stretch, c)
    if ALIGNED:  # multiples of 8 already; now the compiler knows it, and eight neighbouring channels are one load
        begin, end = begin // 8 * 8, end // 8 * 8
    channels = begin + block % per_stretch * BC + tl.arange(0, BC)[:, None]
    return section, begin, channels, channels < end


@triton.jit
def tile_of(
    item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Offsets [BC, BP] of the tile in the tensor, which of them exist, sample and positions."""
    if WIDE:  # before anything is multiplied: of one channel there may be 2^31 positions
        item, channels = item + tl.zeros([1, 1], tl.int64), channels.to(tl.int64)
    sample = section * n + item // tiles
    at = item % tiles * BP + tl.arange(0, BP)[None, :]
    valid = inside & (at < s)
    if ALIGNED:
        stride_s = stride_s // 8 * 8
    return sample * c * s + channels * stride_c + at * stride_s, valid, sample, at


@triton.jit
def byte_of(channels, at, sample, c, together, run_bytes, section_bytes, COLUMNS: tl.constexpr):
    """Where the bits of elements are: a run is a plane of (n, c, s), or ``together`` positions of (n, s, c)."""
    if COLUMNS:
        return sample * section_bytes + at // together * run_bytes + (at % together * c + channels) // 8
    else:
        return (sample * c + channels) * run_bytes + at // 8


@triton.jit
def measured(
    x, first, last, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BC: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Moments [BC, 1] of every channel over the tiles first..last."""
    count = tl.zeros([BC, 1], tl.float32)
    mean = tl.zeros([BC, 1], tl.float32)
    m2 = tl.zeros([BC, 1], tl.float32)
    for item in range(first, last):
        offsets, valid, _, _ = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        v = tl.load(x + offsets, valid, other=0.0, eviction_policy="evict_last").to(tl.float32)
        more, other, other_m2 = moments(v, valid)
        count, mean, m2 = merge_two(count, mean, m2, more, other, other_m2)
    return count, mean, m2


@triton.jit
def measure(
    x, partials, n, c, s, stride_c, stride_s, tiles, items, per, parts, stretch, blocks, per_stretch, size,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """First pass: count, mean and m2, each (sections, parts, c) of float32."""
    section, _, channels, inside = block_of(tl.program_id(0), c, stretch, blocks, per_stretch, BC, WIDE, ALIGNED)
    part = tl.program_id(1)
    first, last = part * per, tl.minimum(part * per + per, items)
    count, mean, m2 = measured(
        x, first, last, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BC, BP, WIDE, ALIGNED
    )
    here = partials + (section * parts + part) * c + channels
    tl.store(here, count, inside)
    tl.store(here + size, mean, inside)
    tl.store(here + 2 * size, m2, inside)


@triton.jit
def group_sum(v, channels, inside, pooled, BC: tl.constexpr):
    """[BC, 1]: for every channel the sum over all channels of its group, which are all in the block."""
    groups = channels // pooled
    same = (groups == tl.reshape(groups, [1, BC])) & (tl.reshape(inside.to(tl.int32), [1, BC]) != 0)
    return tl.sum(tl.where(same, tl.reshape(v, [1, BC]), 0.0), 1, keep_dims=True)


@triton.jit
def over_group(count, mean, m2, channels, inside, pooled, BC: tl.constexpr):
    """Every channel gets mean and squared deviations of its group. Its channels count the same number of values."""
    rough = group_sum(mean, channels, inside, pooled, BC) / pooled
    off = mean - rough
    rest = group_sum(off, channels, inside, pooled, BC) / pooled
    off -= rest
    return rough + rest, group_sum(m2 + count * off * off, channels, inside, pooled, BC)


@triton.jit
def merged(
    partials, section, begin, channels, inside, c, parts, size, pooled, POOLING: tl.constexpr, BC: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Moments [BC, 1] behind the statistic of every channel; POOLING: "none", "block" (groups fit into one), "loop"."""
    base = partials + section * parts * c
    if POOLING == "loop":
        count = tl.zeros([1, 1], tl.float32)
        mean = tl.zeros([1, 1], tl.float32)
        m2 = tl.zeros([1, 1], tl.float32)
        for first in range(0, parts * pooled, 1024):
            entry = first + tl.arange(0, 1024)[None, :]
            mask = entry < parts * pooled
            here = base + entry // pooled * c + begin + entry % pooled
            more, other, other_m2 = merge_along(
                tl.load(here, mask, other=0.0),
                tl.load(here + size, mask, other=0.0),
                tl.load(here + 2 * size, mask, other=0.0),
            )
            count, mean, m2 = merge_two(count, mean, m2, more, other, other_m2)
        nothing = tl.zeros([BC, 1], tl.float32)
        return mean + nothing, m2 + nothing
    else:
        part = tl.arange(0, PARTS)[None, :]
        mask = inside & (part < parts)
        here = base + part * c + channels
        count, mean, m2 = merge_along(
            tl.load(here, mask, other=0.0),
            tl.load(here + size, mask, other=0.0),
            tl.load(here + 2 * size, mask, other=0.0),
        )
        if POOLING == "block":
            mean, m2 = over_group(count, mean, m2, channels, inside, pooled, BC)
        return mean, m2


@triton.jit
def parameter(pointer, channels, inside, otherwise: tl.constexpr, BC: tl.constexpr):
    if pointer is None:
        return tl.full([BC, 1], otherwise, tl.float32)
    else:
        return tl.load(pointer + channels, inside, other=0.0).to(tl.float32)


@triton.jit
def normalise(
    x, residual, weight, bias, y, bits, stats, partials, running_mean, running_var, new_mean, new_var, n, c, s,
    stride_c, stride_s, tiles, items, per, parts, stretch, blocks, per_stretch, size, pooled, units, values, unbiased,
    momentum, eps, slope, together, run_bytes, section_bytes, FROM: tl.constexpr, POOLING: tl.constexpr,
    GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Second pass. FROM: "input" (measure by itself), "partials" (of ``measure``), "given" (what is in ``stats``)."""
    section, begin, channels, inside = block_of(tl.program_id(0), c, stretch, blocks, per_stretch, BC, WIDE, ALIGNED)
    part = parts - 1 - tl.program_id(1)
    unit = section * (c // pooled) + channels // pooled if GROUPED else channels
    if FROM == "given":
        mean = tl.load(stats + unit, inside, other=0.0)
        rstd = tl.load(stats + units + unit, inside, other=0.0)
    else:
        if FROM == "input":
            count, mean, m2 = measured(
                x, 0, items, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BC, BP, WIDE, ALIGNED
            )
            if POOLING == "block":
                mean, m2 = over_group(count, mean, m2, channels, inside, pooled, BC)
        else:
            mean, m2 = merged(partials, section, begin, channels, inside, c, parts, size, pooled, POOLING, BC, PARTS)
        rstd = 1.0 / tl.sqrt_rn(m2 / values + eps)
        if part == 0:
            tl.store(stats + unit, mean, inside & (channels % pooled == 0))
            tl.store(stats + units + unit, rstd, inside & (channels % pooled == 0))
            if new_mean is not None:
                old = tl.load(running_mean + channels, inside, other=0.0)
                tl.store(new_mean + channels, old * (1.0 - momentum) + mean * momentum, inside)
            if new_var is not None:
                old = tl.load(running_var + channels, inside, other=0.0)
                tl.store(new_var + channels, old * (1.0 - momentum) + m2 * unbiased * momentum, inside)
    scale = rstd * parameter(weight, channels, inside, 1.0, BC)
    shift = parameter(bias, channels, inside, 0.0, BC)
    first, last = part * per, tl.minimum(part * per + per, items)
    for step in range(first, last):
        item = first + last - 1 - step
        offsets, valid, sample, at = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        v = tl.load(x + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = (v - mean) * scale + shift
        if residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if bits is not None:
            byte = byte_of(channels, at, sample, c, together, run_bytes, section_bytes, COLUMNS)
            if COLUMNS:  # eight channels share a byte
                byte = tl.min(tl.reshape(byte, [BC // 8, 8, BP]), 1)
                whole = tl.max(tl.reshape(valid.to(tl.int32), [BC // 8, 8, BP]), 1) > 0
                tl.store(bits + byte, packed((z > 0) & valid, 0), whole)
            else:
                byte = tl.min(tl.reshape(byte, [BC, BP // 8, 8]), 2)
                whole = tl.max(tl.reshape(valid.to(tl.int32), [BC, BP // 8, 8]), 2) > 0
                tl.store(bits + byte, packed((z > 0) & valid, 1), whole)
        tl.store(y + offsets, activated(z, slope, ACTIVATION), valid, eviction_policy="evict_first")


@triton.jit
def look(
    x, dy, residual, bits, offsets, valid, sample, channels, at, mean, scale, shift, c, slope, together, run_bytes,
    section_bytes, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, EVICT: tl.constexpr,
):
    """The input less its mean, and the gradient before the activation: 0 where there is no element."""
    off = tl.load(x + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32) - mean
    dz = tl.load(dy + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if bits is not None:
        byte = byte_of(channels, at, sample, c, together, run_bytes, section_bytes, COLUMNS)
        kept = tl.load(bits + byte, valid, other=0).to(tl.int32)
        bit = (channels if COLUMNS else at) % 8
        dz = tl.where((kept >> bit.to(tl.int32)) & 1 != 0, dz, 0.0)
    elif ACTIVATION is not None:
        z = off * scale + shift
        if residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
        dz = gated(dz, z, slope, ACTIVATION)
    return tl.where(valid, off, 0.0), tl.where(valid, dz, 0.0)


@triton.jit
def summed(
    x, dy, residual, bits, first, last, section, channels, inside, mean, scale, shift, n, c, s, stride_c, stride_s,
    tiles, slope, together, run_bytes, section_bytes, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Sums [BC, 1] of dz and of dz (x - mean) over the tiles first..last."""
    one = tl.zeros([BC, 1], tl.float32)
    two = tl.zeros([BC, 1], tl.float32)
    for item in range(first, last):
        offsets, valid, sample, at = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        off, dz = look(
            x, dy, residual, bits, offsets, valid, sample, channels, at, mean, scale, shift, c, slope, together,
            run_bytes, section_bytes, ACTIVATION, COLUMNS, "evict_last",
        )
        one += tl.sum(dz, 1, keep_dims=True)
        two += tl.sum(dz * off, 1, keep_dims=True)
    return one, two


@triton.jit
def sum_up(
    x, dy, residual, weight, bias, bits, stats, partials, n, c, s, stride_c, stride_s, tiles, items, per, parts,
    stretch, blocks, per_stretch, size, pooled, units, slope, together, run_bytes, section_bytes,
    GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """First pass of backward: the sums of dz and of dz (x - mean), each (sections, parts, c) of float32."""
    section, _, channels, inside = block_of(tl.program_id(0), c, stretch, blocks, per_stretch, BC, WIDE, ALIGNED)
    part = tl.program_id(1)
    unit = section * (c // pooled) + channels // pooled if GROUPED else channels
    mean = tl.load(stats + unit, inside, other=0.0)
    scale = tl.load(stats + units + unit, inside, other=0.0) * parameter(weight, channels, inside, 1.0, BC)
    shift = parameter(bias, channels, inside, 0.0, BC)
    one, two = summed(
        x, dy, residual, bits, part * per, tl.minimum(part * per + per, items), section, channels, inside, mean,
        scale, shift, n, c, s, stride_c, stride_s, tiles, slope, together, run_bytes, section_bytes, ACTIVATION,
        COLUMNS, BC, BP, WIDE, ALIGNED,
    )
    here = partials + (section * parts + part) * c + channels
    tl.store(here, one, inside)
    tl.store(here + size, two, inside)


@triton.jit
def over_stretch(partials, weight, begin, c, parts, size, pooled):
    """Both sums, times the weight, of a group that is wider than a block: [1, 1] each."""
    one = tl.zeros([1, 1], tl.float32)
    two = tl.zeros([1, 1], tl.float32)
    for first in range(0, parts * pooled, 1024):
        entry = first + tl.arange(0, 1024)[None, :]
        mask = entry < parts * pooled
        channel = begin + entry % pooled
        here = partials + entry // pooled * c + channel
        w = parameter(weight, channel, mask, 1.0, 1)
        one += tl.sum(w * tl.load(here, mask, other=0.0), 1, keep_dims=True)
        two += tl.sum(w * tl.load(here + size, mask, other=0.0), 1, keep_dims=True)
    return one, two


@triton.jit
def differentiate(
    x, dy, residual, weight, bias, bits, stats, partials, dx, dresidual, dweight, dbias, n, c, s, stride_c, stride_s,
    tiles, items, per, parts, stretch, blocks, per_stretch, size, pooled, units, values, slope, together, run_bytes,
    section_bytes, FROM: tl.constexpr, POOLING: tl.constexpr, GROUPED: tl.constexpr, BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Second pass of backward; dweight and dbias: (sections, c).

    FROM: "input", "partials" (of ``sum_up``), "none" (no sum is wanted), or "given": ``partials`` has averages,
    (2, units), which per sample contain the weight.
    """
    section, begin, channels, inside = block_of(tl.program_id(0), c, stretch, blocks, per_stretch, BC, WIDE, ALIGNED)
    part = parts - 1 - tl.program_id(1)
    unit = section * (c // pooled) + channels // pooled if GROUPED else channels
    mean = tl.load(stats + unit, inside, other=0.0)
    rstd = tl.load(stats + units + unit, inside, other=0.0)
    w = parameter(weight, channels, inside, 1.0, BC)
    shift = parameter(bias, channels, inside, 0.0, BC)
    first, last = part * per, tl.minimum(part * per + per, items)
    one = tl.zeros([BC, 1], tl.float32)
    two = tl.zeros([BC, 1], tl.float32)
    if FROM == "given":
        one = tl.load(partials + unit, inside, other=0.0)
        two = tl.load(partials + units + unit, inside, other=0.0)
        if not GROUPED:
            one, two = one * w, two * w
    elif FROM != "none":
        if FROM == "input":
            one, two = summed(
                x, dy, residual, bits, 0, items, section, channels, inside, mean, rstd * w, shift, n, c, s, stride_c,
                stride_s, tiles, slope, together, run_bytes, section_bytes, ACTIVATION, COLUMNS, BC, BP, WIDE, ALIGNED,
            )
        else:
            index = tl.arange(0, PARTS)[None, :]
            mask = inside & (index < parts)
            here = partials + (section * parts + index) * c + channels
            one = tl.sum(tl.load(here, mask, other=0.0), 1, keep_dims=True)
            two = tl.sum(tl.load(here + size, mask, other=0.0), 1, keep_dims=True)
        if part == 0:
            if dweight is not None:
                tl.store(dweight + section * c + channels, two * rstd, inside)
            if dbias is not None:
                tl.store(dbias + section * c + channels, one, inside)
        one, two = one * w / values, two * w / values
        if POOLING == "block":
            one = group_sum(one, channels, inside, pooled, BC)
            two = group_sum(two, channels, inside, pooled, BC)
        elif POOLING == "loop":
            nothing = tl.zeros([BC, 1], tl.float32)
            own, other = over_stretch(partials + section * parts * c, weight, begin, c, parts, size, pooled)
            one, two = own / values + nothing, other / values + nothing
    if dx is not None or dresidual is not None:
        steep = rstd * rstd * two
        for step in range(first, last):
            item = first + last - 1 - step
            offsets, valid, sample, at = tile_of(
                item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
            )
            off, dz = look(
                x, dy, residual, bits, offsets, valid, sample, channels, at, mean, rstd * w, shift, c, slope,
                together, run_bytes, section_bytes, ACTIVATION, COLUMNS, "evict_first",
            )
            if dresidual is not None:
                tl.store(dresidual + offsets, dz, valid, eviction_policy="evict_first")
            if dx is not None:
                if BATCH:
                    inner = w * dz - one - off * steep
                else:
                    inner = w * dz
                tl.store(dx + offsets, inner * rstd, valid, eviction_policy="evict_first")
