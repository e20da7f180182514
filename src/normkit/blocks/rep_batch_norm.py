"""Batch norm beside its input, which folds away, and the way to it from layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normkit.dispatch import may_be_read
from normkit.norms.batch_norm import BatchNorm1d
from normkit.norms.layer_norm import LayerNorm
from normkit.norms.rms_norm import RMSNorm
from normkit.statistics.recomputing import recomputing


class RepBatchNorm(nn.Module):
    """``y = batch_norm(x) + skip * x``, with one learned ``skip``: in evaluation a scale and a shift of each channel.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics.
        skip: where the learned number starts.
        device: of parameters and buffers.
        dtype: of the parameters.

    Shapes: input and output (..., c), as (n, t, c) or (n * t, c): every token is a row. ``forward(input, *,
    mask=None)``: (...), True where a token counts.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(nk.blocks.RepBatchNorm(8), torch.nn.Linear(8, 4)).eval()
    >>> folded = nk.fold(model, torch.randn(5, 8))
    >>> x = torch.randn(5, 8)
    >>> bool((folded(x) - model(x)).abs().max() < 1e-5)
    True

    When not to use it: from the start in a Transformer, where batch norm may not train at all: see
    :class:`ProgressiveRepBatchNorm`.

    Source: Guo, Chen, Tang & Wang 2024, arXiv:2405.11582.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        skip: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = BatchNorm1d(num_features, eps, momentum, device=device, dtype=dtype)
        self.skip = nn.Parameter(torch.full((1,), skip, device=device, dtype=dtype))

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(..., c) -> (..., c)."""
        rows, keep = _rows(input, mask)
        kept = rows if keep is None else torch.where(keep[:, None], rows, 0)
        return (self.norm(rows, mask=keep) + self.skip * kept).view(input.shape)


class ProgressiveRepBatchNorm(nn.Module):
    """``y = share * layer_norm(x) + (1 - share) * rep(x)``: from layer norm to :class:`RepBatchNorm` while training.

    ``share`` is 1 for the first ``warmup`` batches, then falls by ``1 / steps`` with each batch, to 0. Evaluation has
    the share that training has reached. At 0 the layer norm is not computed any more (on a
    GPU it is, because a look at the share would wait for it), and :func:`settle_` takes it out of the model, so that
    :func:`normkit.fold` can fold the rest.

    Args:
        num_features: channels.
        steps: batches in which the share falls from 1 to 0.
        warmup: batches with layer norm alone, in which the running statistics settle.
        eps: added to the variances.
        momentum: share of a batch in the running statistics.
        device: of parameters and buffers.
        dtype: of the parameters.

    Shapes: input and output (..., c), as (n, t, c) or (n * t, c): every token is a row. ``forward(input, *,
    mask=None)``: (...), True where a token counts.

    A checkpoint of a plain layer norm (``weight``, ``bias``) loads, and is where the way begins.

    >>> import torch, normkit as nk
    >>> norm = nk.blocks.ProgressiveRepBatchNorm(8, steps=4)
    >>> for _ in range(3):
    ...     y = norm(torch.randn(16, 8))
    >>> norm.share.item()
    0.25

    When not to use it: where inference need not be faster than with layer norm; it ends as a batch norm, which needs
    batches of many tokens.

    Source: Guo, Chen, Tang & Wang 2024, arXiv:2405.11582.
    """

    def __init__(
        self,
        num_features: int,
        steps: int,
        warmup: int = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or warmup < 0:
            raise ValueError(f"ProgressiveRepBatchNorm: steps={steps}, warmup={warmup}; give 1 or more, and 0 or more")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.steps, self.warmup = steps, warmup
        self.layer: LayerNorm | RMSNorm = LayerNorm(num_features, eps, **where)
        self.rep = RepBatchNorm(num_features, eps, momentum, **where)

    @property
    def share(self) -> Tensor:
        """Of the layer norm, (): in the next batch."""
        batches: Any = self.rep.norm.num_batches_tracked
        if torch.compiler.is_compiling():
            batches = batches.unsqueeze(0).cumsum(0).squeeze(0)  # no plain copy: see power_norm._as_it_is
        elif recomputing():  # activation checkpointing runs the last batch again
            batches = batches - 1
        return (1 - (batches - self.warmup) / self.steps).clamp(0, 1)

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(..., c) -> (..., c)."""
        share = self.share
        if may_be_read(share) and not share:
            return self.rep(input, mask=mask)
        rows, keep = _rows(input, mask)
        by_layer, by_batch = self.layer(rows, mask=keep), self.rep(rows, mask=keep)
        return torch.lerp(by_batch, by_layer.to(by_batch.dtype), share.to(by_batch.dtype)).view(input.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    state_dict[f"{prefix}layer.{name}"] = state_dict.pop(f"{prefix}{name}")
            state_dict.update(self.rep.state_dict(prefix=f"{prefix}rep."))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The schedule."""
        return f"steps={self.steps}, warmup={self.warmup}"


def _rows(input: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(rows, c), and (rows,) of the mask."""
    return input.flatten(0, -2), None if mask is None else mask.flatten()


def settle_(model: nn.Module) -> nn.Module:
    """Put the :class:`RepBatchNorm` into the place of every :class:`ProgressiveRepBatchNorm` that has got there.

    Args:
        model: changed in place, and returned (where it is such a norm itself: what takes its place).

    Raises:
        ValueError: a layer norm still has a share; nothing is changed.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(nk.blocks.ProgressiveRepBatchNorm(8, steps=1), torch.nn.Linear(8, 4))
    >>> y = model(torch.randn(16, 8))
    >>> type(nk.blocks.settle_(model)[0]).__name__
    'RepBatchNorm'
    """
    found = {
        name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, ProgressiveRepBatchNorm)
    }
    early = {name: float(norm.share) for name, norm in found.items() if norm.share}
    if early:
        listed = ", ".join(f"{name or 'the model'} {share:.3g}" for name, share in early.items())
        raise ValueError(f"settle_: layer norm still has a share in {len(early)} places: {listed}.\n  train on first")
    for name, norm in found.items():
        if not name:
            return norm.rep
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, norm.rep.train(norm.training))
    return model
