"""What follows the affine step inside one layer: a residual is added, then an activation is applied.

The meaning is that of the three steps written by hand, in this order; a kernel may do them in one pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}

_PLAIN = (Tensor, nn.Parameter)
Activation = str | Callable[[Tensor], Tensor] | None


def activation_module(activation: Activation | type[nn.Module]) -> nn.Module | None:
    """The child module of a layer for its ``activation=``: a name, a module, a module class, or ``None``.

    A child module leaves a trace when a foreign tool replaces the layer, and shows in ``repr``.

    Raises:
        ValueError: an unknown name.
        TypeError: not something that can be a child module.
    """
    if activation is None or isinstance(activation, nn.Module):
        return activation
    if isinstance(activation, str):
        return ACTIVATIONS[_name(activation)]()
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation()
    raise TypeError(
        f"activation={activation!r} is neither a name nor a module.\n"
        f"  choose from: {', '.join(ACTIVATIONS)}, None, a torch.nn.Module or its class"
    )


def apply(y: Tensor, residual: Tensor | None, activation: Activation, *, fresh: bool = False) -> Tensor:
    """``activation(y + residual)``, each step only where asked for.

    ``fresh``: nobody else holds ``y`` or needs it for a backward pass, so the sum and a ReLU may be written over it, as
    people do who write the steps by hand.
    """
    if residual is not None:
        plain = type(residual) in _PLAIN and residual.dtype == y.dtype
        y = y.add_(residual) if fresh and plain else y + residual
    if activation is None:
        return y
    if fresh and (_is_plain_relu(activation) if type(activation) is nn.ReLU else activation == "relu"):
        return torch.relu_(y)
    if isinstance(activation, str):
        return _FUNCTIONS[_name(activation)](y)
    return activation(y)


def _is_plain_relu(activation: nn.ReLU) -> bool:
    return not (activation._forward_hooks or activation._forward_pre_hooks or activation._backward_hooks)


def fusible(activation: Activation) -> tuple[str | None, float]:
    """What a kernel is told: a name it may know, and the slope of a leaky ReLU. ``"module"``: call it separately."""
    match activation:
        case None:
            return None, 0.0
        case str():
            return _name(activation), 0.01
        case nn.Module() if activation._forward_hooks or activation._forward_pre_hooks or activation._backward_hooks:
            return "module", 0.0
    module: Any = activation
    match type(module):  # exactly: a subclass may compute something else
        case nn.ReLU:
            return "relu", 0.0
        case nn.LeakyReLU:
            return "leaky_relu", module.negative_slope
        case nn.SiLU:
            return "silu", 0.0
        case nn.GELU:
            return ("gelu_tanh" if module.approximate == "tanh" else "gelu"), 0.0
    return "module", 0.0


def undoing(activation: Activation) -> float:
    """What undoes an activation: the slope of a leaky ReLU; 0 where there is none.

    Raises:
        ValueError: it cannot be undone.
    """
    name, slope = fusible(activation)
    if name is None or (name == "leaky_relu" and slope > 0):
        return slope
    what = f"a leaky ReLU of slope {slope:g}" if name == "leaky_relu" else repr(activation)
    raise ValueError(
        f'save="output" finds the input of a norm again from its output, and {what} cannot be undone.\n'
        '  choose activation="leaky_relu" with a slope above 0, no activation, or save="input"'
    )


def _name(activation: str) -> str:
    if activation in ACTIVATIONS:
        return activation
    near = difflib.get_close_matches(activation.lower(), ACTIVATIONS, n=1, cutoff=0.5)
    suggestion = f"  did you mean {near[0]!r}?\n" if near else ""
    raise ValueError(
        f"there is no activation named {activation!r}.\n{suggestion}"
        f"  choose from: {', '.join(ACTIVATIONS)}, None, or give a torch.nn.Module"
    )
