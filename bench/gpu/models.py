"""Whole models: a training step with torch's norms and with normkit's: unasked, on the Triton kernels, and compiled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from clocks import measured
from contenders import COMPILED, COMPILED_IN_GRAPHS, OURS, UNASKED
from torch import Tensor, nn

import normkit as nk
from normkit.bench.clock import Step
from normkit.bench.models import Layer, Residual, ResNet

Made = tuple[nn.Module, Tensor]


def _resnet50(toy: bool, device: str) -> Made:
    model = ResNet((1, 1), 8, 10) if toy else ResNet()
    x = torch.randn((2, 3, 16, 16) if toy else (128, 3, 224, 224), device=device)
    return model.to(device, memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def _unet_block(toy: bool, device: str) -> Made:
    channels, shape = (32, (2, 32, 6, 6)) if toy else (320, (8, 320, 64, 64))
    # On a CPU torch 2.13 crashes in the backward pass of so small a convolution with its channels last.
    layout = torch.contiguous_format if toy else torch.channels_last
    model = Residual(channels, channels).to(device, memory_format=layout)
    return model, torch.randn(shape, device=device).to(memory_format=layout)


def _llm_layer(toy: bool, device: str) -> Made:
    width, heads, shape = (32, 2, (1, 4, 32)) if toy else (2048, 16, (4, 2048, 2048))
    return Layer(width, heads).to(device, torch.bfloat16), torch.randn(shape, device=device, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Variant:
    """Who is timed."""

    backend: str | None
    """Of normkit's norms; ``None``: torch's norms."""
    mode: str | None
    """Of ``torch.compile``; ``None``: eager."""
    seconds: float
    """That it may take."""


VARIANTS = {
    "torch": Variant(None, None, 5.0),
    UNASKED: Variant("auto", None, 5.0),
    OURS: Variant("triton", None, 10.0),
    "torch.compile": Variant(None, "default", 45.0),
    COMPILED: Variant("triton", "default", 45.0),
}
IN_GRAPHS = {
    "torch.compile, CUDA graphs": Variant(None, "reduce-overhead", 45.0),
    COMPILED_IN_GRAPHS: Variant("triton", "reduce-overhead", 45.0),
}
"""Where calls cost nothing."""
MAKERS: dict[str, Callable[[bool, str], Made]] = {
    "resnet50": _resnet50,
    "unet_block": _unet_block,
    "llm_layer": _llm_layer,
}


def step_of(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Step:
    """Forward under autocast in bfloat16, and the gradients of all parameters."""
    parameters = list(model.parameters())
    upstream: list[Tensor] = []

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = call(x)
        if not upstream:
            upstream.append(torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device, y.dtype))
        return y

    return Step(forward, lambda y: torch.autograd.grad(y, parameters, upstream[0]))


@contextlib.contextmanager
def step_by(variant: Variant, model: nn.Module, x: Tensor) -> Iterator[Step]:
    """A training step of a model, which changes for it."""
    with nk.backend(variant.backend or "auto"):
        if variant.backend:
            nk.accelerate_(model)
        yield step_of(torch.compile(model, dynamic=False, mode=variant.mode) if variant.mode else model, model, x)


def compile_once(name: str, device: str) -> None:
    """Leave on the disk what ``torch.compile`` makes of a model, with torch's norms and with normkit's."""
    for variant in (VARIANTS["torch.compile"], VARIANTS[COMPILED]):
        # who fails here fails again where it is timed, and is recorded there
        with contextlib.suppress(Exception), step_by(variant, *MAKERS[name](device == "cpu", device)) as step:
            step.finish(step.forward())


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Of all tensors together, relative."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, wanted, strict=True))
    size = sum(float(b.double().square().sum()) for b in wanted)
    return (error / size) ** 0.5


def records(
    name: str, clock: Any, out_of_time: Callable[[float], bool], variants: dict[str, Variant]
) -> Iterator[dict[str, Any]]:
    """One per variant. A variant whose gradients are twice as far from float32's as torch's own is not timed."""
    torch.manual_seed(0)
    plain, x = MAKERS[name](clock.device == "cpu", clock.device)
    exact = copy.deepcopy(plain).float()
    y = exact(x.float())
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device)
    truth = [y.detach(), *torch.autograd.grad(y, list(exact.parameters()), upstream)]

    def error_of(step: Step) -> float:
        y = step.forward()
        return distance([y.detach(), *step.finish(y)], truth)

    with step_by(VARIANTS["torch"], copy.deepcopy(plain), x) as step:
        allowed = 2 * error_of(step) + 2**-8
    for title, variant in variants.items():
        record: dict[str, Any] = {"kind": "model", "model": name, "implementation": title}
        if out_of_time(variant.seconds):
            yield {**record, "state": "no time"}
            continue
        try:
            with step_by(variant, copy.deepcopy(plain), x) as step:
                error = error_of(step)
                if not error <= allowed:
                    yield {**record, "state": "red", "why": f"{error:.2g} from float32, may be {allowed:.2g}"}
                    continue
                yield {**record, "state": "measured", "error": error, **measured(clock, step, graph=False)}
        except Exception as problem:
            yield {**record, "state": "failed", "why": f"{type(problem).__name__}: {str(problem)[:300]}"}
