"""MovingAverage: moving averages in the forward and in the backward pass (MABN, Yan et al. 2020, arXiv:2001.06838)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.moments import Moments
from normkit.statistics.application import Application
from normkit.statistics.before import Before
from normkit.statistics.centred import CENTRED, Centred
from normkit.statistics.policy import Policy, needs_running


@dataclass(frozen=True)
class MovingAverage(Policy):
    """Moving average batch norm (MABN), for batches of one or two samples.

    Nothing is centred: the layer before has centred weights (:func:`bind`), which takes the mean away, and what is left
    is one statistic in the forward pass and one in the backward pass, both averaged over the last ``window`` updates.
    Per channel, with the sums over the n values of this batch, at update t::

        square_t  = sum(x**2) / n
        average_t = mean of square over the updates t - window + 1 ... t        (of this batch alone, at first)
        r         = clip(sqrt((average_t + eps) / (running_var + eps)), 1 / r_max, r_max)     (1, at first)
        z         = x / sqrt(average_t + eps)
        y         = z * r * weight + bias
        running_var <- (1 - momentum) * running_var + momentum * average_t

    and with g the gradient that arrives at z, backward::

        product_t = sum(g * z) / n
        dx        = (g - z * mean of product over the updates t - window + 1 ... t) / sqrt(average_t + eps)

    "At first" is, as in the authors' code, the first ``window`` updates, or ``warmup - 1`` if these are more; r
    stays 1 for ``max(1000, warmup)`` updates. running_mean goes to 0, so that evaluation and plain layers divide by
    ``sqrt(running_var + eps)`` and no more; :func:`normkit.plain_state_dict` writes the centred weights out.

    Args:
        window: updates averaged over; (samples it should behave like) / (samples per batch): 16 in the paper.
        r_max: bound of r.
        warmup: see above.

    Raises:
        ValueError: arguments out of range; a layer that keeps no running statistics; a training step of a layer that is
            not bound.
        RuntimeError: a second derivative: an average over other batches has none.

    >>> import torch, normkit as nk
    >>> conv, bn = torch.nn.Conv2d(3, 8, 3, bias=False), nk.BatchNorm2d(
    ...     8, momentum=0.02, statistics=nk.statistics.MovingAverage())
    >>> nk.statistics.bind(bn, conv)
    >>> y = bn(conv(torch.randn(2, 3, 8, 8)))

    The paper's momentum is 0.02. The windows are in the ``state_dict``, so that a run goes on as if it had not stopped.
    Of micro-batches that are one update (:func:`normkit.accumulate_statistics`) the last one stands in the windows. A
    plain checkpoint evaluates as it did; training from it subtracts no mean any more, which the network has to unlearn.

    When not to use it: with batches of 16 and more, where plain batch norm is as good and cheaper; with a loss scale
    that changes (float16), as gradients of several scales then meet in one window; with several forward passes before
    one backward pass in the same checkpointed function. A bias in the layer before is not taken out: leave it away.

    Source: Yan, Wan, Zhang, Zhang, Wei & Sun 2020, arXiv:2001.06838, and the authors' code (megvii-model/MABN).
    """

    window: int = 16
    r_max: float = 5.0
    warmup: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1 or self.r_max < 1 or self.warmup < 0:
            raise ValueError(
                f"MovingAverage: window={self.window}, r_max={self.r_max}, warmup={self.warmup}.\n"
                "  window is a number of updates, 1 or more; r_max is 1 or more, warmup 0 or more"
            )

    def check(self, layer: Any) -> None:
        needs_running(self, layer)

    def state(self, layer: Any) -> Windows:
        return Windows(layer, self.window)

    def train(self, call: Application) -> Tensor:
        layer, kept = call.layer, call.kept
        assert kept is not None
        if not getattr(layer, "is_bound", False):
            raise ValueError(
                f"{type(layer).__name__}: statistics={self!r} takes no mean away and needs a layer before it with "
                "centred weights.\n  call normkit.statistics.bind(norm, conv) once, with the layer whose output it gets"
            )
        state = layer.statistics_state
        with torch.no_grad():
            mean, var, batches = state.read(kept)
            own = call.measure()
            square = (own.m2 / own.count.clamp(min=1) + own.mean.square()).to(var.dtype)
            slot = batches % self.window
            squares = state.squares.index_copy(0, slot.reshape(1), square[None])
            averaged = (batches >= self.window) & (batches + 1 >= self.warmup)
            average = torch.where(averaged, squares.mean(0), square)
            bound = torch.where(batches < max(1000, self.warmup), 1.0, self.r_max)
            r = ((average + layer.eps) / (var + layer.eps)).sqrt().clamp(1 / bound, bound)
            divisor = (average + layer.eps) / r.square()  # of x * r, squared
            count = own.count + 1  # one more than there are, as the mean is no estimate: the variance is then average
        x = _Averaged.apply(call.x, average + layer.eps, own.count, slot, averaged, state.products, kept.held)
        y = replace(call, x=x).by_given(torch.zeros_like(mean), divisor - layer.eps)
        kept.store(state.squares, squares)
        kept.observe(Moments(count, torch.zeros_like(mean), average * own.count.to(var.dtype)))
        return y


def bind(norm: nn.Module, layer: nn.Module) -> None:
    """Tell a norm with ``statistics=MovingAverage(...)`` which layer it follows; that layer's weights are centred.

    The layer stays the same object, with the same parameters and the same keys in its checkpoint; its class becomes a
    subclass, whose forward uses ``weight - mean(weight)`` per output channel. Both survive copies and pickling.

    Args:
        norm: the norm; nothing but the output of ``layer`` may reach it.
        layer: torch's ``Linear``, ``Conv1d``, ``Conv2d`` or ``Conv3d``. Without a bias it is as the paper has it.

    Raises:
        TypeError: another kind of layer or norm.
        ValueError: outputs of the layer that are not as many as the channels of the norm.

    >>> import torch, normkit as nk
    >>> linear, bn = torch.nn.Linear(4, 8), nk.BatchNorm1d(8, statistics=nk.statistics.MovingAverage())
    >>> nk.statistics.bind(bn, linear)
    >>> linear(torch.ones(1, 4)).allclose(linear.bias)          # a constant input meets weights whose mean is 0
    True
    """
    if not isinstance(getattr(norm, "statistics", None), MovingAverage):
        raise TypeError(
            f"bind: the first argument is {type(norm).__name__}, without statistics=MovingAverage(...).\n"
            "  no other policy needs the layer before it"
        )
    if type(layer) not in CENTRED and not isinstance(layer, Centred):
        raise TypeError(
            f"bind: {type(layer).__module__}.{type(layer).__qualname__} is no layer whose weights can be centred.\n"
            f"  give one of torch's own {', '.join(cls.__name__ for cls in CENTRED)}"
        )
    known: Any = layer
    outputs, channels = len(known.weight), getattr(norm, "num_features", 0)
    if channels and outputs != channels:
        raise ValueError(
            f"bind: the layer has {outputs} outputs, and the norm {channels} channels.\n"
            "  bind a norm to the layer whose output it gets"
        )
    if not isinstance(layer, Centred):
        layer.__class__ = CENTRED[type(layer)]
    norm.is_bound = True  # type: ignore[assignment]


class Windows(Before):
    """What the last updates measured."""

    squares: Tensor
    """(window, c): mean squares of the input, at update t in the row t % window."""
    products: Tensor
    """(window, c): mean products of the normalised value and its gradient."""

    def __init__(self, layer: Any, window: int) -> None:
        super().__init__(layer)
        for name in ("squares", "products"):
            self.register_buffer(name, torch.zeros_like(layer.running_var).repeat(window, 1))

    def begin(self, layer: Any) -> None:
        """As if the last updates had all seen what the plain layer saw on average."""
        self.squares.copy_((layer.running_var + layer.running_mean.square()).expand_as(self.squares))
        self.products.zero_()

    def reset(self) -> None:
        """As new."""
        self.squares.zero_()
        self.products.zero_()


class _Averaged(torch.autograd.Function):
    """The input as it is; backward, what division by the batch's own root mean square would add, averaged."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        divisor: Tensor,
        count: Tensor,
        slot: Tensor,
        averaged: Tensor,
        products: Tensor,
        held: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, divisor, count, slot, averaged)
        ctx.products, ctx.held = products, held  # saved it might not change until the backward pass
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "MovingAverage: its gradient is an average over several batches, which has no derivative.\n"
                "  do without create_graph=True, or choose another policy for this layer"
            )
        x, divisor, count, slot, averaged = ctx.saved_tensors
        (dy,) = grads  # the gradient at z, divided
        wide = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))
        spread = lambda t: t.to(wide(x).dtype).reshape(1, -1, *[1] * (x.dim() - 2))
        space = tuple(axis for axis in range(x.dim()) if axis != 1)
        product = (wide(dy) * wide(x)).sum(space) / count.clamp(min=1)
        product = product.to(divisor.dtype)
        products = ctx.products.index_copy(0, slot.reshape(1), product[None])
        average = torch.where(averaged, products.mean(0), product)
        if not ctx.held:
            ctx.products.copy_(torch.where(product.isfinite().all(), products, ctx.products))
        dx = wide(dy) - wide(x) * spread(average / divisor)
        return dx.to(x.dtype), *[None] * 6
