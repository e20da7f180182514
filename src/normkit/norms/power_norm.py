"""Power norm: rescale each channel by a running quadratic mean, for Transformers, where batch statistics jump."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import Proxy

from normkit.dispatch import normalize
from normkit.epilogue import Activation
from normkit.norm import Norm, affine, along_channels, doubled, traced_as_call, widened
from normkit.statistics.buffers import Hold, Kept
from normkit.statistics.masking import blanked
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="power_norm",
    summary="Each channel by a running quadratic mean, also in training once it is warm; no centring.",
    over="[n] c [s...]",
    center=False,
    laws=frozenset({"scale", "channel_scale", "channel"}),
    twin=None,
    paper="Shen, Yao, Gholami, Mahoney & Keutzer 2020, arXiv:2003.07845",
    aliases=("power",),
    shorthand="warmup",
)


def power_norm(
    x: Tensor,
    running_square: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    *,
    nu: Tensor | None = None,
    decay: float = 0.9,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divide each channel by the root of a quadratic mean, the batch's or the running one; scale, shift; add; activate.

    ``y = activation(x / sqrt(square + eps) * weight + bias + residual)``. In training without ``nu``, ``square`` is the
    mean square of the batch. With ``nu`` it is the running one, and with g the gradient of ``z = x / sqrt(square +
    eps)`` the gradient of x is ``(g - (1 - decay) * nu * z) / sqrt(batch's square + eps)``: what the derivative through
    the running mean would be is replaced by its own average, ``nu += mean(g * z) - (1 - decay) * nu * mean(z²)``, which
    moves in place in the backward pass. Here nothing moves ``running_square``; the layer does.

    Args:
        x: (n, c, s...).
        running_square: (c,), or ``None`` in training without ``nu``.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        training: by the batch, or with ``nu``; otherwise by ``running_square``, with its own derivative.
        eps: added to the quadratic mean.
        nu: (c,), float32 or better.
        decay: of ``nu``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before the activation.
        mask: of bool, True where a value counts: (n, s...), or any shape with as many axes as x that broadcasts to it.
            Only these enter any mean; elsewhere the output and all gradients are 0.
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        Of the shape of x.

    Raises:
        ValueError: no running square where it is needed; a residual of another shape; an unknown name; a mask or
            lengths that do not fit.

    >>> import torch, normkit as nk
    >>> nk.functional.power_norm(torch.tensor([[3.0], [3.0]]), None, training=True, eps=0.0).tolist()
    [[1.0], [1.0]]

    Source: Shen, Yao, Gholami, Mahoney & Keutzer 2020, arXiv:2003.07845.
    """
    if isinstance(x, Proxy):
        return traced_as_call(power_norm, locals())
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, SPEC.over, x, residual, mask, lengths)
    following: dict[str, Any] = {"activation": activation, "residual": residual, "mask": mask, "backend": backend}
    if training and nu is None:
        return _by_batch(x, weight, bias, eps, following)
    if running_square is None:
        raise ValueError("power_norm: running_square is None; give it, or training=True without nu=")
    if not training:
        return _by_running(x, running_square, weight, bias, eps, following)
    assert nu is not None
    square = _mean_square(x, mask)
    return _relaxed(x, running_square, square, nu, weight, bias, decay, eps, following)


def _by_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, following: dict) -> Tensor:
    """By the mean square of the batch, with the exact derivative."""
    axes = (0, *range(2, x.dim()))

    def by_torch() -> Tensor:
        wide, *parameters = widened(x, weight, bias)
        return affine(wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps), *parameters).to(x.dtype)

    return normalize(SPEC, x, weight, bias, by_torch=by_torch, eps=eps, **following)


def _by_running(
    x: Tensor, square: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, following: dict
) -> Tensor:
    def by_torch() -> Tensor:
        wide, *parameters = widened(x, weight, bias)
        return affine(wide * along_channels(torch.rsqrt(square + eps), x).to(wide.dtype), *parameters).to(x.dtype)

    known: dict[str, Any] = {"running_mean": torch.zeros_like(square), "running_var": square, "batch_statistics": False}
    return normalize(SPEC, x, weight, bias, by_torch=by_torch, eps=eps, **known, **following)


def _relaxed(
    x: Tensor,
    running: Tensor,
    square: Tensor,
    nu: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    decay: float,
    eps: float,
    following: dict,
    live: Tensor | None = None,
) -> Tensor:
    """By the running square, with the approximate derivative. ``live``: whether ``nu`` moves; ``None``: it does."""

    def apply(kinds: Any) -> Tensor:
        wide, *parameters = kinds(x, weight, bias)
        by, back = (along_channels(torch.rsqrt(t + eps), x).to(wide.dtype) for t in (running, square))
        share = nu.new_full((), 1 - decay)
        z = _Relaxed.apply(wide, by, back, nu, share, _count(wide, following["mask"]), live)
        return affine(z, *parameters).to(x.dtype)

    known: dict[str, Any] = {
        "running_mean": torch.zeros_like(running),
        "running_var": running,
        "batch_statistics": False,
    }
    return normalize(
        SPEC,
        x,
        weight,
        bias,
        by_torch=lambda: apply(widened),
        reference=lambda: apply(doubled),
        composite=True,  # a kernel would take its own derivative
        eps=eps,
        **known,
        **following,
    )


class _Relaxed(torch.autograd.Function):
    """``x * by``, with a derivative that is not its own."""

    @staticmethod
    def forward(ctx: Any, x, by, back, nu, share, count, live):
        z = x * by
        ctx.save_for_backward(z, back, share, count, live)
        ctx.nu = nu  # not saved: of two calls the first to go back moves it
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        (z, back, share, count, live), nu = ctx.saved_tensors, ctx.nu
        axes, part = (0, *range(2, z.dim())), share * nu
        of_x = (g - along_channels(part, z).to(z.dtype) * z) * back
        step = ((g * z).sum(axes) - part * z.square().sum(axes)) / count
        moves = step.isfinite() if live is None else step.isfinite() & live
        nu.add_(torch.where(moves, step, 0).to(nu.dtype))
        return of_x, None, None, None, None, None, None


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many values each channel has, at least 1."""
    counted = torch.ones_like(x[:, :1]) if mask is None else mask.expand_as(x).to(x.dtype)
    return counted.sum((0, *range(2, x.dim()))).clamp(min=1)


def _mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    """(c,), in float32 or better, over what counts, without a gradient; x is 0 elsewhere."""
    wide = widened(x.detach())[0]
    return wide.square().sum((0, *range(2, x.dim()))) / _count(wide, mask)


class PowerNorm(Norm, nn.Module, spec=SPEC):
    """Divide each channel by the root of a running quadratic mean, in training as in evaluation once it is warm.

    ``y = activation(x / sqrt(square + eps) * weight + bias + residual)``. For the first ``warmup`` batches ``square``
    is the mean square of the batch, and the derivative exact; then it is the running one, from before this batch, and
    the gradient is the approximate one of the paper (:func:`normkit.functional.power_norm`). After every batch
    ``running_square = decay * running_square + (1 - decay) * batch's square``.

    Args:
        num_features: channels.
        eps: added to the quadratic mean.
        affine: learn ``weight`` and ``bias``, both (c,).
        device: of parameters and buffers.
        dtype: of the parameters; ``running_square`` and ``nu``, both (c,), are float32 or better whatever it is.
        warmup: batches; the authors take 10000 (of some 300000).
        decay: of the running square, and of ``nu`` in the backward pass.
        group_scaling: before all else, divide each of so many groups of channels, position by position, by its root
            mean square, as the authors' recipe does with 4 groups; 0: do not.
        activation: a name, a module or its class, or ``None``; a child module of the layer.
        backend: see :func:`normkit.backend`.

    Shapes: input, ``residual`` and output (n, c, s...), or (n * t, c) for tokens. ``forward(input, *, residual=None,
    mask=None, lengths=None)``.

    Raises:
        ValueError: groups that do not divide the channels; a residual of another shape; an unknown activation or
            backend.

    >>> import torch, normkit as nk
    >>> norm = nk.PowerNorm(8, warmup=1)
    >>> for _ in range(3):
    ...     norm(torch.randn(16, 8, requires_grad=True)).sum().backward()
    >>> norm.num_batches_tracked.item(), bool(norm.nu.any())
    (3, True)

    A batch with NaN or infinity leaves ``running_square``, ``nu`` and the counter as they were; so does every batch
    inside :func:`normkit.statistics_frozen`. On a GPU every forward pass of training waits for a look at the counter,
    whether the warm-up is over; under ``torch.compile`` none does.

    When not to use it: in the decoder of a translation model, where the authors keep layer norm; where gradients of
    gradients are needed after the warm-up; with few batches, for the running mean starts at 1.

    Source: Shen, Yao, Gholami, Mahoney & Keutzer 2020, arXiv:2003.07845.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_square: Tensor
    nu: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        warmup: int = 10_000,
        decay: float = 0.9,
        group_scaling: int = 0,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if group_scaling and num_features % group_scaling:
            raise ValueError(f"power_norm: {num_features} channels do not divide into group_scaling={group_scaling}")
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.warmup, self.decay, self.group_scaling = warmup, decay, group_scaling
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name in ("running_square", "nu"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=wide))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))
        self.hold = Hold()
        self.reset_parameters()
        self._set_options(activation, backend)

    def reset_running_stats(self) -> None:
        """Running square 1, nu 0, counter 0."""
        self.running_square.fill_(1)
        self.nu.zero_()
        self.num_batches_tracked.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.half()`` and ``.bfloat16()`` leave what is kept in float32, in which small steps are not lost."""
        before = {name: self._buffers[name] for name in ("running_square", "nu")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = self._buffers[name]
            assert old is not None
            assert now is not None
            if now.dtype.itemsize < 4:
                wide = torch.promote_types(now.dtype, torch.float32)
                on_meta = old.device.type == "meta"
                self._buffers[name] = now.to(wide) if on_meta else old.to(device=now.device, dtype=wide)
        return self

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(n, c, s...) -> the same; ``residual`` (same shape) is added before the activation.

        ``mask`` or ``lengths`` say what is padding: see :func:`normkit.functional.power_norm`.
        """
        x = input
        if mask is not None or lengths is not None:
            x, residual, mask = blanked(type(self).__name__, SPEC.over, x, residual, mask, lengths)
        if self.group_scaling:
            x = _scaled_by_groups(x, self.group_scaling, self.eps)
        following = {"activation": self.activation, "residual": residual, "mask": mask, "backend": self.backend}
        if not self.training:
            return _by_running(x, self.running_square, self.weight, self.bias, self.eps, following)
        square, running = _mean_square(x, mask), _as_it_is(self.running_square)
        y = self._by_phase(x, running, square, following)
        if x.numel():
            nothing = torch.zeros_like(square)
            held = self.hold.frozen > 0
            kept = Kept(nothing, self.running_square, 1 - self.decay, self.num_batches_tracked, held=held)
            kept.commit((nothing, running.lerp(square.to(running.dtype), 1 - self.decay)))
        return y

    def _by_phase(self, x: Tensor, running: Tensor, square: Tensor, following: dict) -> Tensor:
        by_batch = lambda: _by_batch(x, self.weight, self.bias, self.eps, following)
        own = self.weight, self.bias, self.decay, self.eps, following
        warming = self.num_batches_tracked < self.warmup
        held = torch.zeros_like(warming) if self.hold.frozen else None
        if not torch.compiler.is_compiling():
            return by_batch() if warming else _relaxed(x, running, square, self.nu, *own, live=held)
        live = warming.logical_not() if held is None else held
        late = _relaxed(x, running, square, self.nu, *own, live=live)  # one graph for both phases
        return torch.where(warming, by_batch(), late)

    def _extra_options(self) -> list[str]:
        own: list[Any] = [self.num_features, f"eps={self.eps}", f"affine={self.affine}", f"warmup={self.warmup}"]
        own += [f"decay={self.decay}"] if self.decay != 0.9 else []
        own += [f"group_scaling={self.group_scaling}"] if self.group_scaling else []
        return [*map(str, own), *super()._extra_options()]


def _as_it_is(running: Tensor) -> Tensor:
    """A copy for the backward pass, before it moves.

    Compiled code may find a plain copy again from its source (AOTAutograd's min-cut, torch 2.13), which has moved by
    then; the sum of one term it keeps.
    """
    return running.unsqueeze(0).cumsum(0).squeeze(0) if torch.compiler.is_compiling() else running.clone()


def _scaled_by_groups(x: Tensor, groups: int, eps: float) -> Tensor:
    """Each group of channels over its root mean square, position by position."""
    opened = widened(x)[0].unflatten(1, (groups, -1))
    return (opened * torch.rsqrt(opened.square().mean(2, keepdim=True) + eps)).flatten(1, 2).to(x.dtype)
