"""What a kernel is asked: a problem reduced to three axes, or the reasons why it has no such form.

Every kernel saves the same things for its backward pass: mean and inverse deviation of every statistic, and one bit per
element where a ReLU follows a residual (the sign before the ReLU; bit i of a run is bit ``i % 8`` of byte ``i // 8``,
and every run starts on a multiple of two bytes). A ReLU without a residual, and every other activation, is found again
from the input. Nothing of the output is saved, so later code may overwrite it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from normkit.vocabulary.problem import Problem

Shape = Literal["planes", "columns", "rows", "tiles"]


@dataclass(frozen=True, slots=True)
class Work:
    """``n`` samples, ``c`` channels, ``s`` positions of space; for ``rows``, n rows of c elements."""

    shape: Shape
    """``planes``: (n, c, s) in memory. ``columns``: (n, s, c) in memory. Both pool per channel over all samples, or per
    group of channels of one sample. ``rows``: statistics per row, a weight per element. ``tiles``: (n, c, s) in memory,
    statistics over the channels of one position."""
    n: int
    c: int
    s: int
    groups: int
    """Statistics per sample; 0: one per channel over all samples. ``rows``: the weight repeats after so many."""

    @property
    def statistics(self) -> int:
        """How many means and variances there are."""
        if self.shape == "rows":
            return self.n
        if self.shape == "tiles":
            return self.n * self.s
        return self.n * self.groups if self.groups else self.c


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Whether the axes lie in memory in this order, the last one fastest, without gaps."""
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1 and strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True


@lru_cache(maxsize=4096)
def reduce(problem: Problem) -> Work | str:
    """The three-axis form of a problem, or the sentence that says why there is none."""
    shape, strides = problem.shape, problem.strides
    axes = tuple(range(len(shape)))
    first = is_dense(shape, strides, axes)
    last = len(shape) > 1 and is_dense(shape, strides, (0, *axes[2:], 1))
    if not first and not last:
        return "the input is neither contiguous nor channels-last in memory"
    by_position = problem.pooled == problem.weighted and problem.view == shape
    if problem.kind == "rows" and by_position and problem.pooled == axes[len(axes) - len(problem.pooled) :]:
        if not first:
            return "the normalised axes are not the last ones in memory"
        c = prod(shape[axis] for axis in problem.pooled)
        return Work("rows", prod(shape) // max(c, 1), c, 1, 1)
    n, channels, s = shape[0], shape[1], prod(shape[2:])
    if problem.kind == "rows" and by_position and problem.pooled == (1,):
        if last:
            return Work("rows", n * s, channels, 1, 1)
        return Work("tiles", n, channels, s, 0)
    if problem.kind == "channels" or not problem.training:
        groups = 0
    elif problem.weighted == (1, 2):
        groups = problem.view[1]
    elif problem.weighted == (1,) and problem.pooled == tuple(range(2, len(problem.view))):
        groups = channels
    else:
        return f"no kernel pools the axes {problem.pooled} of {problem.view} with a weight along {problem.weighted}"
    if groups and s == 1:
        return Work("rows", n * groups, channels // groups, 1, groups)
    if problem.training and not problem.center:
        return "the kernels that pool space subtract the mean"
    return Work("planes" if first and s > 1 else "columns", n, channels, s, groups)


def bit_bytes(length: int) -> int:
    """Of a run of so many bits: padded to whole 16s, so that every run starts on a byte."""
    return (length + 15) // 16 * 2


def positions_per_run(work: Work) -> int:
    """Of ``columns``: several positions of few channels make one run, where there are enough positions."""
    positions = work.s if work.groups else work.n * work.s
    wanted = 1 if work.c >= 256 else (511 + work.c) // work.c
    return max(1, min(wanted, positions // 64))


def bits_are_bytes(work: Work) -> bool:
    """Whether eight neighbours that share a byte always meet in one tile of a GPU, which writes whole bytes.

    Of ``columns`` they are channels: a byte must not reach into the next position, nor into another block of groups.
    """
    if work.shape != "columns":
        return True
    pooled = work.c // work.groups if work.groups else 1
    return (work.c % 8 == 0 or positions_per_run(work) == 1) and (pooled % 8 == 0 or 8 % pooled == 0)


def section_bytes(work: Work) -> int:
    """Of ``columns``: the bits of one sample, or of all where the samples are not told apart."""
    positions, together = work.s if work.groups else work.n * work.s, positions_per_run(work)
    return positions // together * bit_bytes(together * work.c) + bit_bytes(positions % together * work.c)


def bits_needed(work: Work) -> int:
    """Bytes of the bits behind a residual and a ReLU."""
    if work.shape == "rows":
        return work.n * bit_bytes(work.c)
    if work.shape == "columns":
        return section_bytes(work) * (work.n if work.groups else 1)
    return work.n * work.c * bit_bytes(work.s)
