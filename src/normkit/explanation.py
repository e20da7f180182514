"""Explanation: which backend runs a norm on an input, and why the others do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from normkit import dispatch
from normkit.call import Call
from normkit.vocabulary.problem import Problem


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a norm on an input, and why the others do not."""

    norm: str
    backend: str
    reasons: dict[str, list[str]]
    """By backend that does not run."""
    problem: Problem | None

    def __str__(self) -> str:
        lines = [f"{self.norm}: the {self.backend} backend runs."]
        if self.problem is not None:
            p = self.problem
            where = " x ".join(map(str, p.shape))
            lines.append(
                f"  input {where} {p.dtype} on {p.device}; {p.statistics:,} statistics over {p.values:,} values each"
            )
            lines.append(f"  least memory traffic of the forward pass: {p.bytes_moved / 1e6:,.2f} MB")
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def explain(norm: nn.Module, x: Tensor, **further: Any) -> Explanation:
    """Say which backend would run ``norm`` on ``x``, and why the others would not.

    The layer is applied once to find out; its running statistics and the random state stay as they are.

    Args:
        norm: a normkit layer.
        x: its input.
        further: what else its ``forward`` takes: ``residual=``, ``mask=``, ``lengths=``, ``step=``.

    >>> import torch, normkit as nk
    >>> print(nk.explain(nk.GroupNorm(32, 64), torch.randn(8, 64, 56, 56)))  # doctest: +ELLIPSIS
    group_norm: the ... backend runs.
    ...

    Raises:
        TypeError: ``norm`` is not a normkit layer.
    """
    call = recorded(norm, x, **further)
    asked = dispatch.asked(getattr(norm, "backend", None))
    chosen = dispatch.choose(call, asked)
    reasons = {
        other.name: other.reasons_against(call)
        or (other.reluctance(call) if asked == "auto" else [])
        or [_not_taken(asked, chosen)]
        for other in dispatch.BACKENDS.values()
        if other is not chosen
    }
    return Explanation(call.spec.name, chosen.name, reasons, call.problem())


def _not_taken(asked: str, chosen: dispatch.Backend) -> str:
    return f"{chosen.name} goes before it" if asked == "auto" else f"{asked} was asked for by name"


def recorded(norm: nn.Module, x: Tensor, **further: Any) -> Call:
    """The call that ``norm`` makes for ``x``; nothing is computed and nothing is committed.

    Raises:
        TypeError: ``norm`` is not a normkit layer.
    """
    if not hasattr(norm, "spec"):
        raise TypeError(
            f"explain: {type(norm).__module__}.{type(norm).__qualname__} is not a normkit layer.\n"
            "  make one with nk.create(...), or use the class of the same name in normkit"
        )
    with dispatch.recording() as calls:
        norm.forward(x, **{name: value for name, value in further.items() if value is not None})
    return calls[0]
