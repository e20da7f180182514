"""Batch norm in two halves, for statistics that are merged in between: across ranks, ghost batches, masked samples.

One autograd function: measure units, let the caller merge their moments, normalise; in the backward pass sum per unit,
let the caller merge the sums, and compute the gradient of the input. The halves are those of the compiled kernels, or
the same arithmetic in torch's operators where these cannot run: both talk to the caller at the same moments, so that a
rank with an empty batch keeps step with the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normkit import epilogue
from normkit.kernels import native
from normkit.kernels.plan import Plan, alike
from normkit.moments import Moments

if TYPE_CHECKING:
    from normkit.call import Call


def watched() -> bool:
    """Somebody wants to see torch's operators: functorch, forward-mode, a compiler, a tracer."""
    return torch.compiler.is_compiling() or native._is_watched()


def halves_for(call: Call, reasons: list[str], backend: str = "native") -> Halves:
    """The halves of a backend's kernels where there is no reason against them, otherwise torch's."""
    per_sample = call.over is not None and call.over.startswith("n c")
    if backend == "triton" and not reasons:
        from normkit.kernels.triton_phases import TritonHalves

        return TritonHalves(per_sample, call.plan)
    if reasons or (per_sample and call.plan.work.shape == "columns"):  # whose sums per sample stay inside the kernel
        return TorchHalves(per_sample)
    return NativeHalves(per_sample, call.plan)


def run(halves: Halves, application: Any, pooling: Any, correct: Any) -> tuple[Tensor, Moments]:
    """The output, and the moments that enter the running statistics.

    ``application`` is one call of a layer, ``pooling`` says which units share; see :mod:`normkit.statistics`.
    """
    observed: list[Moments] = []
    given = (application.weight, application.bias, application.residual if halves.fuses else None)
    y = _Pooled.apply(application.x, *given, halves, application, pooling, correct, observed)
    if not halves.fuses:
        y = epilogue.apply(application.masked(y), application.residual, application.layer.activation)
    return y, observed[0]


@dataclass
class Units:
    """What the halves work with: one mean and one inverse deviation per unit, and the parameters in use."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Any,
        residual: Any,
        halves: Halves,
        application: Any,
        pooling: Any,
        correct: Any,
        observed: list[Moments],
    ) -> Tensor:
        own = halves.moments(x) if application.mask is None else application.measure(per_sample=halves.per_sample)
        merged = pooling.merge(own)
        observed.append(pooling.observed(own, merged))
        factor, offset = (None, None) if correct is None else correct(merged)
        number = torch.promote_types(x.dtype, torch.float32)
        rstd = torch.rsqrt(merged.m2.double() / merged.count.clamp(min=1) + application.layer.eps)
        units = Units(merged.mean.to(number), rstd.to(number), *_corrected(weight, bias, factor, offset))
        y, bits = halves.normalise(x, units, residual)
        gate = residual if halves.gate else None
        count = merged.count.expand(units.mean.shape)
        kept = (x, units.mean, units.rstd, count, bits, gate, weight, bias, factor, offset, application.mask)
        ctx.save_for_backward(*kept)
        ctx.halves, ctx.pooling = halves, pooling
        ctx.application = replace(application, x=None, residual=None, mask=None, weight=None, bias=None)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        if dy is None:
            return (None,) * 9
        if torch.is_grad_enabled() or native._is_watched():
            return (*_differentiable(ctx, dy), *[None] * 5)
        x, mean, rstd, count, bits, residual, weight, bias, factor, offset, _ = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        units = Units(mean, rstd, *_corrected(weight, bias, factor, offset))
        halves: Halves = ctx.halves
        x = halves.laid_out(x)
        sums, dweight, dbias = halves.sums(x, dy, residual, units, bits, need_weight or need_bias)
        merged = ctx.pooling.total(sums.double()) / count.clamp(min=1)
        dx, dresidual = halves.gradients(x, dy, residual, units, bits, merged, need_x, need_residual)
        if dweight is not None and factor is not None:
            dweight = dweight * factor + dbias * offset
        return (
            dx,
            None if not need_weight else dweight.to(weight.dtype),
            None if not need_bias else dbias.to(bias.dtype),
            dresidual,
            *[None] * 5,
        )


def _corrected(
    weight: Tensor | None, bias: Tensor | None, factor: Tensor | None, offset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``(hat * factor + offset) * weight + bias`` as one weight and one bias."""
    if factor is None or offset is None:
        return weight, bias
    if weight is not None:
        factor, offset = factor * weight, offset * weight
    return factor, offset if bias is None else offset + bias


def _differentiable(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The same gradients out of torch's operators, so that they can be differentiated again."""
    x, mean, rstd, _, bits, residual, weight, bias, factor, offset, mask = ctx.saved_tensors
    inputs = [x, weight, bias, residual]
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:4]) if need]
    halves: Halves = ctx.halves
    with torch.enable_grad():
        if 3 in wanted and residual is None:  # its gradient does not depend on it, but for what the bits say
            inputs[3] = torch.zeros_like(x).requires_grad_()
        again = replace(ctx.application, x=x, mask=mask, weight=weight, bias=bias, residual=inputs[3])
        correct = None if factor is None else lambda merged: (factor, offset)
        if bits is None:
            y = again.composite(ctx.pooling, correct, fused=halves.fuses)[0]
        else:
            z = again.composite(ctx.pooling, correct, fused=False)[0]
            z = z if inputs[3] is None else z + inputs[3]
            stats = torch.cat([mean.flatten(), rstd.flatten()])
            y = z * halves.signs(halves.laid_out(x), stats, bits)
        grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=True, allow_unused=True)
    out: list[Tensor | None] = [None] * 4
    for i, grad in zip(wanted, grads, strict=True):
        out[i] = grad
    return out


class Halves(ABC):
    """The four phases on units of (c,), or (n, c) per sample."""

    fuses = False
    """Residual and activation are part of it."""
    gate = False
    """The backward pass needs the residual."""

    def __init__(self, per_sample: bool) -> None:
        self.per_sample = per_sample

    def laid_out(self, x: Tensor) -> Tensor:
        """The saved input as the halves read it: hooks on saved tensors may have laid it out anew."""
        return x

    def signs(self, x: Tensor, stats: Tensor, bits: Tensor) -> Tensor:
        """1 where the value before a ReLU was above zero, else 0: for halves that keep bits."""
        raise NotImplementedError

    @abstractmethod
    def moments(self, x: Tensor) -> Moments:
        """Of every unit."""

    @abstractmethod
    def normalise(self, x: Tensor, units: Units, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output, and the bits of a ReLU where the backward pass needs them."""

    @abstractmethod
    def sums(self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, parameters: bool) -> tuple:
        """(2, units...): of dz and dz (x - mean); then the gradients of weight and bias, (c,).

        Per sample the compiled halves have the weight in the sums already: who merges them is one process.
        """

    @abstractmethod
    def gradients(
        self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, means: Tensor, need_x: bool, need_r: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of input and residual; ``means``: merged sums, divided by the merged counts."""


class TorchHalves(Halves):
    """In torch's operators; any input, the empty one too."""

    def moments(self, x: Tensor) -> Moments:
        axes = tuple(axis for axis in range(x.dim()) if axis != 1 and not (self.per_sample and axis == 0))
        if axes:
            return Moments.measure(x, axes)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return Moments(torch.ones((), dtype=torch.float64, device=x.device), wide, torch.zeros_like(wide))

    def normalise(self, x: Tensor, units: Units, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z = self._hat(x, units)
        if units.weight is not None:
            z = z * _spread(units.weight, x)
        if units.bias is not None:
            z = z + _spread(units.bias, x)
        return z.to(x.dtype), None

    def sums(self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, parameters: bool) -> tuple:
        dz, centred = dy.to(units.mean.dtype), x.to(units.mean.dtype) - _spread(units.mean, x)
        space = tuple(range(2, x.dim()))
        own = torch.stack([_sum(dz, space), _sum(dz * centred, space)])  # (2, n, c)
        dweight = (own[1] * units.rstd).sum(0) if parameters else None
        dbias = own[0].sum(0) if parameters else None
        if not self.per_sample:
            own = own.sum(1)
        return own, dweight, dbias

    def gradients(
        self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, means: Tensor, need_x: bool, need_r: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if not need_x:
            return None, None
        rstd, (of_dz, of_dz_x) = units.rstd, means.to(units.mean.dtype)
        centred = x.to(rstd.dtype) - _spread(units.mean, x)
        dhat = dy.to(rstd.dtype) - _spread(of_dz, x) - centred * _spread(rstd.square() * of_dz_x, x)
        scale = rstd if units.weight is None else rstd * units.weight
        return (dhat * _spread(scale, x)).to(x.dtype), None

    def _hat(self, x: Tensor, units: Units) -> Tensor:
        return (x.to(units.mean.dtype) - _spread(units.mean, x)) * _spread(units.rstd, x)


class NativeHalves(Halves):
    """On the compiled kernels, residual and activation included."""

    fuses = True

    def __init__(self, per_sample: bool, plan: Plan) -> None:
        super().__init__(per_sample)
        self.plan, self.gate = plan, plan.gate

    def laid_out(self, x: Tensor) -> Tensor:
        return alike(x, x, self.plan.strides)

    def signs(self, x: Tensor, stats: Tensor, bits: Tensor) -> Tensor:
        return native._signs(self.plan, x, stats, bits)

    def moments(self, x: Tensor) -> Moments:
        units = self.plan.statistics
        stats = torch.empty(2 * units, dtype=self.plan.number)
        var = torch.empty(units, dtype=self.plan.number)
        self.plan.kernel.moments(x.data_ptr(), stats.data_ptr(), var.data_ptr(), 1.0, torch.get_num_threads())
        shape = x.shape[:2] if self.per_sample else (units,)
        count = x.numel() // units
        mean, m2 = stats[:units].reshape(shape), (var * count).reshape(shape)
        return Moments(torch.tensor(float(count), dtype=torch.float64), mean, m2)

    def normalise(self, x: Tensor, units: Units, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = torch.empty_like(x)
        bits = torch.empty(self.plan.bits, dtype=torch.uint8) if self.plan.bits else None
        added = None if residual is None else alike(residual, x, self.plan.strides)
        weight, bias = self._parameters(units)
        stats = self._stats(units)
        self.plan.kernel.normalise(
            x.data_ptr(),
            native._address(added),
            native._address(weight),
            native._address(bias),
            y.data_ptr(),
            native._address(bits),
            stats.data_ptr(),
            torch.get_num_threads(),
        )
        return y, bits

    def sums(self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, parameters: bool) -> tuple:
        sums = torch.empty((2, *units.mean.shape), dtype=self.plan.number)
        own = [torch.empty(x.shape[1], dtype=self.plan.weight_type) if parameters else None for _ in range(2)]
        self._backward(x, dy, residual, units, bits, None, None, *own, sums, native._FIRST)
        return sums, *own

    def gradients(
        self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, means: Tensor, need_x: bool, need_r: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        through = need_r and self.plan.activation is not None
        dx = torch.empty_like(x) if need_x else None
        dresidual = torch.empty_like(x) if through else None
        if need_x or through:
            means = means.to(self.plan.number).contiguous()
            self._backward(x, dy, residual, units, bits, dx, dresidual, None, None, means, native._SECOND)
        return dx, dresidual if through else (dy if need_r else None)

    def _backward(self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, *rest: Any) -> None:
        dx, dresidual, dweight, dbias, sums, steps = rest
        dy = alike(dy, x, self.plan.strides)
        kept = None if residual is None else alike(residual, x, self.plan.strides)
        weight, bias = self._parameters(units)
        stats = self._stats(units)
        self.plan.kernel.backward(
            x.data_ptr(),
            dy.data_ptr(),
            native._address(kept),
            native._address(weight),
            native._address(bias),
            stats.data_ptr(),
            native._address(bits),
            native._address(dx),
            native._address(dresidual),
            native._address(dweight),
            native._address(dbias),
            sums.data_ptr(),
            1.0,
            steps,
            torch.get_num_threads(),
        )

    def _parameters(self, units: Units) -> tuple[Tensor | None, Tensor | None]:
        kind = self.plan.weight_type
        wide = lambda t: None if t is None else t.detach().to(kind).contiguous()
        return wide(units.weight), wide(units.bias)

    def _stats(self, units: Units) -> Tensor:
        return torch.cat([units.mean.flatten(), units.rstd.flatten()])


def _spread(t: Tensor, x: Tensor) -> Tensor:
    """(c,) or (n, c), so that it broadcasts against (n, c, s...)."""
    return t.reshape(*(t.shape if t.dim() == 2 else (1, -1)), *[1] * (x.dim() - 2))


def _sum(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    return t.sum(axes) if axes else t
