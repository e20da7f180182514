"""Virtual: normalise by a reference batch that runs through the network together with the batch (Salimans et al.)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normkit.moments import Moments
from normkit.statistics.application import Application
from normkit.statistics.policy import Policy


@dataclass(frozen=True)
class Virtual(Policy):
    """Normalise each sample by the moments of a reference batch merged with its own, so that samples of one batch do
    not influence each other.

    The reference batch is chosen once; :func:`normkit.reference_batch` runs it through the network in the same forward
    pass, so that every layer sees what the layers below make of it with the weights of now. With the reference's
    moments over (r, s...) and the sample's over (s...), both with their counts::

        mean, var = merged(reference, sample)          # as if the sample were one more of the reference batch
        y = (x - mean) / sqrt(var + eps)

    The reference batch itself is normalised by its own moments. Gradients pass through all of it. The reference's
    moments enter the running statistics, which normalise in evaluation outside of ``reference_batch``.

    Raises:
        ValueError: training outside of ``normkit.reference_batch``; a reference batch with one value per channel.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(1, eps=1e-12, statistics=nk.statistics.Virtual())
    >>> with nk.reference_batch(bn, torch.tensor([[0.0], [0.0], [2.0]])):
    ...     y = bn(torch.tensor([[2.0], [50.0]]))
    >>> round(y[0].item(), 6)                                    # of 0, 0, 2 and itself: mean 1, deviation 1
    1.0

    When not to use it: where twice the work per step is too much; for recognition, where the noise of plain batches
    helps. It was made for generators.

    Source: Salimans, Goodfellow, Zaremba, Cheung, Radford & Chen 2016, arXiv:1606.03498, section 3.5.
    """

    def train(self, call: Application) -> Tensor:
        rows = call.layer.hold.reference
        if not rows:
            raise ValueError(
                f"{type(call.layer).__name__}: statistics={self!r} in training, and there is no reference batch.\n"
                "  call the model inside `with normkit.reference_batch(model, x_ref):`; where activations are "
                "checkpointed, run the backward pass inside it too"
            )
        return self.by_reference(call, rows, observe=True)

    def evaluate(self, call: Application) -> Tensor:
        rows = call.layer.hold.reference
        return self.by_reference(call, rows, observe=False) if rows else super().evaluate(call)

    def by_reference(self, call: Application, rows: int, *, observe: bool) -> Tensor:
        """The output, of the reference too; ``rows``: how many samples at the head are the reference."""
        own = call.measure(per_sample=True)
        own = Moments(own.count.expand(own.mean.shape), own.mean, own.m2)  # (n, c) each
        head, rest = (Moments(*(t[part] for t in (own.count, own.mean, own.m2))) for part in _split(rows))
        reference = head.together()
        values = rows * call.x.shape[2:].numel()
        if values < 2:
            raise ValueError(
                f"{type(call.layer).__name__}: the reference batch has {values} value per channel, which has no "
                "deviation.\n  give reference_batch more samples"
            )
        merged = reference.merge(rest)
        variance = lambda m: m.m2 / m.count.clamp(min=1).to(m.m2.dtype)
        of_each = lambda whole, each: torch.cat([whole.expand_as(head.mean), each])
        mean, var = of_each(reference.mean, merged.mean), of_each(variance(reference), variance(merged))
        return call.by_moments(mean, var, observed=reference if observe else None)


@contextlib.contextmanager
def reference_batch(model: nn.Module, x_ref: Tensor | tuple[Tensor, ...]) -> Iterator[None]:
    """Inside the ``with``, ``model(x)`` runs ``x_ref`` together with ``x``, and returns what it returns for ``x``.

    The reference batch stands before ``x`` along the first axis; layers with ``statistics=Virtual()`` normalise by it,
    and it is cut off every tensor that the model returns. All other layers see a batch of both. In evaluation as well
    the reference batch normalises; without the ``with`` the running statistics do.

    Args:
        model: with one such layer at least, or one such layer itself.
        x_ref: (r, ...), as ``x`` but for the number of samples; for a model of several positional inputs, a tuple.

    Raises:
        ValueError: no such layer; a reference that does not fit the input; an output without the batch as first axis.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), nk.BatchNorm1d(8, statistics=nk.statistics.Virtual()))
    >>> with nk.reference_batch(model, torch.randn(16, 4)):
    ...     model(torch.randn(3, 4)).shape
    torch.Size([3, 8])
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "statistics", None), Virtual)]
    if not layers:
        raise ValueError(
            f"reference_batch: {type(model).__name__} has no layer that would use it.\n"
            "  build its batch norms with statistics=normkit.statistics.Virtual()"
        )
    references = x_ref if isinstance(x_ref, tuple) else (x_ref,)
    rows = len(references[0])
    if not rows or any(len(reference) != rows for reference in references):
        raise ValueError(
            f"reference_batch: references of {', '.join(str(len(r)) for r in references)} samples.\n"
            "  give one sample at least, and as many of every input"
        )

    def join(_: nn.Module, inputs: tuple) -> tuple:
        if len(inputs) < len(references):
            raise ValueError(
                f"reference_batch: {len(references)} references, and the model was given {len(inputs)} positional "
                "inputs.\n  pass what has a reference by position"
            )
        joined = [_joined(reference, x) for reference, x in zip(references, inputs, strict=False)]
        return (*joined, *inputs[len(joined) :])

    def cut(_: nn.Module, inputs: tuple, outputs: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda y: _cut(y, rows, len(inputs[0])), outputs)

    before = [layer.hold.reference for layer in layers]
    hooks = [model.register_forward_pre_hook(join), model.register_forward_hook(cut, prepend=True)]
    for layer in layers:
        layer.hold.reference = rows
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.hold.reference = was
        for hook in hooks:
            hook.remove()


def _joined(reference: Tensor, x: Tensor) -> Tensor:
    if reference.shape[1:] != x.shape[1:] or reference.dtype != x.dtype or reference.device != x.device:
        told = lambda t: f"{tuple(t.shape)} {t.dtype} on {t.device}"
        raise ValueError(
            f"reference_batch: the reference is {told(reference)}, the input {told(x)}.\n"
            "  they may differ in the number of samples alone"
        )
    return torch.cat([reference, x])


def _cut(y: Tensor, rows: int, total: int) -> Tensor:
    if not y.dim() or len(y) != total:
        raise ValueError(
            f"reference_batch: the model returned a tensor of the shape {tuple(y.shape)} for {rows} + {total - rows} "
            "samples; the reference cannot be cut off it.\n  let the model return one row per sample; reduce outside"
        )
    return y[rows:]


def _split(rows: int) -> tuple[slice, slice]:
    return slice(None, rows), slice(rows, None)
