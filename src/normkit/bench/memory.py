"""What a chain of convolutions, batch norms and activations keeps between forward and backward, and at which price.

Bytes are counted where autograd puts tensors away: every storage once, however many nodes hold it, without parameters
and without the input of the chain, which its caller holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.bench.cell import Effort, Record, time_steps
from normkit.bench.clock import Step
from normkit.bench.peers import BASELINE

OP = "conv+batch_norm+leaky_relu"
BLOCKS, SHAPE = 8, (8, 64, 28, 28)
REASON = f"{BLOCKS} blocks, each a 3x3 convolution, a norm and an activation, as in every convolutional network"
OUTPUT = 'normkit, save="output"'
VARIANTS: dict[str, Callable[[int], list[nn.Module]]] = {
    BASELINE: lambda c: [nn.BatchNorm2d(c), nn.LeakyReLU(inplace=True)],
    "torch out of place": lambda c: [nn.BatchNorm2d(c), nn.LeakyReLU()],
    "normkit": lambda c: [nk.BatchNorm2d(c, activation="leaky_relu")],
    OUTPUT: lambda c: [nk.BatchNorm2d(c, activation="leaky_relu", save="output")],
}
"""What follows a convolution of so many channels."""


def chain(variant: str, channels: int, blocks: int) -> nn.Sequential:
    """The same parameters for every variant; none of them one or zero."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), *VARIANTS[variant](channels)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (9 * channels) ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.6, 1.4, generator=generator)
                parameter.sub_(1.0 if name.endswith("bias") else 0.0)
    return model


def saved_bytes(call: Callable[[Tensor], Tensor], x: Tensor, apart: Iterable[Tensor] = ()) -> int:
    """Bytes that one forward pass keeps for its backward pass, beside ``x`` and the tensors ``apart`` (parameters)."""
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor  # stays alive in the graph, so that no other one gets its address

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(x)
    for tensor in (x, *apart):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(held.values())


def measure(dtype: str, effort: Effort, device: str = "cpu") -> list[Record]:
    """One record per variant: megabytes kept, the error of the gradients against float64, and the time of a step."""
    about = {"kind": "memory", "op": OP, "shape": list(SHAPE), "dtype": dtype, "layout": "contiguous"}
    about |= {"device": device, "reason": REASON}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator)
    upstream = torch.randn(SHAPE, generator=generator)
    right = gradients(chain(BASELINE, SHAPE[1], BLOCKS).double(), x.double(), upstream.double())
    records: list[Record] = []
    steps: dict[str, Step] = {}
    for variant in VARIANTS:
        if effort.wanted and variant not in (BASELINE, *effort.wanted):
            continue
        model = _typed(chain(variant, SHAPE[1], BLOCKS), dtype).to(device)
        given, dy = (t.to(device, getattr(torch, dtype)) for t in (x, upstream))
        got = gradients(model, given, dy)
        errors = {name: float((got[name] - right[name]).norm() / right[name].norm()) for name in right}
        given.requires_grad_()
        kept = saved_bytes(model, given, model.parameters())
        numbers = {"saved_mb": kept / 1e6, "gradient_error": errors}
        records.append({**about, "implementation": variant, "state": "measured", **numbers})
        steps[variant] = Step(
            lambda model=model, given=given: model(given),  # type: ignore[misc]
            lambda y, model=model, given=given, dy=dy: torch.autograd.grad(y, [given, *model.parameters()], dy),  # type: ignore[misc]
        )
    for variant, told in time_steps(steps, effort, device).items():
        next(r for r in records if r["implementation"] == variant).update(told)
    return records


def gradients(model: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Of the input, and of all parameters in one row; in float64, on the CPU."""
    x = x.detach().clone().requires_grad_()
    dx, *rest = torch.autograd.grad(model(x), [x, *model.parameters()], upstream)
    return {"input": dx.double().cpu(), "parameters": torch.cat([d.double().cpu().flatten() for d in rest])}


def _typed(model: nn.Sequential, dtype: str) -> nn.Sequential:
    """Norms keep float32 parameters, as under autocast."""
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.to(getattr(torch, dtype))
        elif dtype == "float64":
            layer.double()
    return model
