"""Batches from what a person names after ``--data``: arrays or tensors in a file, or a function that yields them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normkit import imported
from normkit.cli.errors import UserError, require

FILES = (".npz", ".pt", ".pth")


@dataclass(frozen=True)
class Batches:
    """A tensor, or a tuple or a dict of tensors, cut along the first axis."""

    samples: Any
    size: int

    def __len__(self) -> int:
        return -(-self._count() // self.size)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self._count(), self.size):
            yield pytree.tree_map(lambda tensor: tensor[start : start + self.size], self.samples)  # noqa: B023

    def _count(self) -> int:
        return len(pytree.tree_leaves(self.samples)[0])


def batches(named: str, size: int) -> Iterable[Any]:
    """The batches that ``--data`` names.

    Raises:
        UserError: there are none; the message says why.
    """
    if size < 1:
        raise UserError(f"--batch-size {size}: a batch has at least one sample")
    place, colon, _ = named.rpartition(":")
    if colon and (place.endswith(".py") or not Path(named).exists()):
        return _yielded(named)
    path = Path(named)
    if path.suffix not in FILES:
        raise UserError(f"--data {named}: give a file that ends in {', '.join(FILES)}, or file.py:function")
    if not path.is_file():
        raise UserError(f"--data {named}: there is no such file")
    samples = _arrays(path) if path.suffix == ".npz" else _tensors(path)
    leaves = pytree.tree_leaves(samples)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        raise UserError(f"--data {named}: give a tensor, or a tuple or a dict of tensors, with the samples in front")
    if len({len(leaf) for leaf in leaves}) > 1 or not len(leaves[0]):
        lengths = ", ".join(str(len(leaf)) for leaf in leaves)
        raise UserError(f"--data {named}: its tensors are not of one number of samples, one or more: {lengths}")
    return Batches(samples, size)


def _yielded(named: str) -> Iterable[Any]:
    try:
        function = imported.function(named)
    except ValueError as error:
        raise UserError(f"--data {named}: {error}") from error
    try:
        found = function()
    except Exception as error:
        raise UserError(f"--data {named}: raised {imported.describe(error)}") from error
    if isinstance(found, Tensor | Mapping) or not isinstance(found, Iterable):
        raise UserError(
            f"--data {named}: returned a {type(found).__name__}; a function gives batches: a loader, a list, or yields"
        )
    return found


def _arrays(path: Path) -> Any:
    require("numpy")
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            named = {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"--data {path}: cannot be read as arrays of numbers: {error}") from error
    return next(iter(named.values())) if len(named) == 1 else named


def _tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"--data {path}: cannot be read as tensors: {str(error).splitlines()[0]}") from error
