"""Two models that must be one: what a training step shows of each, held against the truth in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normkit.surgery import recast

EPS = torch.finfo(torch.float32).eps


def observe(model: nn.Module, x: Tensor, *modes: bool) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one step in each mode, against the same random upstream gradients."""
    seen = {}
    generator = torch.Generator().manual_seed(7)
    for step, training in enumerate(modes):
        model.train(training)
        model.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        y = model(leaf)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
        seen |= {f"{step} output": y.detach(), f"{step} gradient of the input": leaf.grad}
        seen |= {f"{step} gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        seen |= {f"{step} {n}": b.clone() for n, b in model.named_buffers() if n in model.state_dict()}
    return seen


def assert_same(model: nn.Module, original: nn.Module, x: Tensor, *modes: bool) -> None:
    """``model`` is as near to the float64 truth as ``original`` is.

    Both carry the rounding of a network's depth; a factor of 8 and 64 units roundoff of the greatest value leave room
    for another order of summation, and for nothing else. Where terms cancel, one order may be lucky by far, so images
    go through ``original`` in both layouts of memory, and the greater rounding counts.
    """
    truth = observe(copy.deepcopy(original).double(), x.double(), *modes)
    last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    again = observe(copy.deepcopy(original), last, *modes)
    theirs, ours = observe(original, x, *modes), observe(model, x, *modes)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, exact in truth.items():
        rounding = max((seen[name].double() - exact).abs().max() for seen in (theirs, again))
        error = (ours[name].double() - exact).abs().max()
        assert error <= 8 * rounding + 64 * EPS * exact.abs().max(), f"{name}: {error:.2e}, original {rounding:.2e}"


def note_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """For every call of a normkit layer from now on: whether a residual and whether an activation came with it."""
    seen: list[tuple[bool, bool]] = []

    def noting(forward: Callable) -> Callable:
        def wrapper(self, *args, residual=None, **kwargs):
            seen.append((residual is not None, self.activation is not None))
            return forward(self, *args, residual=residual, **kwargs)

        return wrapper

    for cls in dict.fromkeys(recast.twins().values()):
        monkeypatch.setattr(cls, "forward", noting(cls.forward))
    return seen
