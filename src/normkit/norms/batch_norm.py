"""Batch norm: standardise each channel by the mean and variance of the mini-batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from normkit.epilogue import Activation, undoing
from normkit.norm import Norm, traced_as_call
from normkit.statistics.application import Application, normalise, refuse_misfit, train
from normkit.statistics.batch import PLAIN
from normkit.statistics.buffers import Kept, LazyFeatures, RunningStatistics, as_statistics
from normkit.statistics.masking import blanked
from normkit.statistics.naming import named
from normkit.statistics.policy import PREFIX, Policy, begin
from normkit.statistics.straight import straight
from normkit.statistics.synchronized import Synchronized
from normkit.vocabulary.spec import Spec

SPEC = Spec(
    name="batch_norm",
    summary="Each channel by the mean and variance of the mini-batch; by moving averages in evaluation.",
    over="[n] c [s...]",
    center=True,
    laws=frozenset({"scale", "shift", "channel_scale", "channel_shift", "channel", "restores"}),
    twin="torch.nn.BatchNorm{dim}d",
    paper="Ioffe & Szegedy 2015, arXiv:1502.03167",
    aliases=("batch", "bn"),
    shorthand="statistics",
)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standardise each channel over the mini-batch (or by running statistics), scale, shift; add; activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with the biased variance. In training
    ``running = (1 - momentum) * running + momentum * batch``, in place, with the unbiased variance.

    Args:
        x: (n, c, s...).
        running_mean: (c,), or ``None`` to keep none.
        running_var: (c,), or ``None``.
        weight: (c,), or ``None`` for 1.
        bias: (c,), or ``None`` for 0.
        training: normalise by the batch and move the running statistics; otherwise normalise by the running ones.
        momentum: share of the new batch.
        eps: added to the variance.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a callable, or ``None``.
        residual: (n, c, s...), added after the affine step and before the activation.
        mask: of bool, True where a value counts: (n, s...), or any shape with as many axes as x that broadcasts to it.
            Only these enter any statistic; elsewhere the output and all gradients are 0.
        lengths: (n,), or (n, axes of space): the mask of samples that are padded at the end.
        backend: see :func:`normkit.backend`.

    Returns:
        (n, c, s...).

    Raises:
        ValueError: one value per channel in training; a residual of another shape; an unknown name; a mask or lengths
            that do not fit.
        RuntimeError: parameters that do not fit the channels.

    Differs from ``torch.nn.functional.batch_norm``: a batch with NaN or infinity leaves the running statistics as they
    were, and running statistics may be float32 beside a narrower weight.

    >>> import torch, normkit as nk
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> nk.functional.batch_norm(x, None, None, training=True, eps=1e-12).tolist()
    [[-1.0], [1.0]]

    Do not use it with fewer than about 16 values per channel: use group norm, or more samples.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    if isinstance(x, Proxy):
        return traced_as_call(batch_norm, locals())
    if mask is not None or lengths is not None:
        x, residual, mask = blanked(SPEC.name, SPEC.over, x, residual, mask, lengths)
    details = {"residual": residual, "activation": activation, "backend": backend, "mask": mask}
    if not training or running_mean is None or running_var is None:
        return normalise(
            SPEC, x, running_mean, running_var, weight, bias, by_batch=training, momentum=momentum, eps=eps, **details
        )
    return train(SPEC, x, Kept(running_mean, running_var, momentum), weight, bias, eps, **details)


def _by_running(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.batch_norm(x, mean, var, *as_statistics(mean, weight, bias), False, 0.0, eps)


class _BatchNorm(Norm, RunningStatistics):
    """Forward and options of batch norm; the classes below add torch's class of each dimension."""

    statistics: Policy
    save: str = "input"

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor:
        """(n, c, s...) -> (n, c, s...).

        Args:
            input: (n, c, s...).
            residual: of the same shape; added before the activation.
            mask: of bool, True where an element counts: (n, s...), or any shape with as many axes as the input that
                broadcasts to it. Masked elements influence no statistic and no gradient; the output is 0 there.
            lengths: (n,) or (n, axes of space): the mask of samples that are padded at the end.
            step: of a recurrent network, with ``statistics=PerStep(...)``.
        """
        self._check_input_dim(input)
        policy = self.statistics
        plain = policy is PLAIN or policy == PLAIN  # somebody may have made the same again
        if not plain or mask is not None or lengths is not None or step is not None:
            return self._by_policy(input, residual, mask, lengths, step)
        learning = self.training and not self.frozen
        y = straight(self, input, residual) if learning else self._evaluate_straight(input, residual)
        if y is not None:
            return y
        details: dict[str, Any] = {"activation": self.activation, "backend": self.backend}
        if residual is not None:
            details["residual"] = residual
        if self.save == "output":
            details["save_output"] = True
        if learning and (kept := self.kept()) is not None:
            return train(SPEC, input, kept, self.weight, self.bias, self.eps, **details)
        mean, var = (None, None) if learning else (self.running_mean, self.running_var)
        by_batch = mean is None and var is None
        return normalise(
            SPEC, input, mean, var, self.weight, self.bias, by_batch=by_batch, momentum=0.0, eps=self.eps, **details
        )

    def _evaluate_straight(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """Straight to torch's operator, where nothing is left to decide; ``None``: there is."""
        mean, var = self.running_mean, self.running_var
        if mean is None or torch.is_grad_enabled():  # a backward pass reads them again, when they may have moved
            return None
        arguments = (x, mean, var, self._parameter("weight"), self._parameter("bias"), self.eps)
        return self._straight(x, residual, _by_running, *arguments, by_batch=False)

    def _by_policy(
        self, x: Tensor, residual: Tensor | None, mask: Tensor | None, lengths: Tensor | None, step: int | None
    ) -> Tensor:
        refuse_misfit(self, x)
        if mask is not None or lengths is not None:
            x, residual, mask = blanked(type(self).__name__, SPEC.over, x, residual, mask, lengths)
        weight, bias = as_statistics(self.running_mean, self.weight, self.bias)
        kept = self.statistics.kept(self, step)
        call = Application(self, x, weight, bias, mask, residual, step, kept)
        if self.training and not self.frozen:
            return self.statistics.train(call)
        return self.statistics.evaluate(call)

    def _set_policy(self, statistics: Policy | str | None) -> None:
        policy = named(statistics) if isinstance(statistics, str) else statistics
        self.statistics = PLAIN if policy is None or policy == PLAIN else policy
        if not isinstance(self.statistics, Policy):
            raise TypeError(
                f"{type(self).__name__}: statistics={statistics!r} is no policy.\n"
                "  give one of normkit.statistics, such as normkit.statistics.Ghost(32), its name, or None"
            )
        self.statistics.check(self)
        self._add_state()

    def _set_save(self, save: str) -> None:
        if save not in ("input", "output"):
            raise ValueError(f'save={save!r} is neither "input" nor "output"; it names what the backward pass keeps')
        if save == "output":
            undoing(self.activation)
            if self.statistics != PLAIN:
                raise ValueError(
                    f'save="output" is for the statistics of the mini-batch, and not for {self.statistics!r}.\n'
                    '  leave statistics= out, or choose save="input"'
                )
        self.save = save

    def _add_state(self) -> None:
        """The further buffers of the policy, once the number of channels is known."""
        if self.num_features and (state := self.statistics.state(self)) is not None:
            self.add_module(PREFIX, state)
            self.register_load_state_dict_post_hook(begin)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, counters 0; and as new what the policy keeps."""
        super().reset_running_stats()
        state: Any = self._modules.get(PREFIX)
        if state is not None:
            state.reset()

    def _extra_options(self) -> list[str]:
        own = [] if self.statistics == PLAIN else [f"statistics={self.statistics!r}"]
        own += ["frozen=True"] if self.frozen else []
        own += ["low_precision_buffers=True"] if self.low_precision_buffers else []
        own += ["save='output'"] if self.save == "output" else []
        return [*super()._extra_options(), *own]


class _Sized(_BatchNorm):
    """Built for a known number of channels."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        low_precision_buffers: bool = False,
        statistics: Policy | str | None = None,
        save: str = "input",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_bias(bias)
        self._set_statistics(low_precision_buffers)
        self._set_policy(statistics)
        self._set_options(activation, backend)
        self._set_save(save)


class _Lazy(LazyFeatures, _BatchNorm):
    """Takes the number of channels from the first input."""

    def initialize_parameters(self, input: Tensor, **rest: Any) -> None:
        """As for every lazy layer; then the policy's buffers."""
        super().initialize_parameters(input, **rest)
        self._add_state()

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        low_precision_buffers: bool = False,
        statistics: Policy | str | None = None,
        save: str = "input",
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        self._set_bias(bias)
        self._set_statistics(low_precision_buffers)
        self._set_policy(statistics)
        self._set_options(activation, backend)
        self._set_save(save)


class BatchNorm2d(_Sized, nn.BatchNorm2d, spec=SPEC, dim=2):
    """Standardise each channel of (n, c, h, w) over the mini-batch and space, then scale, shift, add, activate.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``. In training mean and (biased) variance
    are the mini-batch's, and ``running = (1 - momentum) * running + momentum * batch`` (unbiased variance); in
    evaluation they are the running ones.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; ``None``: the average over all batches.
        affine: learn ``weight`` and ``bias``, both (c,).
        track_running_stats: keep running statistics; otherwise the batch's are used in evaluation as well.
        device: of parameters and buffers.
        dtype: of the parameters; running statistics are float32 or better whatever it is.
        bias: with ``affine``, learn ``bias`` too.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"gelu"``, a module or its class, or ``None``; a child
            module of the layer.
        backend: see :func:`normkit.backend`.
        low_precision_buffers: let ``.half()`` and ``.bfloat16()`` cast the running statistics, as torch does.
        statistics: which statistics normalise, and what enters the running ones: a policy of
            :mod:`normkit.statistics` or its name (``"ghost:16"``); ``None`` is the mini-batch's.
        save: what training keeps for the backward pass: the ``"input"``, or the ``"output"``, from which the input is
            found again (arXiv:1712.02616). A convolution behind the layer keeps that output anyway, so a chain of
            convolution, norm and activation keeps half as much. For no activation or a leaky ReLU, and without
            ``residual``; the output must not be overwritten before the backward pass; gradients cannot be
            differentiated again. Rounding the output adds |bias / weight| of its last digits to the error of the input:
            docs/kernels.md has measurements. On a GPU every forward pass waits for a look at the weight. With a mask,
            or under ``torch.compile``, it is as ``"input"``.

    Shapes: input, ``residual`` and output (n, c, h, w). ``forward(input, *, residual=None, mask=None, lengths=None,
    step=None)``: the mask (True: keep) or the lengths of padded samples; the step with ``statistics=PerStep(...)``.

    Raises:
        ValueError: an input with another number of axes; one value per channel in training; a residual of another
            shape; an unknown activation or backend.
        RuntimeError: an input with another number of channels.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm2d(3, activation="relu")
    >>> x = torch.randn(8, 3, 4, 4) * 5 + 2
    >>> y = bn(x, residual=torch.zeros_like(x))
    >>> bool(y.min() >= 0), bn.num_batches_tracked.item()
    (True, 1)

    Differs from ``torch.nn.BatchNorm2d``: running statistics stay float32; a batch with NaN or infinity leaves them and
    ``num_batches_tracked`` as they were and is counted in ``num_batches_skipped`` (not in the ``state_dict``).

    When not to use it: few values per channel (batch 1-8 with small maps: group norm), sequences of varying length
    (layer norm), batches that are not drawn from one distribution.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """


class BatchNorm1d(_Sized, nn.BatchNorm1d, spec=SPEC, dim=1):
    """Standardise each feature of (n, c), or channel of (n, c, l), over the mini-batch: see :class:`BatchNorm2d`.

    >>> import torch, normkit as nk
    >>> nk.BatchNorm1d(2, affine=False)(torch.tensor([[1.0, 0.0], [3.0, 8.0]])).round().tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """


class BatchNorm3d(_Sized, nn.BatchNorm3d, spec=SPEC, dim=3):
    """Standardise each channel of (n, c, d, h, w) over the mini-batch and space: see :class:`BatchNorm2d`."""


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d, spec=SPEC, dim=1, lazy=True):
    """:class:`BatchNorm1d` that takes ``num_features`` from the first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d, spec=SPEC, dim=2, lazy=True):
    """:class:`BatchNorm2d` that takes ``num_features`` from the first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d, spec=SPEC, dim=3, lazy=True):
    """:class:`BatchNorm3d` that takes ``num_features`` from the first input."""

    cls_to_become = BatchNorm3d


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """Batch norm over the batches of all processes: see :class:`BatchNorm2d`, with ``statistics=Synchronized(...)``.

    Args:
        process_group: of ``torch.distributed``; ``None``: all processes.

    The other arguments are those of :class:`BatchNorm2d`. Shapes: (n, c) or (n, c, s...), with any number of axes.

    Differs from ``torch.nn.SyncBatchNorm``: it works on a CPU too (gloo), inside activation checkpointing, with masks
    and with second derivatives; empty batches may be anywhere. As torch's, it is plain batch norm in evaluation, in a
    world of one, and where ``torch.distributed`` is not initialised.

    >>> import torch, normkit as nk
    >>> nk.SyncBatchNorm(8, activation="relu")(torch.randn(4, 8, 5)).shape
    torch.Size([4, 8, 5])

    To change the batch norms of a model that exists, layers and hooks untouched: :func:`normkit.sync_`.
    """

    spec = SPEC

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Activation | type[nn.Module] = None,
        backend: str | None = None,
        low_precision_buffers: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype)
        self._set_bias(bias)
        self._set_statistics(low_precision_buffers)
        self._set_options(activation, backend)

    @property
    def process_group(self) -> Any:
        """As in torch's layer, it may be set."""
        return getattr(self.statistics, "process_group", None)

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self.statistics = Synchronized(group, required=False)

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        self._check_non_zero_input_channels(input)
