"""Reading the words of a command line into the dataclass of a verb."""

from __future__ import annotations

import re
from typing import TypeVar

import tyro

from normkit.cli.errors import UserError

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], argv: list[str], verb: str) -> Arguments:
    """Fill ``kind``, a dataclass whose docstrings are the help, from ``argv``.

    Raises:
        SystemExit: status 0 after ``--help``, status 2 after arguments that do not fit; tyro has printed why.
    """
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(kind, args=argv, prog=f"normkit {verb}", config=config)


def shape(text: str, option: str = "--shape") -> tuple[int, ...]:
    """``"8,64,56,56"`` (or ``8x64x56x56``) as sizes; each is at least 1.

    Raises:
        UserError: not a list of positive whole numbers.
    """
    sizes = re.split(r"\s*[,x×]\s*", text.strip("()[] "))
    if not all(re.fullmatch(r"\d+", size) and int(size) > 0 for size in sizes):
        raise UserError(
            f"{option} {text!r} is not a shape.\n"
            f"  write positive whole numbers with commas between: {option} 8,64,56,56"
        )
    return tuple(int(size) for size in sizes)
