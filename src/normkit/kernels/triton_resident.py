"""Batch, group and instance norm in one launch, whose programs stay on the GPU and wait for each other.

For tensors that the second-level cache holds: there the time of a pass is little more than that of its launch. A team
of programs has some channels, or groups of one sample. It measures, meets, merges what it measured, meets again, and
reads from the cache what it writes.

Programs that wait for each other must all be there: the launch is a cooperative one, which the driver refuses
otherwise. In Triton's interpreter programs run one after the other, and would wait for ever: there every step is a
launch of its own (``STEP``).

The work itself is that of ``triton_channels``. Larger tensors do not gain by it: with teams that take turns at as much
as the cache holds, every one of them waits for its own last load, twice, and the GPU with it (bench/gpu/README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.triton_channels import (
    average_some,
    block_of,
    differentiate_part,
    measure_part,
    normalise_part,
    settle_some,
    sum_up_part,
)

# Triton's signatures are long lists of numbers: one name a line would hide the code.
# fmt: off


@triton.jit
def meet(counter, members):
    """Wait until all members of the team are here; what they wrote before is visible after.

    ``counter`` only ever grows, by ``members`` for every meeting, so it need not be set to 0 for the next one.
    """
    tl.debug_barrier()
    if members > 1:
        ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        everybody = (ticket // members + 1) * members
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < everybody:
            pass
        tl.debug_barrier()


@triton.jit
def place_of(
    team, member, parts, width, spans, own, c, blocks, pooled, BC: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Section, channels [BC] of a program, which of them exist; the first statistic of its team and the one behind."""
    span = team % spans
    block = team // spans * blocks + span * width + member // parts
    section, channels, inside = block_of(block, c, blocks, BC, WIDE, ALIGNED)
    each = c // pooled
    start = section * each + span * own
    return section, channels, inside, start, tl.minimum(start + own, section * each + each)


@triton.jit
def forward(
    x, residual, weight, bias, y, bits, stats, partials, running_mean, running_var, new_mean, new_var, counters, n, c,
    s, stride_c, stride_s, tiles, items, parts, blocks, pooled, units, slope, together, run_bytes, section_bytes, size,
    values, unbiased, spans, width, own, teams, members, momentum, eps, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr, ENTRIES: tl.constexpr, STEP: tl.constexpr,
):
    """Output, statistics, and the running statistics moved on. ``STEP``: 0 for all, or 1, 2, 3 for one of them."""
    team, member = tl.program_id(0) % teams, tl.program_id(0) // teams
    part = member % parts
    section, channels, inside, start, end = place_of(
        team, member, parts, width, spans, own, c, blocks, pooled, BC, WIDE, ALIGNED
    )
    if STEP <= 1:
        measure_part(
            x, partials, section, channels, inside, part, n, c, s, stride_c, stride_s, tiles, items, parts, size,
            BC, BP, WIDE, ALIGNED, STAGES,
        )
    if STEP == 0:
        meet(counters + 16 * team, members)
    if STEP == 0 or STEP == 2:
        for first in range(start + member, end, members):
            unit = first + tl.arange(0, 1)
            settle_some(
                partials, stats, running_mean, running_var, new_mean, new_var, unit, unit < end, units,
                pooled * parts, size, values, unbiased, momentum, eps, 1, ENTRIES,
            )
    if STEP == 0:
        meet(counters + 16 * team, members)
    if STEP == 0 or STEP == 3:
        normalise_part(
            x, residual, weight, bias, y, bits, stats, section, channels, inside, part, n, c, s, stride_c, stride_s,
            tiles, items, parts, pooled, units, slope, together, run_bytes, section_bytes, GROUPED, ACTIVATION,
            COLUMNS, BC, BP, WIDE, ALIGNED, STAGES,
        )


@triton.jit
def backward(
    x, dy, residual, weight, bias, bits, stats, averages, partials, dx, dresidual, dweight, dbias, counters, n, c, s,
    stride_c, stride_s, tiles, items, parts, blocks, pooled, units, slope, together, run_bytes, section_bytes, size,
    values, spans, width, own, teams, members, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    STAGES: tl.constexpr, ENTRIES: tl.constexpr, STEP: tl.constexpr,
):
    """Gradients of x and residual; per channel also those of weight and bias. ``STEP`` as of :func:`forward`."""
    team, member = tl.program_id(0) % teams, tl.program_id(0) // teams
    part = member % parts
    section, channels, inside, start, end = place_of(
        team, member, parts, width, spans, own, c, blocks, pooled, BC, WIDE, ALIGNED
    )
    if STEP <= 1:
        sum_up_part(
            x, dy, residual, weight, bias, bits, stats, partials, section, channels, inside, part, n, c, s,
            stride_c, stride_s, tiles, items, parts, size, pooled, units, slope, together, run_bytes, section_bytes,
            GROUPED, ACTIVATION, COLUMNS, BC, BP, WIDE, ALIGNED, STAGES,
        )
    if STEP == 0:
        meet(counters + 16 * team, members)
    if STEP == 0 or STEP == 2:
        for first in range(start + member, end, members):
            unit = first + tl.arange(0, 1)
            average_some(
                partials, stats, weight, averages, dweight, dbias, unit, unit < end, c, parts, size, pooled, units,
                values, GROUPED, 1, ENTRIES,
            )
    if STEP == 0:
        meet(counters + 16 * team, members)
    if STEP == 0 or STEP == 3:
        differentiate_part(
            x, dy, residual, weight, bias, bits, stats, averages, dx, dresidual, section, channels, inside, part, n,
            c, s, stride_c, stride_s, tiles, items, parts, pooled, units, slope, together, run_bytes, section_bytes,
            GROUPED, ACTIVATION, COLUMNS, BC, BP, WIDE, ALIGNED, STAGES,
        )
