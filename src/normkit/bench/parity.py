"""Is the answer right? Nothing is timed before it has agreed with the oracle on the very tensors it is timed on.

The oracle is normkit's reference in float64. It runs in pieces that do not depend on each other (channels of a batch
norm, samples of the others), because it takes a dozen float64 tensors; always on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normkit import epilogue
from normkit.bench.cases import Case
from normkit.bench.inputs import Inputs
from normkit.bench.peers import Peer, layer

PIECE = 2**22
"""Elements that the oracle takes at once, where a statistic leaves it the choice."""
KINKED = ("relu", "leaky_relu")
SINGLE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Agreement:
    """How far one tensor of a peer is from the oracle's, and how far it may be. Both relative to the oracle's norm."""

    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # also false for a NaN

    def __str__(self) -> str:
        return f"error {self.error:.1e}, may be {self.limit:.1e}"


Truth = dict[str, Tensor]


def truth(case: Case, given: Inputs, weights: torch.dtype) -> Truth:
    """Output and gradients in float64, by name: ``y``, ``x``, ``residual``, ``weight`` ...

    The upstream gradient is set to zero where the input of a ReLU is within rounding of its kink: on which side it
    falls there is a matter of rounding and not of being right, and a wrong side would be a wrong gradient.
    """
    y = torch.empty_like(given.x, dtype=torch.float64, device="cpu", requires_grad=False)
    found: Truth = {"y": y, "x": torch.empty_like(y)}
    if given.residual is not None:
        found["residual"] = torch.empty_like(y)
    by_channel = case.spec.name == "batch_norm"
    whole = layer(case, weights)
    margin = max(2 * torch.finfo(given.x.dtype).eps, 16 * SINGLE)
    for piece in _pieces(case):
        own = layer(replace(case, shape=_shape_of(case, piece)), torch.float64, backend="reference")
        state = whole.state_dict()
        for name, parameter in own.named_parameters():
            parameter.data.copy_(state[name][piece] if by_channel else state[name])
        at = (slice(None), piece) if by_channel else (piece,)
        x, residual = (
            None if t is None else t.detach()[at].cpu().double().requires_grad_() for t in (given.x, given.residual)
        )
        assert x is not None
        inner = own(x)
        z = inner if residual is None else inner + residual
        if case.activation in KINKED:
            scale = inner.detach().abs() + (0 if residual is None else residual.detach().abs())
            beside = z.detach().abs() <= margin * (scale + 1)
            given.upstream[at].masked_fill_(beside.to(given.upstream.device), 0)
        out = epilogue.apply(z, None, case.activation)
        y[at] = out.detach()
        wanted = {"x": x, **({"residual": residual} if residual is not None else {})}
        parameters = dict(own.named_parameters())
        gradients = torch.autograd.grad(
            out, [*wanted.values(), *parameters.values()], given.upstream[at].cpu().double()
        )
        for name, gradient in zip([*wanted, *parameters], gradients, strict=True):
            if name in wanted:
                found[name][at] = gradient
            elif by_channel:
                found[name] = torch.cat([found[name], gradient]) if name in found else gradient
            else:
                found[name] = found[name] + gradient if name in found else gradient
    return found


def check(peer: Peer, given: Inputs, right: Truth) -> dict[str, Agreement]:
    """Output and gradients of a peer against the oracle."""
    step = peer.step(given)
    y = step.forward()
    gradients = step.finish(y)
    leaves = ["x"] if given.residual is None else ["x", "residual"]
    names = ["y", *leaves, *(name for name, _ in sorted(peer.layer.named_parameters()))]
    pooled = given.x.numel() / max(1, min(parameter.numel() for parameter in peer.parameters()))
    spread = _conditioning(given.x)
    found = {}
    for name, tensor in zip(names, [y.detach(), *gradients], strict=True):
        rounding = 4 * torch.finfo(tensor.dtype).eps / 2 + 4 * torch.finfo(given.x.dtype).eps / 2
        summed = 0.0 if name in ("y", *leaves) else math.sqrt(pooled)
        found[name] = Agreement(_distance(tensor, right[name]), rounding + 4 * SINGLE * (spread + summed))
    return found


def objection(found: dict[str, Agreement], torchs: dict[str, Agreement] | None = None) -> str | None:
    """The sentence about a peer that is wrong; ``None``: it is right.

    Where torch's own layer (``torchs``) misses the limit, a peer may miss it as far and half as far again: torch's
    layer norm in bfloat16 sums its weight gradient in bfloat16, and so does everybody who calls it.
    """
    allowed = {name: 1.5 * agreement.error for name, agreement in (torchs or {}).items()}
    red = [f"{name}: {one}" for name, one in found.items() if not (one.holds or one.error <= allowed.get(name, 0))]
    return "; ".join(red) or None


def to_json(agreements: dict[str, Agreement]) -> dict[str, Any]:
    return {name: asdict(agreement) for name, agreement in agreements.items()}


def _distance(got: Tensor, right: Tensor) -> float:
    """Greater of two: the distance relative to the oracle's norm, and a quarter of the greatest single error, relative
    to the greatest element, so that one wrong element among millions shows."""
    if got.shape != right.shape:
        return math.inf
    error = (got.cpu().double() - right).abs_()
    norm, greatest = right.norm(), right.abs().max()
    return max(float(error.norm() / norm), float(error.max() / greatest) / 4)


def _conditioning(x: Tensor) -> float:
    """1 + max|x| / deviation: what centring multiplies the rounding of the input by."""
    return 1 + float(x.detach().abs().max().double() / x.detach().double().std())


def _pieces(case: Case) -> Iterator[slice]:
    axis = 1 if case.spec.name == "batch_norm" else 0
    size = case.shape[axis]
    each = max(1, PIECE // (math.prod(case.shape) // size))
    for start in range(0, size, each):
        yield slice(start, min(size, start + each))


def _shape_of(case: Case, piece: slice) -> tuple[int, ...]:
    axis = 1 if case.spec.name == "batch_norm" else 0
    return (*case.shape[:axis], piece.stop - piece.start, *case.shape[axis + 1 :])
