"""Who runs a cell: torch the way people write it, torch.compile, and normkit on each of its backends.

All peers hold the same parameters, see the same tensors and return the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit as nk
from normkit import epilogue
from normkit.bench.cases import Case
from normkit.bench.clock import Step
from normkit.bench.inputs import Inputs
from normkit.dispatch import BACKENDS

EPS = 1e-5
BASELINE = "torch"
AGAIN = "torch again"
"""A second copy of the baseline, only when it is asked for: what it differs by is the noise of the measurement."""
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "leaky_relu": lambda y: F.leaky_relu_(y, 0.01),
}
"""The others copy their input when they run in place, so nobody gains by it."""


@dataclass
class Peer:
    """One implementation of a cell."""

    name: str
    """``torch``, ``torch out of place``, ``torch.compile``, ``normkit``, ``normkit:torch`` ..."""
    call: Callable[[Tensor, Tensor | None], Tensor]
    layer: nn.Module
    backend: str | None = None
    """Of normkit: who really runs."""

    def parameters(self) -> list[Tensor]:
        """In an order that is the same for all peers."""
        return [value for _, value in sorted(self.layer.named_parameters())]

    def step(self, given: Inputs) -> Step:
        """Forward, and the gradients of everything that can have one."""
        wanted = [*given.leaves, *self.parameters()]
        return Step(
            lambda: self.call(given.x, given.residual),
            lambda y: torch.autograd.grad(y, wanted, given.upstream),
        )


def layer(case: Case, dtype: torch.dtype, device: str = "cpu", **options: Any) -> nn.Module:
    """normkit's layer of a case, with parameters that are neither one nor zero."""
    if case.spec.name == "instance_norm":
        options["affine"] = True
    if case.spec.name != "dyt":
        options["eps"] = EPS
    if case.op.split("+")[0].endswith("_channels_first"):
        options["channels_first"] = True
    made = nk.create(case.norm, case.channels, dim=case.dim, dtype=dtype, device=device, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            low, high = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5)}.get(name, (0.3, 0.7))
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))
    return made.train()


def eager(case: Case, dtype: torch.dtype, device: str = "cpu", *, in_place: bool = True) -> Peer:
    """torch's layer and what follows it, as people write them."""
    own = layer(case, dtype, device)
    norm = _twin(case, own)
    norm.load_state_dict(own.state_dict())
    activate = (IN_PLACE if in_place else {}).get(case.activation or "")

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x)
        if activate is None:
            if in_place and residual is not None:
                y += residual
                return epilogue.apply(y, None, case.activation)
            return epilogue.apply(y, residual, case.activation)
        if residual is not None:
            y += residual
        return activate(y)

    return Peer(BASELINE if in_place else f"{BASELINE} out of place", call, norm)


def differs_out_of_place(case: Case) -> bool:
    """Whether writing the steps out of place is another program."""
    return case.residual or case.activation in IN_PLACE


def compiled(case: Case, dtype: torch.dtype, device: str = "cpu") -> Peer:
    """torch.compile of the same steps, out of place: it fuses them itself."""
    plain = eager(case, dtype, device, in_place=False)
    call = torch.compile(plain.call, fullgraph=True, dynamic=False)
    return Peer("torch.compile", call, plain.layer)


def ours(case: Case, dtype: torch.dtype, given: Inputs, backend: str | None = None) -> Peer:
    """normkit's layer; as dispatch chooses, or on one backend.

    Raises:
        RuntimeError: the backend has reasons against this input; the message lists them.
    """
    own = layer(case, dtype, str(given.x.device), activation=case.activation, backend=backend)
    runs = nk.explain(own, given.x, residual=given.residual).backend
    name = "normkit" if backend is None else f"normkit:{backend}"
    call = lambda x, residual: own(x) if residual is None else own(x, residual=residual)
    return Peer(name, call, own, runs)


def peers(
    case: Case, dtype: torch.dtype, given: Inputs, wanted: tuple[str, ...] = ()
) -> Iterator[Peer | tuple[str, str]]:
    """Every implementation, or its name with the reason why there is none; ``wanted`` names the only ones."""
    device = str(given.x.device)
    makers: dict[str, Callable[[], Peer]] = {BASELINE: lambda: eager(case, dtype, device)}
    if differs_out_of_place(case):
        makers[f"{BASELINE} out of place"] = lambda: eager(case, dtype, device, in_place=False)
    if AGAIN in wanted:
        makers[AGAIN] = lambda: replace(eager(case, dtype, device), name=AGAIN)
    makers["torch.compile"] = lambda: compiled(case, dtype, device)
    makers["normkit"] = lambda: ours(case, dtype, given)
    for backend in BACKENDS:
        if backend != "reference":  # the oracle: parity is measured against it
            makers[f"normkit:{backend}"] = lambda backend=backend: ours(case, dtype, given, backend)  # type: ignore[misc]
    chosen: str | None = None
    for name, make in makers.items():
        if name != BASELINE and wanted and name not in wanted:
            continue
        try:
            peer = make()
        except RuntimeError as refusal:
            yield name, str(refusal)
            continue
        if name == "normkit":
            chosen = peer.backend
        elif name == f"normkit:{chosen}":
            continue  # dispatch has chosen it: the same program twice
        yield peer


def all_names() -> list[str]:
    """What ``--implementation`` may name."""
    return [
        BASELINE,
        f"{BASELINE} out of place",
        AGAIN,
        "torch.compile",
        "normkit",
        *(f"normkit:{b}" for b in BACKENDS if b != "reference"),
    ]


def _twin(case: Case, own: nn.Module) -> nn.Module:
    """torch's layer of the same norm."""
    weight = next(own.parameters())
    where: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    match case.spec.name:
        case "dyt":
            return _DynamicTanh(case, where)
        case "layer_norm" | "rms_norm" if not case.features_last:
            return _OverChannels(case, where)
        case "instance_norm":
            where["affine"] = True
    kind = getattr(nn, (case.spec.twin or "").rpartition(".")[2].format(dim=case.dim))
    groups = [int(case.norm.partition(":")[2])] if case.spec.name == "group_norm" else []
    return kind(*groups, case.channels, eps=EPS, **where).train()


class _OverChannels(nn.Module):
    """Permute, normalise, permute back: what people write for images; the result keeps the permuted strides."""

    def __init__(self, case: Case, where: dict[str, Any]) -> None:
        super().__init__()
        self.kind = case.spec.name
        self.weight = nn.Parameter(torch.empty(case.channels, **where))
        self.bias = nn.Parameter(torch.empty(case.channels, **where)) if self.kind == "layer_norm" else None

    def forward(self, x: Tensor) -> Tensor:
        rows, shape = x.movedim(1, -1), (x.shape[1],)
        if self.bias is not None:
            y = F.layer_norm(rows, shape, self.weight, self.bias, EPS)
        else:
            y = F.rms_norm(rows, shape, self.weight, EPS)
        return y.movedim(-1, 1)


class _DynamicTanh(nn.Module):
    """The three operators of the paper's own code."""

    def __init__(self, case: Case, where: dict[str, Any]) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, **where))
        self.weight = nn.Parameter(torch.empty(case.channels, **where))
        self.bias = nn.Parameter(torch.empty(case.channels, **where))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias
