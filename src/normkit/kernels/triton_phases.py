"""The two halves of a batch norm on the Triton kernels: for statistics that are merged in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.kernels import triton
from normkit.kernels.phases import Halves, Units
from normkit.kernels.plan import Plan, alike
from normkit.moments import Moments


class TritonHalves(Halves):
    """Residual and activation included. Parts of channels are merged by torch's operators, in float64."""

    fuses = True

    def __init__(self, per_sample: bool, plan: Plan) -> None:
        super().__init__(per_sample)
        self.plan, self.gate = plan, plan.gate

    def laid_out(self, x: Tensor) -> Tensor:
        return alike(x, x, self.plan.strides)

    def signs(self, x: Tensor, stats: Tensor, bits: Tensor) -> Tensor:
        return triton._signs(self.plan, x, stats, bits)

    def moments(self, x: Tensor) -> Moments:
        count, mean, m2 = self.plan.kernel.measured(x).double().movedim(3, 1)  # (parts, sections, c) each
        merged = Moments(count, mean, m2).together()
        number = self.plan.number
        mean, m2 = (self._of_units(t).to(number) for t in (merged.mean, merged.m2))
        return Moments(merged.count.flatten()[0], mean, m2)

    def normalise(self, x: Tensor, units: Units, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bits = torch.empty(self.plan.bits, dtype=torch.uint8, device=x.device) if self.plan.bits else None
        added = None if residual is None else alike(residual, x, self.plan.strides)
        return self.plan.kernel.normalise(x, added, units.weight, units.bias, _stats(units), bits), bits

    def sums(self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, parameters: bool) -> tuple:
        given = self._given(x, dy, residual, units, bits)
        own = self.plan.kernel.summed(*given).sum(3)  # (2, sections, c)
        dweight = dbias = None
        if parameters:
            rstd = units.rstd.reshape(-1, own.shape[2])
            dweight, dbias = (own[1] * rstd).sum(0), own[0].sum(0)
        if self.per_sample and units.weight is not None:
            own = own * units.weight.to(own.dtype)
        return torch.stack([self._of_units(t) for t in own]), dweight, dbias

    def gradients(
        self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any, means: Tensor, need_x: bool, need_r: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        given = self._given(x, dy, residual, units, bits)
        means = means.to(self.plan.number)
        if not self.per_sample and units.weight is not None:
            means = means * units.weight.to(means.dtype)  # per sample it is in the sums
        return self.plan.kernel.gradients(*given, means.contiguous(), (need_x, need_r))

    def _given(self, x: Tensor, dy: Tensor, residual: Any, units: Units, bits: Any) -> tuple:
        strides = self.plan.strides
        kept = None if residual is None else alike(residual, x, strides)
        return x, alike(dy, x, strides), kept, units.weight, units.bias, _stats(units), bits

    def _of_units(self, t: Tensor) -> Tensor:
        """(sections, c) as the caller counts: (n, c) per sample, otherwise (c,)."""
        return t if self.per_sample else t[0]


def _stats(units: Units) -> Tensor:
    return torch.cat([units.mean.flatten(), units.rstd.flatten()])
