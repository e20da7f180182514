"""The first NaN: when a gradient stopped being finite, and where in the forward pass it came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.measure.untouched import untouched

FRAMES = 21
"""As many as the debugger of Hugging Face's trainer shows."""


class Sentinel:
    """One small gradient per step. A loss that is NaN makes every gradient NaN, so the smallest of the last ones tells.

    On a CPU the number is read at once, before the optimizer spoils the weights by it. Elsewhere reading would wait for
    the device, so the numbers are kept until the next sample.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = [p for p in model.parameters() if p.requires_grad and p.numel()]
        self.weight = min(weights[-8:], key=Tensor.numel, default=None)
        self._waiting: list[tuple[int, Tensor]] = []

    def look(self, step: int) -> bool:
        """Whether this step's gradient is known not to be finite."""
        gradient = None if self.weight is None else self.weight.grad
        if gradient is None:
            return False
        total = (gradient.to_dense() if gradient.is_sparse else gradient).detach().sum()
        if total.device.type == "cpu":
            return not math.isfinite(float(total))
        self._waiting.append((step, total))
        return False

    def first(self) -> int | None:
        """The first of the steps since the last call whose gradient was not finite; one transfer."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return None
        values = torch.stack([total for _, total in waiting]).isfinite().tolist()
        return next((step for (step, _), finite in zip(waiting, values, strict=True) if not finite), None)


@dataclass(frozen=True)
class Frame:
    """What went through one place, in absolute values of the finite ones."""

    module: str
    kind: str
    what: str
    least: float
    greatest: float
    nonfinite: float


def trace(model: nn.Module, run: Callable[[], Any] | None, batch: Any, step: int) -> dict[str, Any]:
    """Where the first value that is not finite comes from: the batch, a weight, a layer, or the way back.

    Args:
        model: the model as it is at that step.
        run: the forward pass on the batch; ``None``: no batch is at hand.
        batch: what it is run on.
        step: where in the run this is.
    """
    places: list[tuple[str, str, str, Tensor]] = []
    note = lambda module, kind, what, value: places.extend((module, kind, what, numbers) for numbers in _numbers(value))
    for name, parameter in model.named_parameters():
        note(name, "parameter", "value", parameter)
    held = len(places)
    failed = ""
    if run is not None:
        note("", "batch", "input", batch)
        failed = _forward(model, run, note)
    forward = len(places)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            note(name, "parameter", "gradient", parameter.grad)
    frames = _read(places)
    return _told(step, frames[:held], frames[held:forward], frames[forward:], failed)


@torch.no_grad()
def _numbers(value: Any) -> list[Tensor]:
    """Least and greatest absolute value of the finite ones, and how many are not."""
    found = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            dense = leaf.detach().to_dense() if leaf.is_sparse else leaf.detach()
            size, finite = dense.abs().float(), dense.isfinite()
            least = torch.where(finite, size, math.inf).min()
            greatest = torch.where(finite, size, 0).max()
            found.append(torch.stack([least, greatest, (~finite).sum().float()]))
    return found


def _forward(model: nn.Module, run: Callable[[], Any], note: Callable[..., None]) -> str:
    """Notes what every leaf of the model gives; a sentence if the model could not be run."""
    handles = []
    try:
        with untouched(model), torch.no_grad():
            for name, module in model.named_modules():
                if next(module.children(), None) is None:
                    handles.append(
                        module.register_forward_hook(
                            lambda m, _, out, name=name: note(name, type(m).__name__, "output", out)
                        )
                    )
            note("", type(model).__name__, "output", run())
    except Exception as error:  # the trace is an extra: it must not end the training
        return f"the forward pass could not be repeated ({type(error).__name__}: {error})"
    finally:
        for handle in handles:
            handle.remove()
    return ""


def _read(places: list[tuple[str, str, str, Tensor]]) -> list[Frame]:
    """One transfer per device."""
    rows: list[Frame | None] = [None] * len(places)
    for device in {numbers.device for *_, numbers in places}:
        chosen = [index for index, (*_, numbers) in enumerate(places) if numbers.device == device]
        values = torch.stack([places[index][3] for index in chosen]).tolist()
        for index, (least, greatest, nonfinite) in zip(chosen, values, strict=True):
            module, kind, what, _ = places[index]
            rows[index] = Frame(module, kind, what, least if math.isfinite(least) else 0.0, greatest, nonfinite)
    return [row for row in rows if row is not None]


def _told(step: int, held: list[Frame], forward: list[Frame], back: list[Frame], failed: str) -> dict[str, Any]:
    """The verdict in words, and the frames that show it."""
    broken = [frame for frame in held if frame.nonfinite and frame.kind == "parameter"]
    first = next((place for place, frame in enumerate(forward) if frame.nonfinite), None)
    lost = [frame for frame in back if frame.nonfinite]
    if broken:
        some = ", ".join(frame.module for frame in broken[:4]) + (" ..." if len(broken) > 4 else "")
        verdict = (
            f"At step {step} {len(broken)} parameters and buffers already hold values that are not finite: {some}."
        )
        shown, module = broken[:FRAMES], broken[0].module
    elif first is not None:
        frame, shown = forward[first], forward[max(0, first - FRAMES + 1) : first + 1]
        module = frame.module
        before = max((f.greatest for f in forward[:first]), default=0.0)
        source = "The batch itself has" if frame.what == "input" else f"{module or 'The model'} ({frame.kind}) gives"
        verdict = (
            f"{source} the first values that are not finite, at step {step}: {frame.nonfinite:.0f} of them. "
            f"The greatest finite value up to there is {max(before, frame.greatest):.3g}."
        )
    elif lost:
        shown, module = [*forward[-FRAMES:], *lost[-FRAMES:]], lost[-1].module
        way = failed[:1].upper() + failed[1:] or "The forward pass is finite"
        verdict = (
            f"{way} at step {step}; the gradient is not, in {len(lost)} parameters, of which {module} is the last: "
            "look at the loss, and at what has no finite slope."
        )
    else:
        shown, module = forward[-FRAMES:], ""
        verdict = f"At step {step} a gradient was not finite; nothing else of it is left to see."
    frames = [
        {
            "module": f.module,
            "class": f.kind,
            "what": f.what,
            "least": f.least,
            "greatest": f.greatest,
            "nonfinite": f.nonfinite,
        }
        for f in shown
    ]
    return {"step": step, "module": module, "verdict": verdict, "frames": frames}
