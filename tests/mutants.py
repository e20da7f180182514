"""Norms that are wrong on purpose. The oracle must reject every one, and accept the kernel that they are made from.

``Kernel`` is a backend written out step by step, forward and backward, in float32 or better: one method per step. A
mutant overrides one of them, and ``spares`` says for which layers the mistake makes no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normkit.call import Call
from normkit.dispatch import Backend
from normkit.epilogue import apply
from normkit.layout import Layout, solve
from normkit.vocabulary.spec import Spec


@dataclass(frozen=True)
class Use:
    """How a norm is used in one trial: what a mutant needs to say whether its mistake can show."""

    spec: Spec
    layer: nn.Module
    dtype: torch.dtype

    def has(self, name: str) -> bool:
        return getattr(self.layer, name, None) is not None

    @property
    def pools(self) -> bool:
        return self.spec.over is not None

    @property
    def narrow(self) -> bool:
        return self.dtype.itemsize < 4


class Kernel:
    """Right as it stands. Axes are those of the opened view; ``center`` is False where the mean is not subtracted."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.center = call.spec.center

    def run(self) -> Tensor:
        call = self.call
        if call.over is None:
            return self.finish(self.elementwise())
        self.layout = self.split(solve(call.over, tuple(call.x.shape), groups=call.groups, trailing=call.trailing))
        self.axes = self.layout.pooled
        if call.batch_statistics and call.running_mean is not None and self.layout.values == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return self.finish(_Steps.apply(self, call.x, call.weight, call.bias))

    def split(self, layout: Layout) -> Layout:
        return layout

    def open(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(self.layout.view)

    def close(self, y: Tensor) -> Tensor:
        return y.reshape(self.call.x.shape)

    def spread(self, parameter: Tensor) -> Tensor:
        """A weight or a bias so that it broadcasts against the view."""
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32)).reshape(self.layout.weight_view)

    # forward

    def elementwise(self) -> Tensor:
        """A norm that pools nothing has only its epilogue here."""
        return self.call.by_torch()

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(self.axes, keepdim=True)

    def var(self, x: Tensor, mean: Tensor) -> Tensor:
        return (x - mean).square().mean(self.axes, keepdim=True)

    def rstd(self, var: Tensor) -> Tensor:
        return (var + self.call.eps).rsqrt()

    def normalised(self, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return (x - mean) * rstd

    def weight(self, weight: Tensor) -> Tensor:
        return self.spread(weight)

    def bias(self, bias: Tensor) -> Tensor:
        return self.spread(bias)

    def finish(self, y: Tensor) -> Tensor:
        return apply(y, self.call.residual, self.call.activation)

    # running statistics

    def from_batch(self) -> bool:
        return self.call.batch_statistics

    def unbiased(self, var: Tensor) -> Tensor:
        return var * (self.layout.values / (self.layout.values - 1))

    def blend(self, running: Tensor, batch: Tensor) -> Tensor:
        return (1 - self.call.momentum) * running + self.call.momentum * batch

    def move(self, mean: Tensor, var: Tensor) -> None:
        if self.call.running_mean is None or not self.call.x.numel() or not self.call.batch_statistics:
            return
        for running, batch in ((self.call.running_mean, mean), (self.call.running_var, self.unbiased(var))):
            running.copy_(self.blend(running, batch.reshape(-1, running.numel()).mean(0)))

    # backward; g is the gradient of the output of the affine step

    def of_input(self, g: Tensor, normalised: Tensor, rstd: Tensor) -> Tensor:
        """``g`` is already times the weight."""
        if not self.from_batch():
            return g * rstd
        return rstd * (g - self.through_mean(g) - normalised * self.through_rstd(g, normalised))

    def through_mean(self, g: Tensor) -> Tensor | float:
        return g.mean(self.axes, keepdim=True) if self.center else 0.0

    def through_rstd(self, g: Tensor, normalised: Tensor) -> Tensor | float:
        return (g * normalised).mean(self.axes, keepdim=True)

    def of_weight(self, g: Tensor, normalised: Tensor) -> Tensor:
        return g * normalised

    def of_bias(self, g: Tensor) -> Tensor:
        return g


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, x, weight, bias):
        ctx.kernel, ctx.shapes = kernel, (weight, bias)
        x = kernel.open(x)
        if kernel.from_batch():
            mean = kernel.mean(x) if kernel.center else torch.zeros_like(kernel.mean(x))
            var = kernel.var(x, mean)
            kernel.move(mean, var)
        else:
            mean, var = kernel.spread(kernel.call.running_mean), kernel.spread(kernel.call.running_var)
        rstd = kernel.rstd(var)
        y = normalised = kernel.normalised(x, mean, rstd)
        if weight is not None:
            y = y * kernel.weight(weight)
        if bias is not None:
            y = y + kernel.bias(bias)
        ctx.save_for_backward(normalised, rstd)
        return kernel.close(y).to(kernel.call.x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        kernel, (weight, bias), (normalised, rstd) = ctx.kernel, ctx.shapes, ctx.saved_tensors
        upstream = kernel.open(upstream)
        g = upstream if weight is None else upstream * kernel.spread(weight)
        of_input = kernel.close(kernel.of_input(g, normalised, rstd)).to(kernel.call.x.dtype)
        over = tuple(axis for axis in range(upstream.dim()) if axis not in kernel.layout.weighted)
        found = []
        for parameter, terms in ((weight, kernel.of_weight(upstream, normalised)), (bias, kernel.of_bias(upstream))):
            found.append(None if parameter is None else terms.sum(over).reshape(parameter.shape).to(parameter.dtype))
        return None, of_input, *found


def kernel_backend(kernel: type[Kernel], name: str = "kernel") -> Backend:
    return Backend(name, lambda call: [], lambda call: kernel(call).run())


class Mutant(Kernel):
    """A kernel with one mistake."""

    dtypes = ("float32", "bfloat16")
    """In which the mistake is larger than rounding."""

    @classmethod
    def spares(cls, use: Use) -> bool:
        """Whether the mistake makes no difference; by default where nothing is pooled."""
        return not use.pools


# statistics


class DividesByOneLess(Mutant):
    def var(self, x, mean):
        return (x - mean).square().sum(self.axes, keepdim=True) / max(self.layout.values - 1, 1)


class EpsilonOutsideTheRoot(Mutant):
    def rstd(self, var):
        return 1 / (var.sqrt() + self.call.eps)


class EpsilonTimesHundred(Mutant):
    def rstd(self, var):
        return (var + 100 * self.call.eps).rsqrt()


class EpsilonAsFloor(Mutant):
    def rstd(self, var):
        return var.clamp(min=self.call.eps).rsqrt()


class MeanNotSubtracted(Mutant):
    def normalised(self, x, mean, rstd):
        return x * rstd

    @classmethod
    def spares(cls, use):
        return not use.spec.center


class MeanSubtracted(Mutant):
    """A layer norm in the place of an RMS norm."""

    def __init__(self, call):
        super().__init__(call)
        self.center = True

    @classmethod
    def spares(cls, use):
        return not use.pools or use.spec.center


class Unshifted(Mutant):
    """E[x²] - E[x]². Numbers of 8 bits that are far from 0 have lost their deviation before anybody subtracts."""

    dtypes = ("float32",)

    def var(self, x, mean):
        return (x.square().mean(self.axes, keepdim=True) - mean.square()).clamp(min=0)

    @classmethod
    def spares(cls, use):
        return not use.spec.center


class TailUnmasked(Mutant):
    """Rows are read in blocks of 8, and what lies behind the last element is summed too."""

    def var(self, x, mean):
        behind = -self.layout.values % 8
        return super().var(x, mean) + behind * (1 - mean).square() / max(self.layout.values, 1)


class RstdRounded(Mutant):
    def rstd(self, var):
        return super().rstd(var).bfloat16().to(var.dtype)


class SumInStorage(Mutant):
    """The mean is summed in the type of the input."""

    def mean(self, x):
        return super().mean(x).to(self.call.x.dtype).to(x.dtype)

    @classmethod
    def spares(cls, use):
        return not use.spec.center or not use.narrow


class LastElementLeftOut(Mutant):
    """The last element of the last row is not normalised."""

    def normalised(self, x, mean, rstd):
        y = super().normalised(x, mean, rstd)
        if y.numel():
            y[(-1,) * y.dim()] = x[(-1,) * x.dim()]
        return y


class GroupsInterleaved(Mutant):
    """The group of channel c is c % groups instead of c // (channels / groups)."""

    def open(self, x):
        return super().open(self.shuffled(x))

    def close(self, y):
        channels = self.call.x.shape[1] // self.call.groups
        order = torch.arange(self.call.x.shape[1]).reshape(self.call.groups, channels).T.reshape(-1)
        return super().close(y)[:, order]

    def shuffled(self, x):
        order = torch.arange(x.shape[1]).reshape(-1, self.call.groups).T.reshape(-1)
        return x[:, order]

    def spread(self, parameter):
        return super().spread(self.shuffled(parameter[None])[0])

    @classmethod
    def spares(cls, use):
        return not use.pools or "(" not in use.spec.over


# affine step and epilogue


class OnePercentTooMuch(Mutant):
    def finish(self, y):
        return super().finish(y * 1.01)

    @classmethod
    def spares(cls, use):
        return False


class WeightIgnored(Mutant):
    def weight(self, weight):
        return torch.ones_like(super().weight(weight))

    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("weight")


class WeightOfTheNeighbour(Mutant):
    def weight(self, weight):
        return super().weight(weight.reshape(-1).roll(1).reshape(weight.shape))

    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("weight")


class LastBiasDropped(Mutant):
    def bias(self, bias):
        bias = bias.clone()
        bias.reshape(-1)[-1] = 0
        return super().bias(bias)

    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("bias")


class ResidualAfterActivation(Mutant):
    def finish(self, y):
        return apply(y, None, self.call.activation) + (0 if self.call.residual is None else self.call.residual)

    @classmethod
    def spares(cls, use):
        return False


class ResidualDropped(Mutant):
    def finish(self, y):
        return apply(y, None, self.call.activation)

    @classmethod
    def spares(cls, use):
        return False


class ResidualWithoutGradient(Mutant):
    def finish(self, y):
        residual = self.call.residual
        return apply(y, None if residual is None else residual.detach(), self.call.activation)

    @classmethod
    def spares(cls, use):
        return False


class ActivationBeforeResidualGradient(Mutant):
    """The residual gets the gradient of the output as it is, not through the activation."""

    def finish(self, y):
        residual = self.call.residual
        if residual is None or not residual.requires_grad:
            return super().finish(y)
        return apply(y, residual.detach(), self.call.activation) + (residual - residual.detach())

    @classmethod
    def spares(cls, use):
        return False


# running statistics


class RunningMutant(Mutant):
    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("running_mean")


class RunningVarianceBiased(RunningMutant):
    def unbiased(self, var):
        return var


class MomentumSwapped(RunningMutant):
    def blend(self, running, batch):
        return self.call.momentum * running + (1 - self.call.momentum) * batch


class RunningInStorage(RunningMutant):
    """Running statistics go through the type of the input."""

    def blend(self, running, batch):
        return super().blend(running, batch).to(self.call.x.dtype).to(running.dtype)

    @classmethod
    def spares(cls, use):
        return not use.has("running_mean") or not use.narrow


class RunningNotUsed(RunningMutant):
    """Normalises by the batch in evaluation too."""

    def from_batch(self):
        return True

    @classmethod
    def spares(cls, use):
        return super().spares(use) and not use.has("running_square")


# gradients


class GradientThroughMeanMissing(Mutant):
    def through_mean(self, g):
        return 0.0

    @classmethod
    def spares(cls, use):
        return not use.spec.center


class GradientThroughRstdMissing(Mutant):
    def through_rstd(self, g, normalised):
        return 0.0


class GradientOfEvaluation(Mutant):
    """The statistics are taken for constants."""

    def of_input(self, g, normalised, rstd):
        return g * rstd


class WeightGradientOfRawOutput(Mutant):
    """Lacks the normalised input."""

    def of_weight(self, g, normalised):
        return g

    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("weight")


class WeightGradientAveraged(Mutant):
    def of_weight(self, g, normalised):
        return super().of_weight(g, normalised) / 2

    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("weight")


class BiasGradientWithoutLastSample(Mutant):
    """The last block of a sum is lost."""

    def of_bias(self, g):
        g = g.clone()
        g[-1:] = 0
        return g

    @classmethod
    def spares(cls, use):
        return not use.pools or not use.has("bias")


def _all(cls: type[Mutant]) -> list[type[Mutant]]:
    """Every mutant that overrides a step."""
    below = cls.__subclasses__()
    return [mutant for child in below for mutant in (_all(child) if child.__subclasses__() else [child])]


MUTANTS = _all(Mutant)
