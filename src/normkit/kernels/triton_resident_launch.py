"""Launches of ``triton_resident``: which shapes one launch can take, and how its programs are cut into teams."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from normkit.kernels import contract, triton_launch, triton_resident
from normkit.kernels.triton import INTERPRETED, here
from normkit.kernels.triton_launch import MERGED, Cut, Launch, Pace, cache, parts_of, stages_that_fit

STAYING = {"columns": Pace(2048, 4, 3, 4, channels=64), "planes": Pace(2048, 4, 3, 4, channels=8)}
"""By the layout; ``programs`` are so many per processor as are there at once."""
FEW = 12
"""Tiles of a program up to which half as many programs are faster, where channels are neighbours and no gradient of a
residual is written: fewer to wait for."""
FORWARD, BACKWARD = 0.6, 0.9
"""Of the second-level cache, for what a pass reads twice. The numbers are what bench/gpu/sweep.py found on an H200."""
REGISTERS = 2**16
"""Of a processor."""


class Teams(Cut):
    """Programs that are all there at once, in teams of ``members``; a team has whole groups of channels.

    Args:
        tensors: so many of the input's size are read twice.
        share: of the cache, for them.
    """

    def __init__(
        self, work: contract.Work, pace: Pace, dtype: torch.dtype, device: torch.device, tensors: int, share: float
    ) -> None:
        super().__init__(work, pace, dtype, device)
        samples, c, s, *strides, tiles, items, _, blocks = self.place
        block, pooled = self.constants["BC"], c // work.groups if work.groups else 1
        self.width = _whole_groups(block, pooled, blocks)
        spans = blocks // self.width
        own = c // pooled if spans == 1 else self.width * block // pooled
        self.teams = self.sections * spans
        there = pace.programs * triton_launch.processors(device)
        size = self.sections * samples * c * s * dtype.itemsize * tensors
        self.fit = self.teams * self.width <= there and size <= share * cache(device)
        self.parts = max(1, min(items, there // self.teams // self.width))
        members = self.parts * self.width
        self.programs = (self.teams * members,)
        self.place = (samples, c, s, *strides, tiles, items, self.parts, blocks)
        self.size = self.sections * self.parts * c
        self.numbers = (spans, self.width, own, self.teams, members)
        self.constants["ENTRIES"] = min(parts_of(pooled * self.parts), MERGED)
        tile_bytes = block * self.constants["BP"] * dtype.itemsize * tensors
        self.constants["STAGES"] = stages_that_fit(pace.stages, tile_bytes * pace.programs, device)
        if not INTERPRETED:
            registers = REGISTERS // (pace.programs * pace.warps * 32)
            self.constants |= {"launch_cooperative_grid": True, "maxnreg": min(255, registers // 8 * 8)}


def teams_for(
    work: contract.Work, pace: Pace, dtype: torch.dtype, device: torch.device, tensors: int, share: float
) -> Teams | None:
    """``None``: too large a tensor, or too many groups."""
    if work.shape == "planes" and work.groups and parts_of(work.s) <= pace.elements(dtype):
        # a tile with all positions of a few channels: a program that has a whole group meets nobody
        pace = pace._replace(channels=min(pace.channels, pace.elements(dtype) // parts_of(work.s)))
    teams = Teams(work, pace, dtype, device, tensors, share)
    if work.shape == "columns" and tensors < 3:
        fewer = Teams(work, pace._replace(programs=pace.programs // 2), dtype, device, tensors, share)
        if fewer.fit and fewer.parts > 1 and fewer.place[6] <= FEW * fewer.parts:
            return fewer
    return teams if teams.fit else None


def _whole_groups(block: int, pooled: int, blocks: int) -> int:
    """How many blocks of channels hold whole groups only; all, if they do not come out even."""
    width = pooled // gcd(block, pooled)
    return width if blocks % width == 0 else blocks


class Resident:
    """One pass, forward or backward, in one launch.

    Args:
        numbers: those between the place of a tile and the teams, by the kernel's parameters.
    """

    def __init__(self, kernel: Any, teams: Teams, numbers: tuple[Any, ...], **constants: Any) -> None:
        self.teams = teams
        given = (*teams.place, *numbers, *teams.numbers)
        self._launches = [
            Launch(kernel, teams.programs, given, **teams.constants, **constants, STEP=step)
            for step in ((1, 2, 3) if INTERPRETED else (0,))
        ]
        self._counters: dict[tuple[int, int], Tensor] = {}
        self._refused = False

    def __call__(self, *tensors: Tensor | None, more: tuple[float, ...] = ()) -> bool:
        """False: nothing was done, because the driver does not let all programs in at once (a GPU shared in parts)."""
        if self._refused:
            return False
        counters = self._counters_for(tensors[0])  # type: ignore[arg-type]
        try:
            for launch in self._launches:
                launch(*tensors, counters, more=more)
        except RuntimeError as error:
            if "cooperative" not in str(error):
                raise
            self._refused = True
        return not self._refused

    def _counters_for(self, x: Tensor) -> Tensor:
        """Of the teams. One set for every stream, on which one launch follows the other; a captured graph has its own,
        because it may be replayed on any, and so has every call of a compiled program, because what is allocated there
        may lie in the memory of its graph."""
        make = lambda: torch.zeros(16 * self.teams.teams, dtype=torch.int64, device=x.device)
        if not x.is_cuda or getattr(here, "compiled", False) or torch.cuda.is_current_stream_capturing():
            return make()
        key = x.get_device(), torch._C._cuda_getCurrentRawStream(x.get_device())
        if key not in self._counters:
            self._counters[key] = make()
        return self._counters[key]


def forward_for(
    work: contract.Work, dtype: torch.dtype, device: torch.device, follows: tuple[Any, ...], values: float,
    kind: dict[str, Any], warps: float,
) -> Resident | None:  # fmt: skip
    """``follows`` and ``kind``: what ``normalise`` takes."""
    teams = teams_for(work, STAYING[work.shape].scaled(warps), dtype, device, 1, FORWARD)
    if teams is None:
        return None
    numbers = (*follows, teams.size, values, 1 / max(values - 1, 1.0))
    return Resident(triton_resident.forward, teams, numbers, **kind)


def backward_for(
    work: contract.Work, dtype: torch.dtype, device: torch.device, follows: tuple[Any, ...], values: float,
    kind: dict[str, Any], warps: float, residual: bool,
) -> Resident | None:  # fmt: skip
    """``residual``: it is read again for the gate of an activation, or its gradient is written."""
    tensors = 3 if residual else 2
    teams = teams_for(work, STAYING[work.shape].scaled(warps), dtype, device, tensors, BACKWARD)
    if teams is None:
        return None
    return Resident(triton_resident.backward, teams, (*follows, teams.size, values), **kind)
