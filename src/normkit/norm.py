"""class Norm: what all layers share. Registration, the options, tracing, and torch's errors with their context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import is_lazy
from torch.overrides import has_torch_function

from normkit import dispatch, epilogue
from normkit.call import Call, nobody
from normkit.vocabulary.spec import Spec, register

OVER_CHANNELS = "n [c] s..."
"""What layer and RMS norm pool over with ``channels_first``."""
_MODULE_CALL = nn.Module._wrapped_call_impl
"""What ``Module.__call__`` is, as long as nobody puts something of theirs in its place, as torch.fx does to trace."""


class Norm(nn.Module):
    """A layer defined by a :class:`~normkit.vocabulary.spec.Spec`; stands before torch's class in the bases.

    ``class RMSNorm(Norm, torch.nn.RMSNorm, spec=SPEC)`` registers itself. A subclass without ``spec=`` is a user's own
    variation and is not registered.
    """

    spec: ClassVar[Spec]
    activates: ClassVar[bool] = False
    """It is an activation as well, and wants none behind it (EvoNorm)."""
    activation: nn.Module | None
    backend: str | None

    def __init_subclass__(
        cls, *, spec: Spec | None = None, dim: int | None = None, lazy: bool = False, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if spec is not None:
            cls.spec = spec
            register(cls, spec, dim=dim, lazy=lazy)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], Proxy) and nn.Module.__call__ is _MODULE_CALL:  # nobody traces
            for value in kwargs.values():
                if isinstance(value, Proxy):
                    break
            else:  # small tensors feel every line, so what Module.__call__ does stands here
                if self._compiled_call_impl is None:
                    return self._call_impl(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return traced_as_leaf(self, value.tracer, args, kwargs)
        return super().__call__(*args, **kwargs)

    def _straight(
        self,
        x: Tensor,
        residual: Tensor | None,
        operator: Callable[..., Tensor],
        *arguments: Any,
        by_batch: bool = True,
    ) -> Tensor | None:
        """``operator(*arguments)`` of torch and what follows it, where this would run anyway.

        In the time of torch's own layer. ``None``: the long way decides, and tells errors of the operator in context.
        ``by_batch``: by the statistics of the input.
        """
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or has_torch_function(arguments):
            return None
        activation = self._modules.get("activation") or self.activation  # torch's access takes a microsecond
        followed = residual is not None or activation is not None
        by_name = self.backend == "torch" and not followed and dispatch._recording is None  # nothing to be asked
        if not by_name and not dispatch.straight(
            self.spec, x, activation, followed, self.backend, writes=followed, by_batch=by_batch
        ):
            return None
        if residual is not None and residual.shape != x.shape:
            return None
        try:
            y = operator(*arguments)
        except dispatch.ERRORS as error:
            if type(error) not in dispatch.ERRORS:
                raise
            return None
        if not followed:
            return y
        return dispatch.follow(self, x, y, residual, activation)

    def _parameter(self, name: str) -> Any:
        """``self.weight`` and the like, for which torch's access by name takes a microsecond."""
        own = self._parameters
        return own[name] if name in own else getattr(self, name)  # computed, as under parametrize

    def _by_kernels(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, **details: Any
    ) -> Tensor | None:
        """What the CPU kernels give, where they run for sure; ``None``: the long way decides."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_cpu:
            return None
        if residual is not None and residual.shape != x.shape:
            return None
        activation = self._modules.get("activation") or self.activation
        call = Call(self.spec, x, weight, bias, nobody, eps, residual=residual, activation=activation, **details)
        return dispatch.by_kernels(call, self.backend)

    def _set_options(self, activation: epilogue.Activation | type[nn.Module], backend: str | None) -> None:
        """The keyword-only options that every layer has."""
        self.activation = epilogue.activation_module(activation)
        self.backend = None if backend is None else dispatch.known(backend)

    def _set_bias(self, bias: bool) -> None:
        """``bias=False`` on every version of torch; the torch classes have the argument only since 2.13."""
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as new."""
        reset: Any = getattr(self, "reset_running_stats", None)
        if reset is not None:
            reset()
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = getattr(self, name, None)
            if parameter is not None and not is_lazy(parameter):
                nn.init.constant_(parameter, value)

    @classmethod
    def for_channels(cls, num_channels: int, *, dim: int, **options: Any) -> nn.Module:
        """The layer for ``num_channels`` channels of an input with ``dim`` spatial axes: what ``create`` calls."""
        return cls(num_channels, **options)

    def _check_input_dim(self, input: Tensor) -> None:
        try:
            super()._check_input_dim(input)  # type: ignore[misc]
        except ValueError as error:
            if isinstance(input, Proxy):
                raise  # a layer traced by itself: fx cannot follow the check
            raise ValueError(
                f"{type(self).__name__}: {error}\n  input {tuple(input.shape)}; choose the class by the number of "
                "spatial axes: 1d for (n, c) and (n, c, l), 2d for (n, c, h, w), 3d for (n, c, d, h, w)"
            ) from None

    def extra_repr(self) -> str:
        """torch's text, then the options that differ from torch."""
        options = [super().extra_repr(), *self._extra_options()]
        return ", ".join(option for option in options if option)

    def _extra_options(self) -> list[str]:
        return [] if self.backend is None else [f"backend={self.backend!r}"]

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks here first."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be scripted: torch.jit.script is deprecated in torch and normkit does not "
            "support it.\n  use torch.compile for speed, or torch.export for a program that runs without normkit"
        )


def traced_as_leaf(norm: Norm, tracer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Under ``torch.fx.symbolic_trace``, the node that calls ``norm`` as a whole.

    fx takes modules outside torch.nn apart, which would bake the training mode in and record what hooks do beside the
    hooks. A layer recorded as one call is right in training and in evaluation, and readers of the graph find it there.
    """

    def leaf(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(norm), args, kwargs)

    return tracer.call_module(norm, leaf, args, kwargs)  # so that tracers which keep track of modules see this one


def traced_as_call(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Any:
    """Under ``torch.fx.symbolic_trace``, the node that calls a functional form, as fx records those of torch.

    An activation that is no name becomes a node of its own.
    """
    x, activation = arguments.pop("x"), arguments.pop("activation")
    name = activation if isinstance(activation, str) else None
    node = x.tracer.create_proxy("call_function", function, (x,), {**arguments, "activation": name})
    return node if activation is None or name is not None else activation(node)


_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def machine_eps(dtype: torch.dtype) -> float:
    """The machine epsilon of the arithmetic on values of ``dtype``: float32's, or float64's."""
    return _EPS[torch.float64 if dtype == torch.float64 else torch.float32]


def single_axis(spec: Spec, normalized_shape: Any) -> None:
    """Refuse ``channels_first`` over more than one axis."""
    if len(normalized_shape) != 1:
        raise ValueError(
            f"{spec.name}: channels_first=True normalises over one axis, the channels of (n, c, s...);\n"
            f"  normalized_shape is {tuple(normalized_shape)}; give the number of channels"
        )


def over_channels(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a norm of the last axis to axis 1; the output has the memory format of ``x``."""
    y = norm(x.movedim(1, -1)).movedim(-1, 1)
    return y.contiguous() if x.is_contiguous() else y


def unambiguous(y: Tensor) -> Tensor:
    """``y``, whose gradient goes on in the layout of ``y``.

    Axes of size 1 may have any stride, and with some a channels-last gradient passes for a channels-first one: torch's
    batch norm on the CPU then reads it in the wrong order. Behind a view, that is every channels-last batch of one.
    """
    if y.dim() < 4 or 1 not in y.shape or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return y
    if y.is_contiguous():
        return y.view(-1).view(y.shape)
    rows = y.movedim(1, -1)
    return rows.reshape(-1).view(rows.shape).movedim(-1, 1)


def like(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``: some of torch's operators return channels-first whatever they were given
    (instance norm on the CPU, group norm on a GPU)."""
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return y
    return y.movedim(1, -1).contiguous().movedim(-1, 1)  # vmap does not know contiguous(memory_format=...)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, *, channels_first: bool = True) -> Tensor:
    """``y * weight + bias``, along axis 1 of (n, c, s...) or along the last axes."""
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            y = combine(y, along_channels(parameter, y) if channels_first else parameter)
    return y


def along_channels(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter (c,) as it broadcasts against (n, c, s...)."""
    return parameter.view(-1, *[1] * (x.dim() - 2))


def widened(*tensors: Tensor | None) -> list[Any]:
    """In float32 or better, in which a norm counts that has no one operator in torch."""
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def doubled(*tensors: Tensor | None) -> list[Any]:
    """In float64, in which a norm says what it is."""
    return [None if t is None else t.double() for t in tensors]
