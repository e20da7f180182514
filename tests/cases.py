"""The inputs that every norm meets, each with its reason, and every norm in every form it has.

None of them is plain ``randn``: that is normalised already, and hides a missing mean, a wrong epsilon and most else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from normkit.layout import parse
from normkit.vocabulary.spec import REGISTRY, Spec

WIDE = ("float64", "float32")
NARROW = ("bfloat16", "float16")
DTYPES = {name: getattr(torch, name) for name in (*WIDE, *NARROW)}


@dataclass(frozen=True)
class Case:
    """One input. ``values`` changes standard normal numbers of shape (n, c, s...) into those of the case."""

    name: str
    why: str
    values: Callable[[Tensor], Tensor]
    samples: int = 4
    channels: int = 12
    space: tuple[int, int, int] = (5, 3, 2)
    """The size of the first, second and third spatial axis."""
    stored: Callable[[Tensor], Tensor] = lambda x: x
    """The same numbers, laid out differently in memory."""
    dims: tuple[int, ...] = (1, 2, 3)
    """For how many spatial axes; 0 is (n, c)."""
    dtypes: tuple[str, ...] = (*WIDE, *NARROW)

    def input(self, form: Form, dtype: torch.dtype) -> Tensor:
        """The input of this case as ``form`` takes it."""
        shape = (self.samples, self.channels, *self.space[: form.dim if self.dims != (0,) else 0])
        x = self.values(torch.randn(shape, dtype=torch.float64)).to(dtype)
        return self.stored(form.arrange(x).contiguous())


def ordinary(z: Tensor) -> Tensor:
    return 5 * z + 3


def with_parts(z: Tensor, axis: int) -> Tensor:
    """Along ``axis``: one slice so small that epsilon decides, one far off, one with a single outlier."""
    x = ordinary(z)
    x.select(axis, 0).mul_(1e-4)
    x.select(axis, 1).add_(1e3)
    x.select(axis, 2)[(-1,) * (x.dim() - 1)] = 300.0
    return x


def constant(z: Tensor) -> Tensor:
    x = ordinary(z)
    x[0], x[:, 0], x[1] = 7.0, -2.0, 0.0
    return x


def sliced(x: Tensor) -> Tensor:
    """Every second element of wider memory, the rest of which is NaN."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """The axes in memory in the opposite order."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def expanded(x: Tensor) -> Tensor:
    """Every sample is the first one, in the same memory."""
    return x[:1].expand_as(x)


CASES = (
    Case("ordinary", "off-centre and off-scale: the mean and the deviation matter", ordinary),
    Case("uneven_samples", "a sample where epsilon decides, one far off, one outlier", lambda z: with_parts(z, 0)),
    Case(
        "uneven_channels", "the same along the channels, for norms that pool over samples", lambda z: with_parts(z, 1)
    ),
    Case("constant", "no variance at all: the output is the bias, and nothing divides by zero", constant),
    Case("offset", "1e4 at deviation 1: E[x²] - E[x]² has no digit left", lambda z: z + 1e4),
    Case("vanishing", "squares underflow in float32", lambda z: ordinary(z) * 1e-25, dtypes=(*WIDE, "bfloat16")),
    Case("enormous", "cubes come near the end of float32", lambda z: ordinary(z) * 1e12, dtypes=(*WIDE, "bfloat16")),
    Case("narrow", "rows shorter than any vector register", ordinary, channels=4, space=(2, 1, 1)),
    Case("tail", "rows that are no multiple of a vector register, and longer than one", ordinary, 3, 36, (7, 3, 1)),
    Case("one_sample", "the batch is one", ordinary, samples=1),
    Case("no_samples", "the batch is empty", ordinary, samples=0),
    Case("no_space", "(n, c): there is no spatial axis", lambda z: with_parts(z, 0), samples=9, dims=(0,)),
    Case("sliced", "gaps between the elements, with NaN in them", ordinary, stored=sliced),
    Case("transposed", "memory in the opposite order", ordinary, stored=transposed),
    Case("expanded", "all samples in the same memory: strides of zero", ordinary, stored=expanded),
    Case("channels_last", "channels next to each other", ordinary, stored=channels_last, dims=(2, 3)),
    Case(
        "channels_last_offset",
        "the same at offset 1e4: kernels for this layout are other kernels",
        lambda z: z + 1e4,
        stored=channels_last,
        dims=(2, 3),
    ),
)


@dataclass(frozen=True)
class Form:
    """One norm as it can be used: a number of spatial axes, the position of the channels, affine or not."""

    name: str
    dim: int
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    trailing: int = 0
    """How many last axes are normalised over; 0: the channels are axis 1."""

    def __str__(self) -> str:
        return f"{self.name}-{self.dim}d{self.label}"

    @property
    def spec(self) -> Spec:
        return REGISTRY[self.name].spec

    def arrange(self, x: Tensor) -> Tensor:
        """(n, c, s...) as this form takes it."""
        return x.movedim(1, -1) if self.trailing else x

    def takes(self, case: Case) -> bool:
        if case.dims != (0,):
            return self.dim in case.dims
        return self.dim == 1 and (
            self.spec.over is None or any(a.pooled and a.name != "s" for a in parse(self.spec.over))
        )

    def layer(self, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """The layer for the input of ``case``, its parameters away from 1 and 0."""
        options = {**self.options, **options}
        if self.trailing > 1:
            shape = (*case.space[: self.dim][1 - self.trailing :], case.channels)
            layer = REGISTRY[self.name].pick(self.dim)(shape, **options)
        else:
            layer = nk.create(self.name, case.channels, dim=self.dim, **options)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        return layer.to(dtype)


def forms() -> Iterator[Form]:
    """Every norm of the registry in every form: a new norm gets all of it."""
    for name in nk.list_norms():
        for dim in (1, 2, 3):
            cls = REGISTRY[name].pick(dim)
            accepted = {*inspect.signature(cls).parameters, *inspect.signature(cls.for_channels).parameters}
            options = {"num_groups": 4} if "num_groups" in accepted else {}
            learned = {option: True for option in ("affine", "track_running_stats") if option in accepted}
            if "channels_first" not in accepted:
                yield Form(name, dim, "", options | learned)
            else:
                yield Form(name, dim, "-channels_first", options | learned | {"channels_first": True})
                yield Form(name, dim, "", options | learned | {"channels_first": False}, trailing=1)
            if dim == 2:
                switches = {"affine", "elementwise_affine", "track_running_stats"} & accepted
                bare = dict.fromkeys(sorted(switches), False)
                if bare:
                    yield Form(name, dim, "-bare", options | bare)
                if "channels_first" in accepted:
                    yield Form(name, dim, "-two_axes", options | {"channels_first": False}, trailing=2)


FORMS = tuple(forms())
ORDINARY = CASES[0]


def meetings(cases: Iterable[Case] = CASES, forms: Iterable[Form] = FORMS) -> list:
    """Every form with every case that it takes, for ``pytest.mark.parametrize(("form", "case"), ...)``."""
    cases = tuple(cases)
    return [pytest.param(form, case, id=f"{form}-{case.name}") for form in forms for case in cases if form.takes(case)]
