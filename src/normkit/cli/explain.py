"""``normkit explain``: which backend runs a norm on an input, and why the others do not."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

import normkit as nk
from normkit.cli import arguments, explain_rule
from normkit.cli.errors import UserError, from_user
from normkit.cli.output import show, show_json
from normkit.layout import parse
from normkit.rules import RULES
from normkit.vocabulary.spec import find


@dataclass
class Explain:
    """Which backend runs a norm on a shape, and why the others do not; or what a rule of `normkit doctor` means."""

    norm: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NORM")]
    """A norm (group, group:32, BatchNorm2d, ln), or without --shape a rule of the doctor (train_eval_gap)."""
    shape: Annotated[str, tyro.conf.arg(metavar="N,C,...")]
    """Sizes of the input: 8,64,56,56. Channels are the second size; of layer, rms and dyt on three axes the last."""
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    """Type of the elements."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "cpu"
    """Where the input lies: cpu, cuda, cuda:1."""
    channels_last: bool = False
    """The channels of one position lie next to each other in memory."""
    activation: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """What follows the norm inside the same layer: relu, leaky_relu, silu, gelu."""
    evaluate: Annotated[bool, tyro.conf.arg(name="eval")] = False
    """In evaluation, where batch norm uses its running statistics."""
    backend: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Ask for one backend by name: it runs, or says why it cannot."""
    json: bool = False
    """Print the same as JSON."""


def main(argv: list[str]) -> int:
    if argv and argv[0] in RULES:
        return explain_rule.main(argv)
    if argv and "--shape" not in argv and (near := difflib.get_close_matches(argv[0], RULES, n=1, cutoff=0.6)):
        raise UserError(f"there is no rule {argv[0]!r}.\n  did you mean {near[0]!r}?")
    asked = arguments.parse(Explain, argv, "explain")
    shape = arguments.shape(asked.shape)
    x = _input(asked, shape)
    with from_user():
        layer = _layer(asked, x)
        explanation = nk.explain(layer, x)
        if explanation.problem is not None and explanation.problem.values == 1:
            with warnings.catch_warnings(action="ignore"):
                layer(x)  # which norms take a single value, and which refuse it, only a forward pass says
    if asked.json:
        show_json(explanation.to_json())
    else:
        answer, *details = str(explanation).splitlines()
        show(answer, "\n".join(details), then="normkit list")
    return 0


def _input(asked: Explain, shape: tuple[int, ...]) -> Tensor:
    """An input of this shape; nothing reads what is in it."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if not 2 <= len(shape) <= 5:
        raise UserError(
            f"--shape {asked.shape} has {len(shape)} axes; a norm layer sees 2 to 5.\n"
            "  write n,c or n,c,l (sequences) or n,c,h,w (images) or n,c,d,h,w (volumes)"
        )
    if asked.channels_last and len(shape) not in formats:
        raise UserError(
            f"--channels-last is a layout of images and volumes; --shape {asked.shape} has {len(shape)} axes.\n"
            "  write four sizes (n,c,h,w) or five (n,c,d,h,w), or leave --channels-last out"
        )
    try:
        x = torch.empty(shape, dtype=getattr(torch, asked.dtype), device=_device(asked.device))
    except (RuntimeError, TypeError) as error:  # TypeError: a size that is no 64-bit number
        raise UserError(
            f"--shape {asked.shape} does not fit into the memory of {asked.device}.\n  {_first_sentence(error)}"
        ) from error
    return x.to(memory_format=formats[len(shape)]) if asked.channels_last else x


def _device(name: str) -> torch.device:
    """The device of that name, if tensors can be made on it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of device types that torch has given up
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
        reason = _first_sentence(error)
        raise UserError(f"--device {name} cannot be used here.\n  {reason}\n  `normkit env` lists the GPUs") from error


def _first_sentence(error: Exception) -> str:
    """What torch says, without the page of operators that it may say next."""
    return str(error).splitlines()[0].partition(". ")[0]


def _layer(asked: Explain, x: Tensor) -> nn.Module:
    """The layer for this input."""
    options = {"activation": asked.activation, "backend": asked.backend}
    dim = max(1, x.dim() - 2)
    layer = nk.create(asked.norm, x.shape[1], dim=dim, **options)
    if not getattr(layer, "channels_first", True):  # a norm of features: they are the last axis, as in a transformer
        layer = nk.create(asked.norm, x.shape[-1], dim=dim, **options)
    spec = find(asked.norm.partition(":")[0])[0].spec
    if x.dim() == 2 and _pools_space_alone(spec.over):
        raise UserError(
            f"--shape {asked.shape} has no spatial axes, and {spec.name} pools over nothing else.\n"
            "  write n,c,l (sequences) or n,c,h,w (images) or n,c,d,h,w (volumes)"
        )
    return layer.to(device=x.device, dtype=x.dtype).train(not asked.evaluate)


def _pools_space_alone(over: str | None) -> bool:
    return over is not None and {axis.name for axis in parse(over) if axis.pooled} == {"s"}
