"""Adaptive gradient clipping: the gradient of a unit is held below a part of the size of its own weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle


@torch.no_grad()
def clip_grad_adaptive_(parameters: Tensor | Iterable[Tensor], clip: float = 0.01, eps: float = 1e-3) -> Tensor:
    """Scale down, in place, the gradient of every unit that is too large beside its weights.

    ``gradient *= min(1, clip * max(|weight|, eps) / |gradient|)`` with the 2-norms of one unit: of one slice along the
    first axis of a matrix or a kernel (all that leads to one output), and of all of a vector or a number.

    Args:
        parameters: those without a gradient are left out. The paper leaves the last linear layer out too.
        clip: the largest ratio of gradient and weight; smaller for larger batches.
        eps: the least size of a unit, so that zero weights can move.

    Returns:
        Which part of all units was scaled down, a number between 0 and 1, (); nothing waits for the device.

    Raises:
        ValueError: ``clip`` or ``eps`` not above 0; a sparse gradient.

    >>> import torch, normkit as nk
    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> weight.grad = torch.tensor([[3.0, 4.0], [0.0, 0.001]])
    >>> nk.clip_grad_adaptive_(weight).item()
    0.5
    >>> weight.grad.norm(dim=1).tolist()
    [0.05000000074505806, 0.0010000000474974513]

    Do not use it with norms throughout a network: a norm makes the size of the weights in front of it meaningless, and
    clips by itself.

    Source: Brock, De, Smith & Simonyan 2021, arXiv:2102.06171.
    """
    if not (clip > 0 and eps > 0):
        raise ValueError(f"clip_grad_adaptive_: clip={clip} and eps={eps}; both must be above 0")
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    held = [parameter for parameter in given if parameter.grad is not None]
    if not held:
        return torch.zeros(())
    if any(parameter.grad.is_sparse for parameter in held):  # type: ignore[union-attr]
        raise ValueError(
            "clip_grad_adaptive_: a gradient is sparse, and its units cannot be told apart.\n"
            "  leave that parameter out, or make its embedding with sparse=False"
        )
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in held:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    clipped = [_clip(group, clip, eps) for group in groups.values()]
    units = sum(_units(parameter) for parameter in held)
    return torch.stack([part.to(clipped[0].device) for part in clipped]).sum() / units


def _clip(parameters: list[Tensor], clip: float, eps: float) -> Tensor:
    """All of one device and type at once; how many units were scaled down."""
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    factors = torch._foreach_maximum(_sizes(parameters), eps)
    torch._foreach_mul_(factors, clip)
    torch._foreach_div_(factors, _sizes(gradients))  # a gradient of 0: infinity, of which 1 remains
    torch._foreach_minimum_(factors, 1.0)
    torch._foreach_mul_(gradients, [factor.to(g.dtype) for factor, g in zip(factors, gradients, strict=True)])
    return torch.stack([(factor < 1).sum() for factor in factors]).sum()


def _sizes(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of every unit, in float32 or better, as it broadcasts against its tensor."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    axes = [tuple(range(1, t.dim())) or tuple(range(t.dim())) for t in tensors]
    return [
        torch.linalg.vector_norm(t, dim=axis or None, keepdim=bool(axis), dtype=dtype)
        for t, axis, dtype in zip(tensors, axes, wide, strict=True)
    ]


def _units(parameter: Tensor) -> int:
    return parameter.shape[0] if parameter.dim() > 1 else 1


def clip_adaptively_before_steps(
    optimizer: Optimizer, clip: float = 0.01, eps: float = 1e-3, *, skip: Iterable[Tensor] = ()
) -> RemovableHandle:
    """From now on call :func:`clip_grad_adaptive_` before every step of an optimizer, whichever it is.

    Args:
        optimizer: any of torch's interface.
        clip: see :func:`clip_grad_adaptive_`; a parameter group may have its own, under the key ``"clip"``, and
            ``None`` there leaves the group out.
        eps: see :func:`clip_grad_adaptive_`.
        skip: parameters that are left out, as those of the last linear layer.

    Returns:
        A handle, whose ``remove()`` ends it.

    >>> import torch, normkit as nk
    >>> head = torch.nn.Linear(8, 2)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    >>> handle = nk.clip_adaptively_before_steps(optimizer, clip=0.02)
    >>> head(torch.randn(4, 8)).sum().backward()
    >>> optimizer.step()
    >>> handle.remove()

    Do not use it where gradients are scaled at the time of the step (``torch.amp.GradScaler`` without ``unscale_``).

    Source: Brock, De, Smith & Simonyan 2021, arXiv:2102.06171.
    """
    left_out = {id(parameter) for parameter in skip}

    def clip_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            limit = group.get("clip", clip)
            if limit is not None:
                clip_grad_adaptive_([p for p in group["params"] if id(p) not in left_out], limit, eps)

    return optimizer.register_step_pre_hook(clip_all)
