"""Statistics per channel or per group of channels on a GPU: (n, c, s) or (n, s, c) in memory.

A tile is [channels, positions]. A program owns a block of channels of one section (all samples for batch norm, one
sample for group and instance norm) and some of its tiles.

Forward, three launches: ``measure`` leaves count, mean and squared deviations of every channel in parts; ``settle``
merges the parts behind every statistic; ``normalise`` writes. Backward likewise: ``sum_up`` leaves the sums of dz and
of dz (x - mean), ``average`` and ``own`` make averages and the gradients of weight and bias of them, ``differentiate``
writes. What merges is a launch of its own, because in the prologue of the passes over the tensor it cost them more, in
registers and in code, than it takes. The passes that measure go through the tensor from its beginning, those that
write from its end: that is what the cache still holds.

Nothing is added atomically and no program waits for another (those that do are in ``triton_resident``): the same device
gives the same bits, and the programs may run one after the other, as they do in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton_tile import activated, gated, merge_along, merge_two, packed, unpacked

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off
# ruff: noqa: RET505  (both branches of what Triton decides when it compiles must be branches)


@triton.jit
def block_of(pid, c, blocks, BC: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Section, channels [BC], which of them exist."""
    section, block = pid // blocks, pid % blocks
    if WIDE:
        section = section.to(tl.int64)
    if ALIGNED:  # a multiple of 8 already; now the compiler knows it, and eight neighbouring channels are one load
        c = c // 8 * 8
    channels = block * BC + tl.arange(0, BC)
    return section, channels, channels < c


@triton.jit
def tile_of(
    item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Offsets [BC, BP] of the tile in the tensor, which of them exist, the sample, and which positions [BP] exist."""
    if WIDE:  # before anything is multiplied: of one channel there may be 2^31 positions
        item, channels = item + tl.full([], 0, tl.int64), channels.to(tl.int64)
    sample = section * n + item // tiles
    at = item % tiles * BP + tl.arange(0, BP)
    if ALIGNED:
        stride_s = stride_s // 8 * 8
    there = at < s
    offsets = (sample * c * s + channels * stride_c)[:, None] + (at * stride_s)[None, :]
    return offsets, inside[:, None] & there[None, :], sample, there


@triton.jit
def bytes_at(
    item, tiles, sample, channels, inside, c, s, together, run_bytes, section_bytes, COLUMNS: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
):
    """Where the bits of a tile are, a byte for eight neighbours, of which the first speaks for all; which exist.

    A run is a plane of (n, c, s), or ``together`` positions of (n, s, c).
    """
    if WIDE:
        item, channels = item + tl.full([], 0, tl.int64), channels.to(tl.int64)
    start = item % tiles * BP
    if COLUMNS:
        first = tl.min(tl.reshape(channels, [BC // 8, 8]), 1)
        there = tl.max(tl.reshape(inside.to(tl.int32), [BC // 8, 8]), 1) != 0
        at = start + tl.arange(0, BP)
        along = sample * section_bytes + at // together * run_bytes + at % together * (c // 8)
        return (first // 8)[:, None] + along[None, :], there[:, None] & (at < s)[None, :]
    else:
        at = start + 8 * tl.arange(0, BP // 8)
        return ((sample * c + channels) * run_bytes)[:, None] + (at // 8)[None, :], inside[:, None] & (at < s)[None, :]


@triton.jit
def measure(
    x, partials, n, c, s, stride_c, stride_s, tiles, items, parts, blocks, size, BC: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    """Count, mean and squared deviations, each (sections, c, parts) of float32."""
    section, channels, inside = block_of(tl.program_id(0), c, blocks, BC, WIDE, ALIGNED)
    measure_part(
        x, partials, section, channels, inside, tl.program_id(1), n, c, s, stride_c, stride_s, tiles, items, parts,
        size, BC, BP, WIDE, ALIGNED, STAGES,
    )


@triton.jit
def measure_part(
    x, partials, section, channels, inside, part, n, c, s, stride_c, stride_s, tiles, items, parts, size,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    """Of the tiles that one program has.

    Every place of a tile has moments of its own until the end (Welford's rule): a sum over the tile, for which threads
    wait for each other, is made once and not for every tile.
    """
    count = tl.zeros([BP], tl.float32)
    mean = tl.zeros([BC, BP], tl.float32)
    m2 = tl.zeros([BC, BP], tl.float32)
    for item in tl.range(part, items, parts, num_stages=STAGES):
        offsets, valid, _, there = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        v = tl.load(x + offsets, valid, other=0.0, eviction_policy="evict_last").to(tl.float32)
        count += there.to(tl.float32)
        off = tl.where(valid, v - mean, 0.0)
        mean += off * (1.0 / tl.maximum(count, 1.0))[None, :]
        m2 += off * (v - mean)
    total, mean_of_all, m2_of_all = merge_along(
        tl.where(inside[:, None], count[None, :], 0.0), mean, m2
    )
    here = partials + (section * c + channels) * parts + part
    tl.store(here, total, inside)
    tl.store(here + size, mean_of_all, inside)
    tl.store(here + 2 * size, m2_of_all, inside)


@triton.jit
def settle(
    partials, stats, running_mean, running_var, new_mean, new_var, units, entries, size, values, unbiased, momentum,
    eps, UNITS: tl.constexpr, ENTRIES: tl.constexpr,
):
    """Means and inverse deviations of statistics, each of which has ``entries`` neighbours among the partials."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    settle_some(
        partials, stats, running_mean, running_var, new_mean, new_var, unit, unit < units, units, entries, size, values,
        unbiased, momentum, eps, UNITS, ENTRIES,
    )


@triton.jit
def settle_some(
    partials, stats, running_mean, running_var, new_mean, new_var, unit, inside, units, entries, size, values, unbiased,
    momentum, eps, UNITS: tl.constexpr, ENTRIES: tl.constexpr,
):
    count = tl.zeros([UNITS], tl.float32)
    mean = tl.zeros([UNITS], tl.float32)
    m2 = tl.zeros([UNITS], tl.float32)
    for first in range(0, entries, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        mask = inside[:, None] & (entry < entries)[None, :]
        here = partials + (unit.to(tl.int64) * entries)[:, None] + entry[None, :]
        more, other, other_m2 = merge_along(
            tl.load(here, mask, other=0.0),
            tl.load(here + size, mask, other=0.0),
            tl.load(here + 2 * size, mask, other=0.0),
        )
        count, mean, m2 = merge_two(count, mean, m2, more, other, other_m2)
    tl.store(stats + unit, mean, inside)
    tl.store(stats + units + unit, 1.0 / tl.sqrt_rn(m2 / values + eps), inside)
    if new_mean is not None:
        old = tl.load(running_mean + unit, inside, other=0.0)
        tl.store(new_mean + unit, old * (1.0 - momentum) + mean * momentum, inside)
    if new_var is not None:
        old = tl.load(running_var + unit, inside, other=0.0)
        tl.store(new_var + unit, old * (1.0 - momentum) + m2 * unbiased * momentum, inside)


@triton.jit
def parameter(pointer, channels, inside, otherwise: tl.constexpr):
    if pointer is None:
        return tl.where(inside, otherwise, 0.0)
    else:
        return tl.load(pointer + channels, inside, other=0.0).to(tl.float32)


@triton.jit
def normalise(
    x, residual, weight, bias, y, bits, stats, n, c, s, stride_c, stride_s, tiles, items, parts, blocks, pooled, units,
    slope, together, run_bytes, section_bytes, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    """With the means and inverse deviations in ``stats``."""
    section, channels, inside = block_of(tl.program_id(0), c, blocks, BC, WIDE, ALIGNED)
    normalise_part(
        x, residual, weight, bias, y, bits, stats, section, channels, inside, tl.program_id(1), n, c, s, stride_c,
        stride_s, tiles, items, parts, pooled, units, slope, together, run_bytes, section_bytes, GROUPED, ACTIVATION,
        COLUMNS, BC, BP, WIDE, ALIGNED, STAGES,
    )


@triton.jit
def normalise_part(
    x, residual, weight, bias, y, bits, stats, section, channels, inside, part, n, c, s, stride_c, stride_s, tiles,
    items, parts, pooled, units, slope, together, run_bytes, section_bytes, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    unit = section * (c // pooled) + channels // pooled if GROUPED else channels
    mean = tl.load(stats + unit, inside, other=0.0)
    rstd = tl.load(stats + units + unit, inside, other=0.0)
    scale = rstd * parameter(weight, channels, inside, 1.0)
    shift = parameter(bias, channels, inside, 0.0)
    for step in tl.range(part, items, parts, num_stages=STAGES):
        item = items - 1 - step
        offsets, valid, sample, _ = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        v = tl.load(x + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = (v - mean[:, None]) * scale[:, None] + shift[:, None]
        if residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if bits is not None:
            byte, there = bytes_at(
                item, tiles, sample, channels, inside, c, s, together, run_bytes, section_bytes, COLUMNS, BC, BP, WIDE
            )
            tl.store(bits + byte, packed((z > 0) & valid, 0 if COLUMNS else 1), there)
        tl.store(y + offsets, activated(z, slope, ACTIVATION), valid, eviction_policy="evict_first")


@triton.jit
def look(
    x, dy, residual, bits, item, tiles, offsets, valid, sample, channels, inside, mean, scale, shift, c, s, slope,
    together, run_bytes, section_bytes, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr, WIDE: tl.constexpr, EVICT: tl.constexpr,
):
    """The input less its mean, and the gradient before the activation: 0 where there is no element."""
    off = tl.load(x + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32) - mean[:, None]
    dz = tl.load(dy + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if bits is not None:
        byte, there = bytes_at(
            item, tiles, sample, channels, inside, c, s, together, run_bytes, section_bytes, COLUMNS, BC, BP, WIDE
        )
        kept = unpacked(tl.load(bits + byte, there, other=0), 0 if COLUMNS else 1)
        dz = tl.where(kept != 0, dz, 0.0)
    elif ACTIVATION is not None:
        z = off * scale[:, None] + shift[:, None]
        if residual is not None:
            z += tl.load(residual + offsets, valid, other=0.0, eviction_policy=EVICT).to(tl.float32)
        dz = gated(dz, z, slope, ACTIVATION)
    return tl.where(valid, off, 0.0), tl.where(valid, dz, 0.0)


@triton.jit
def sum_up(
    x, dy, residual, weight, bias, bits, stats, partials, n, c, s, stride_c, stride_s, tiles, items, parts, blocks,
    size, pooled, units, slope, together, run_bytes, section_bytes, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums of dz and of dz (x - mean), each (sections, c, parts) of float32."""
    section, channels, inside = block_of(tl.program_id(0), c, blocks, BC, WIDE, ALIGNED)
    sum_up_part(
        x, dy, residual, weight, bias, bits, stats, partials, section, channels, inside, tl.program_id(1), n, c, s,
        stride_c, stride_s, tiles, items, parts, size, pooled, units, slope, together, run_bytes, section_bytes,
        GROUPED, ACTIVATION, COLUMNS, BC, BP, WIDE, ALIGNED, STAGES,
    )


@triton.jit
def sum_up_part(
    x, dy, residual, weight, bias, bits, stats, partials, section, channels, inside, part, n, c, s, stride_c, stride_s,
    tiles, items, parts, size, pooled, units, slope, together, run_bytes, section_bytes, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    unit = section * (c // pooled) + channels // pooled if GROUPED else channels
    mean = tl.load(stats + unit, inside, other=0.0)
    scale = tl.load(stats + units + unit, inside, other=0.0) * parameter(weight, channels, inside, 1.0)
    shift = parameter(bias, channels, inside, 0.0)
    one = tl.zeros([BC, BP], tl.float32)
    two = tl.zeros([BC, BP], tl.float32)
    for item in tl.range(part, items, parts, num_stages=STAGES):
        offsets, valid, sample, _ = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        off, dz = look(
            x, dy, residual, bits, item, tiles, offsets, valid, sample, channels, inside, mean, scale, shift, c, s,
            slope, together, run_bytes, section_bytes, ACTIVATION, COLUMNS, BC, BP, WIDE, "evict_last",
        )
        one += dz
        two += dz * off
    here = partials + (section * c + channels) * parts + part
    tl.store(here, tl.sum(one, 1), inside)
    tl.store(here + size, tl.sum(two, 1), inside)


@triton.jit
def average(
    partials, stats, weight, averages, dweight, dbias, c, parts, size, pooled, units, values, GROUPED: tl.constexpr,
    UNITS: tl.constexpr, ENTRIES: tl.constexpr,
):
    """The averages of w dz and of w dz (x - mean) behind every statistic, (2, units); per channel also the gradients of
    weight and bias."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    average_some(
        partials, stats, weight, averages, dweight, dbias, unit, unit < units, c, parts, size, pooled, units, values,
        GROUPED, UNITS, ENTRIES,
    )


@triton.jit
def average_some(
    partials, stats, weight, averages, dweight, dbias, unit, inside, c, parts, size, pooled, units, values,
    GROUPED: tl.constexpr, UNITS: tl.constexpr, ENTRIES: tl.constexpr,
):
    entries = pooled * parts
    each = tl.zeros([UNITS, ENTRIES], tl.float32)
    each_off = tl.zeros([UNITS, ENTRIES], tl.float32)
    for first in range(0, entries, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        mask = inside[:, None] & (entry < entries)[None, :]
        here = partials + (unit.to(tl.int64) * entries)[:, None] + entry[None, :]
        more = tl.load(here, mask, other=0.0)
        other = tl.load(here + size, mask, other=0.0)
        if GROUPED:
            w = parameter(weight, (unit % (c // pooled) * pooled)[:, None] + (entry // parts)[None, :], mask, 1.0)
            more, other = more * w, other * w
        each += more
        each_off += other
    one, two = tl.sum(each, 1), tl.sum(each_off, 1)
    if not GROUPED:
        if dweight is not None:
            tl.store(dweight + unit, two * tl.load(stats + units + unit, inside, other=0.0), inside)
        if dbias is not None:
            tl.store(dbias + unit, one, inside)
        w = parameter(weight, unit, inside, 1.0)
        one, two = one * w, two * w
    if averages is not None:
        tl.store(averages + unit, one / values, inside)
        tl.store(averages + units + unit, two / values, inside)


@triton.jit
def own(
    partials, stats, dweight, dbias, sections, c, parts, size, pooled, units, UNITS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The gradients of weight and bias, over all samples, where statistics are a sample's own."""
    channel = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = channel < c
    one = tl.zeros([UNITS, ENTRIES], tl.float32)
    two = tl.zeros([UNITS, ENTRIES], tl.float32)
    for first in range(0, sections * parts, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        mask = inside[:, None] & (entry < sections * parts)[None, :]
        section = entry // parts
        row = (section * c)[None, :] + channel[:, None]
        here = partials + row.to(tl.int64) * parts + (entry % parts)[None, :]
        one += tl.load(here, mask, other=0.0)
        unit = (section * (c // pooled))[None, :] + (channel // pooled)[:, None]
        two += tl.load(here + size, mask, other=0.0) * tl.load(stats + units + unit, mask, other=0.0)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(two, 1), inside)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(one, 1), inside)


@triton.jit
def differentiate(
    x, dy, residual, weight, bias, bits, stats, averages, dx, dresidual, n, c, s, stride_c, stride_s, tiles, items,
    parts, blocks, pooled, units, slope, together, run_bytes, section_bytes, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    """The gradients of x and residual; ``averages`` as of :func:`average`; ``None``: the statistics are constants."""
    section, channels, inside = block_of(tl.program_id(0), c, blocks, BC, WIDE, ALIGNED)
    differentiate_part(
        x, dy, residual, weight, bias, bits, stats, averages, dx, dresidual, section, channels, inside,
        tl.program_id(1), n, c, s, stride_c, stride_s, tiles, items, parts, pooled, units, slope, together, run_bytes,
        section_bytes, GROUPED, ACTIVATION, COLUMNS, BC, BP, WIDE, ALIGNED, STAGES,
    )


@triton.jit
def differentiate_part(
    x, dy, residual, weight, bias, bits, stats, averages, dx, dresidual, section, channels, inside, part, n, c, s,
    stride_c, stride_s, tiles, items, parts, pooled, units, slope, together, run_bytes, section_bytes,
    GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):
    unit = section * (c // pooled) + channels // pooled if GROUPED else channels
    mean = tl.load(stats + unit, inside, other=0.0)
    rstd = tl.load(stats + units + unit, inside, other=0.0)
    w = parameter(weight, channels, inside, 1.0)
    shift = parameter(bias, channels, inside, 0.0)
    if averages is not None:
        one = tl.load(averages + unit, inside, other=0.0) * rstd
        steep = tl.load(averages + units + unit, inside, other=0.0) * rstd * rstd * rstd
    for step in tl.range(part, items, parts, num_stages=STAGES):
        item = items - 1 - step
        offsets, valid, sample, _ = tile_of(
            item, section, channels, inside, n, c, s, stride_c, stride_s, tiles, BP, WIDE, ALIGNED
        )
        off, dz = look(
            x, dy, residual, bits, item, tiles, offsets, valid, sample, channels, inside, mean, rstd * w, shift, c, s,
            slope, together, run_bytes, section_bytes, ACTIVATION, COLUMNS, BC, BP, WIDE, "evict_first",
        )
        if dresidual is not None:
            tl.store(dresidual + offsets, dz, valid, eviction_policy="evict_first")
        if dx is not None:
            inner = dz * (w * rstd)[:, None]
            if averages is not None:
                inner -= one[:, None] + off * steep[:, None]
            tl.store(dx + offsets, inner, valid, eviction_policy="evict_first")
