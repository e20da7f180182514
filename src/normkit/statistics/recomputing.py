"""Whether a forward pass runs inside a backward pass: activation checkpointing runs every layer a second time there."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.exporting import exporting


def recomputing() -> bool:
    """Whether autograd is running a backward pass in this thread right now. Not for compiled code."""
    return torch._C._current_graph_task_id() != -1


_library = torch.library.Library("normkit", "FRAGMENT")
_library.define("first_pass(Tensor near) -> Tensor")


def _first_pass(near: Tensor) -> Tensor:
    # made there, not copied: a CUDA graph, which torch.compile captures, refuses what comes from the CPU's memory
    return torch.full((), not recomputing(), device=near.device)


_library.impl("first_pass", _first_pass, "CompositeExplicitAutograd")


@torch.library.register_fake("normkit::first_pass", lib=_library)
def _(near: Tensor) -> Tensor:
    return near.new_empty((), dtype=torch.bool)


def first_pass(near: Tensor) -> Tensor | None:
    """The opposite of :func:`recomputing` as an operator, on the device of ``near``: asked when compiled code runs.

    A compiled layer inside an eager checkpoint is compiled once and runs both outside and inside the backward pass.
    ``None`` in an exported program, which has no operators but torch's.
    """
    return None if exporting() else torch.ops.normkit.first_pass(near)
