"""One call of a batch norm, and the ways in which a policy may carry it out.

``by_batch`` is plain batch norm, on the fused kernels. ``by_given`` normalises by statistics that are constants.
``pooled`` measures units, merges them as a :class:`~normkit.statistics.pooling.Pooling` says, and normalises each unit
by the result: on the phases of the kernels where these run, otherwise in torch's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from normkit import epilogue
from normkit.call import Call
from normkit.dispatch import normalize, phases
from normkit.moments import Moments
from normkit.norm import unambiguous
from normkit.statistics.buffers import Kept, as_statistics
from normkit.statistics.pooling import Pooling, Whole
from normkit.vocabulary.spec import Spec

Correction = Callable[[Moments], tuple[Tensor, Tensor]]
"""Merged moments -> factor and offset of the normalised value, both (c,), both constants for the gradient."""


def normalise(
    spec: Spec,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    by_batch: bool,
    momentum: float,
    eps: float,
    **details: Any,
) -> Tensor:
    """Batch norm by the batch (the running statistics move in place) or by the running statistics, on any backend."""
    weight, bias = as_statistics(running_mean, weight, bias)

    def by_torch() -> Tensor:
        mean, var = running_mean, running_var
        if not by_batch and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The backward pass reads them again, and a training step in between moves the originals.
            mean, var = (kept if kept is None else kept.clone() for kept in (mean, var))
        watched = torch.compiler.is_compiling() or has_torch_function_variadic(x, mean, var, weight, bias)
        if watched or not by_batch or eps <= 0 or x.numel() <= x.shape[1]:
            return unambiguous(F.batch_norm(x, mean, var, weight, bias, by_batch, momentum, eps=eps))
        # The same without its checks in Python, which take as long as all that is ours around it.
        cudnn = torch._C._get_cudnn_enabled()
        return unambiguous(torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, cudnn))

    return normalize(
        spec,
        x,
        weight,
        bias,
        by_torch=by_torch,
        running_mean=running_mean,
        running_var=running_var,
        batch_statistics=by_batch,
        momentum=momentum,
        eps=eps,
        **details,
    )


def train(
    spec: Spec, x: Tensor, kept: Kept, weight: Tensor | None, bias: Tensor | None, eps: float, **details: Any
) -> Tensor:
    """Normalise by the batch, then let its moments into the running statistics.

    The operator works on clones: a recomputing forward must save the same tensors as the first one, whether or not the
    statistics move afterwards.
    """
    momentum, share = kept.pace(lambda: values_per_channel(x))
    mean, var = copies(kept.mean, kept.var)
    y = normalise(spec, x, mean, var, weight, bias, by_batch=True, momentum=momentum, eps=eps, **details)
    if kept.also is not None and kept.pending is None and kept.momentum is not None and values_per_channel(x) > 1:
        kept.approach(mean, var)
    elif (kept.pending is not None or kept.also is not None) and not kept.still:
        count = values_per_channel(x)
        total = torch.full((), count, dtype=torch.float64, device=x.device)
        kept.observe(Moments(total, mean, var * max(count - 1, 0)))
    else:
        kept.commit((mean, var), share=share, count=values_per_channel(x) if kept.momentum is None else None)
    return y


def copies(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """On a GPU both by one launch: a small one takes longer than its work."""
    if mean.is_cuda and mean.dtype == var.dtype:
        both = torch.stack([mean, var])
        return both[0], both[1]
    return mean.clone(), var.clone()


def values_per_channel(x: Tensor) -> int:
    """How many values of (n, c, s...) share one mean."""
    return x.shape[0] * x.shape[2:].numel()


@dataclass(slots=True)
class Application:
    """One call of a layer."""

    layer: Any
    x: Tensor
    """(n, c, s...); 0 where the mask says that nothing counts."""
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None = None
    """Broadcasts against ``x``; True where an element counts."""
    residual: Tensor | None = None
    step: int | None = None
    """Of a recurrent network."""
    kept: Kept | None = None
    """Where the statistics of this batch go; ``None``: the layer keeps none."""

    @property
    def details(self) -> dict[str, Any]:
        """What follows the affine step, and the backend that was asked for."""
        return {"residual": self.residual, "activation": self.layer.activation, "backend": self.layer.backend}

    def by_batch(self) -> Tensor:
        """Plain batch norm; the batch's moments enter the running statistics."""
        if self.mask is not None:
            return self.pooled(Whole())
        spec, eps = self.layer.spec, self.layer.eps
        if self.kept is None:
            return normalise(
                spec, self.x, None, None, self.weight, self.bias, by_batch=True, momentum=0.0, eps=eps, **self.details
            )
        return train(spec, self.x, self.kept, self.weight, self.bias, eps, **self.details)

    def by_given(self, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise by these, (c,) each, as if they were constants; nothing enters the running statistics."""
        spec, eps = self.layer.spec, self.layer.eps
        y = normalise(
            spec, self.x, mean, var, self.weight, self.bias, by_batch=False, momentum=0.0, eps=eps, **self.details
        )
        return self.masked(y)

    def observe(self) -> None:
        """Let the moments of the batch into the running statistics."""
        if self.kept is not None and not self.kept.still:
            with torch.no_grad():
                self.kept.observe(self.measure())

    def measure(self, *, per_sample: bool = False) -> Moments:
        """The moments of every channel, (c,), or of every channel of every sample, (n, c). Differentiable."""
        axes = tuple(axis for axis in range(self.x.dim()) if axis != 1 and not (per_sample and axis == 0))
        if not axes:  # one value each
            wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
            return Moments(self._counts(wide), wide, wide * 0)
        return Moments.measure(self.x, axes, self.mask)

    def _counts(self, wide: Tensor) -> Tensor:
        if self.mask is None:
            return torch.ones((), dtype=torch.float64, device=wide.device)
        return self.mask.expand_as(wide).double()

    def pooled(self, pooling: Pooling, *, correct: Correction | None = None) -> Tensor:
        """Normalise every unit by the merged moments; they enter the running statistics."""
        if type(pooling) is Whole:
            refuse_single(self)
        run = phases(self._call(per_sample=pooling.per_sample), self.layer.backend)
        y, observed = self.composite(pooling, correct) if run is None else run(self, pooling, correct)
        if self.kept is not None:
            self.kept.observe(observed)
        return self.masked(y)

    def by_moments(self, mean: Tensor, var: Tensor, *, observed: Moments | None) -> Tensor:
        """Normalise by these, (c,) or (n, c), which the gradient passes through; ``observed`` enters the running ones.

        In torch's operators, under torch's autograd: for statistics that no kernel has.
        """
        phases(self._call(per_sample=mean.dim() == 2, composite=True), self.layer.backend)  # it may refuse
        y = epilogue.apply(self.affine(mean, var).to(self.x.dtype), self.residual, self.layer.activation)
        if self.kept is not None and observed is not None:
            self.kept.observe(observed)
        return self.masked(y)

    def centred(self, mean: Tensor) -> Tensor:
        """The input less the mean, (c,), in float32 or better; 0 where nothing counts."""
        wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        return self.masked(wide - mean.to(wide.dtype).reshape(1, -1, *[1] * (wide.dim() - 2)))

    def composite(
        self, pooling: Pooling, correct: Correction | None = None, *, fused: bool = True
    ) -> tuple[Tensor, Moments]:
        """The same in torch's operators, under torch's autograd; ``fused``: with what follows the affine step."""
        own = self.measure(per_sample=pooling.per_sample)
        merged = pooling.merge(own)
        z = self.affine(merged.mean, merged.m2 / merged.count.clamp(min=1), correct and correct(merged))
        y = z.to(self.x.dtype)
        if fused:
            y = epilogue.apply(y, self.residual, self.layer.activation)
        with torch.no_grad():
            return y, pooling.observed(own, merged)

    def affine(self, mean: Tensor, var: Tensor, correction: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``(x - mean) / sqrt(var + eps)``, corrected, scaled and shifted; (c,) or (n, c) each; float32 or better."""
        wide = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        spread = lambda t: t.to(wide.dtype).reshape(*(t.shape if t.dim() == 2 else (1, -1)), *[1] * (wide.dim() - 2))
        z = (wide - spread(mean)) * spread(torch.rsqrt(var + self.layer.eps))
        if correction is not None:
            factor, offset = correction
            z = z * spread(factor) + spread(offset)
        if self.weight is not None:
            z = z * spread(self.weight)
        if self.bias is not None:
            z = z + spread(self.bias)
        return self.masked(z)  # before float16 and an activation make infinity and NaN of what is far off

    def masked(self, y: Tensor) -> Tensor:
        """0 where nothing counts: so no gradient comes in there either."""
        return y if self.mask is None else torch.where(self.mask, y, 0)

    def _call(self, *, per_sample: bool, composite: bool = False) -> Any:
        return Call(
            self.layer.spec,
            self.x,
            self.weight,
            self.bias,
            by_torch=lambda: self.x,  # nobody runs it: see phases
            eps=self.layer.eps,
            composite=composite,
            over="n c [s...]" if per_sample else None,
            residual=self.residual,
            activation=self.layer.activation,
            merged=True,
        )


def refuse_misfit(layer: Any, x: Tensor) -> None:
    """What torch's operator refuses, the arithmetic of policies would broadcast or round in silence."""
    name = type(layer).__name__
    if not x.is_floating_point():
        raise RuntimeError(f"{name}: the input is of the type {x.dtype}; it must be a floating-point one.\n  x.float()")
    own = next((t for t in (layer.running_mean, layer.weight, layer.bias) if t is not None), None)
    if own is None:
        return
    if x.shape[1] != len(own):
        raise RuntimeError(
            f"{name}: the input has {x.shape[1]} channels, the layer {len(own)}.\n  input {tuple(x.shape)}; channels "
            "are its second axis"
        )
    if x.dtype != own.dtype and torch.promote_types(x.dtype, own.dtype) != torch.promote_types(
        own.dtype, torch.float32
    ):
        raise RuntimeError(
            f"{name}: mixed types: the input is of {x.dtype}, the layer's numbers of {own.dtype}.\n  cast one of them: "
            "x.to(layer.weight.dtype), or layer.double()"
        )


def refuse_single(call: Application) -> None:
    """One value per channel has no deviation: refused in torch's words, as plain batch norm does."""
    if call.mask is None and values_per_channel(call.x) == 1 and call.layer.training:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {call.x.shape}")
