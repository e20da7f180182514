"""``nk.param_groups``: what weight decay should take, and what it should leave alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from normkit.surgery.recast import is_called_a_norm, is_norm

Filter = Callable[[str, nn.Parameter], bool]


def param_groups(
    model: nn.Module, weight_decay: float = 0.01, *, no_decay: Filter | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: weights, which decay, and norms and biases, which do not.

    Decay pulls towards 0; for the scale of a norm 0 is no neutral value, and a bias has nothing to overfit with. What
    belongs to a norm is told by the layer and not by its name or its shape: every parameter of torch's and normkit's
    norms (``alpha`` of DyT too), recast, converted or parametrized as they may be; of layers of others whose class is
    called a norm (``LlamaRMSNorm``, ``LayerNorm2d``), the parameters of one axis; and every bias.

    Args:
        model: any module, wrapped as it may be.
        weight_decay: of the first group.
        no_decay: ``(name, parameter) -> bool``: what shall not decay either, as position embeddings.
        options: of both groups (``lr=0.1`` ...).

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``, every parameter
        of the model once, in the order of ``model.parameters()``, frozen ones too. A parameter with several names
        decays only if it is a weight under each. A group without parameters is left out.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nk.LayerNorm(8), nk.DyT(8))
    >>> optimizer = torch.optim.AdamW(nk.param_groups(model, weight_decay=0.1), lr=1e-3)
    >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    [(0.1, 1), (0.0, 6)]

    When not to use it: where the weights before a norm have no scale of their own and decay only sets their effective
    learning rate, which may be what you are after; it is still given to them.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101, on decay; van Laarhoven 2017, arXiv:1706.05350, on norms.
    """
    spared = {
        id(parameter)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in _own(module)
        if _is_bias(name, prefix) or _of_a_norm(module, parameter)
    }
    if no_decay is not None:
        spared |= {id(p) for name, p in model.named_parameters(remove_duplicate=False) if no_decay(name, p)}
    kept = [parameter for parameter in model.parameters() if id(parameter) not in spared]
    left = [parameter for parameter in model.parameters() if id(parameter) in spared]
    groups = ({"params": kept, "weight_decay": weight_decay}, {"params": left, "weight_decay": 0.0})
    return [{**group, **options} for group in groups if group["params"]]


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Of a norm everything inside, as the scale that a parametrization keeps or an activation learns."""
    return list(module.named_parameters(recurse=is_norm(module), remove_duplicate=False))


def _is_bias(name: str, prefix: str) -> bool:
    """``bias`` of a layer, ``bias_hh`` of a recurrent one, ``in_proj_bias``; and a bias under a parametrization."""
    return re.search(r"(?:^|[._])bias(?:$|_)", name) is not None or prefix.endswith("parametrizations.bias")


def _of_a_norm(module: nn.Module, parameter: nn.Parameter) -> bool:
    return is_norm(module) or (is_called_a_norm(module) and parameter.dim() <= 1)
