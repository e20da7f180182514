"""What a policy is: which statistics normalise a batch, and what enters the running statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.statistics.application import Application
from normkit.statistics.buffers import Kept
from normkit.statistics.centred import centred_weights

PREFIX = "statistics_state"
"""The name of the child module that holds what a policy keeps beyond the five tensors of a plain batch norm."""


@dataclass(frozen=True)
class Policy:
    """Plain data, without tensors: one policy may serve many layers. What it keeps per layer is in a :class:`State`."""

    def __deepcopy__(self, memo: dict) -> Policy:
        return self  # a copy of a layer has the same one

    def state(self, layer: Any) -> State | None:
        """The further buffers of one layer; ``None``: none."""
        return None

    def check(self, layer: Any) -> None:
        """Raises ValueError where the policy cannot serve a layer with these options."""

    def kept(self, layer: Any, step: int | None) -> Kept | None:
        """Which running statistics a batch belongs to. ``step`` is what the caller says of time, where it does.

        Raises:
            ValueError: the policy knows no steps.
        """
        if step is not None:
            raise ValueError(
                f"{type(layer).__name__}: step={step} was given, and statistics={self!r} keeps one set for all steps.\n"
                "  build the layer with statistics=normkit.statistics.PerStep(max_length)"
            )
        return layer.kept()

    def train(self, call: Application) -> Tensor:
        """The output in training; lets the batch into ``call.kept``."""
        return call.by_batch()

    def evaluate(self, call: Application) -> Tensor:
        """The output in evaluation, and of a frozen layer: by the running statistics; without them by the batch's."""
        if call.kept is None:
            return self.train(call)
        return call.by_given(call.kept.mean, call.kept.var)


class State(nn.Module):
    """Further buffers of one layer. Strict loading takes a plain checkpoint, which has none of them."""

    plain = False
    """The last checkpoint had none of them."""

    def begin(self, layer: Any) -> None:
        """A plain checkpoint was loaded into the layer: set the buffers to what follows from it."""

    def reset(self) -> None:
        """Everything as new: the layer's running statistics were reset."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.half()`` and the like leave the numbers in float32 or better, as those of the layer."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = self._buffers[name]
            if old is None or now is None or not now.is_floating_point() or now.dtype.itemsize >= 4:
                continue
            wide = old.to(device=now.device, dtype=torch.promote_types(old.dtype, torch.float32))
            self._buffers[name] = torch.empty_like(now, dtype=wide.dtype) if now.is_meta else wide
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self.plain = not any(key.startswith(prefix) for key in state_dict)
        if not self.plain:
            super()._load_from_state_dict(state_dict, prefix, *args)


def needs_running(policy: Policy, layer: Any) -> None:
    """Refuse a layer without running statistics."""
    if not layer.track_running_stats:
        name = type(policy).__name__
        raise ValueError(
            f"{type(layer).__name__}: statistics={name}(...) normalises by running statistics, and the layer keeps "
            "none.\n  leave track_running_stats=True"
        )


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of a model without what policies keep: a model of plain torch layers loads it strictly.

    Weights that a policy centres (:func:`normkit.statistics.bind`) are written as they are used.

    >>> import normkit as nk
    >>> bn = nk.BatchNorm1d(4, statistics=nk.statistics.PerDomain(3))
    >>> sorted(nk.plain_state_dict(bn))
    ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    own = {
        f"{name}." if name else ""
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, State)
    }
    state: dict[str, Tensor] = model.state_dict()
    state.update(centred_weights(model))
    return type(state)((key, value) for key, value in state.items() if not any(key.startswith(name) for name in own))


def begin(layer: Any, _: Any) -> None:
    """After a checkpoint: what a policy keeps follows from it, where it was a plain one."""
    state = layer._modules.get(PREFIX)
    if state is not None and state.plain:
        state.plain = False
        state.begin(layer)
