"""The samples of a run: three splits, and an order of batches that is a function of seed and step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from normkit.lab.errors import LabError
from normkit.lab.seeds import derive, generator

EVALUATION_CHUNK = 512  # samples per forward pass in evaluation: bounds memory, changes no number


class Split:
    """One part of the data: `len` samples, of which `take(indices)` returns inputs and targets as a batch."""

    def __init__(self, length: int, take: Callable[[Tensor], tuple[Any, Tensor]]):
        self.length = length
        self.take = take

    def __len__(self) -> int:
        return self.length

    def chunks(self, size: int = EVALUATION_CHUNK) -> Iterator[tuple[Any, Tensor]]:
        """All samples in order, in batches of at most `size`."""
        for indices in torch.arange(self.length).split(size):
            yield self.take(indices)

    def first(self, count: int) -> tuple[Any, Tensor]:
        """The first samples, as one fixed batch for probing."""
        return self.take(torch.arange(min(count, self.length)))


class Data(NamedTuple):
    """The three splits of an experiment."""

    train: Any
    validation: Any
    test: Any


def as_data(value: Any, where: str = "data") -> Data:
    """Three `Split`s from what a person wrote: pairs of tensors, datasets or loaders; LabError when they do not fit."""
    if not isinstance(value, tuple) or len(value) != 3:
        raise LabError(
            f"{where} gave {_kind(value)} where (train, validation, test) is needed, each a pair of tensors (x, y), "
            "a dataset or a DataLoader"
        )
    return Data(*(as_split(part, f"{name} {where}") for name, part in zip(Data._fields, value, strict=True)))


def as_split(value: Any, where: str) -> Split:
    """One `Split` from a pair of tensors, a map-style dataset or a loader around one."""
    if isinstance(value, Split):
        return value
    if isinstance(value, DataLoader):
        return _dataset_split(value.dataset, value.collate_fn, where)
    if isinstance(value, Dataset):
        return _dataset_split(value, default_collate, where)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        return _tensor_split(value[0], value[1], where)
    raise LabError(f"{where} is {_kind(value)}; give a pair of tensors (x, y), a map-style dataset or a DataLoader")


def _tensor_split(x: Tensor, y: Tensor, where: str) -> Split:
    if len(x) != len(y) or len(x) == 0:
        raise LabError(
            f"{where}: {len(x)} inputs and {len(y)} targets; give one target for every input, and at least one"
        )
    return Split(len(x), lambda indices: (x[indices], y[indices]))


def _dataset_split(dataset: Any, collate: Callable, where: str) -> Split:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise LabError(
            f"{where} is an iterable dataset without a length; every arm must see the same batches in the same order, "
            "so give a dataset with __len__ and __getitem__"
        )
    if len(dataset) == 0:
        raise LabError(f"{where} is empty; give at least one sample")

    def take(indices: Tensor) -> tuple[Any, Tensor]:
        inputs, targets = collate([dataset[int(index)] for index in indices])
        return inputs, targets

    return Split(len(dataset), take)


class Order:
    """Which training samples step number `step` sees: a new permutation each epoch, the last partial batch dropped."""

    def __init__(self, length: int, batch_size: int, seed: int):
        if batch_size > length:
            raise LabError(
                f"a batch of {batch_size} samples cannot be drawn from {length} training samples; choose a batch size "
                f"of at most {length}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = -1
        self.permutation = torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """Indices (batch_size,) of the step counted from 0; stateless, so that a resumed run goes on with the same."""
        epoch, position = divmod(step, self.length // self.batch_size)
        if epoch != self.epoch:
            self.permutation = torch.randperm(self.length, generator=generator(self.seed, "order", epoch))
            self.epoch = epoch
        return self.permutation[position * self.batch_size : (position + 1) * self.batch_size]


def fingerprint(data: Data) -> str:
    """16 hexadecimal digits that change when the data does: 4096 samples of each split, evenly spread."""
    digest = hashlib.sha256()
    for split in data:
        count = min(len(split), 4096)
        indices = torch.linspace(0, len(split) - 1, count, dtype=torch.float64).long()
        digest.update(str(len(split)).encode())
        for part in split.take(indices):
            digest.update(_bytes(part))
    return digest.hexdigest()[:16]


def _bytes(part: Any) -> bytes:
    if isinstance(part, Tensor):
        values = part.detach().cpu().flatten().contiguous()  # by way of bytes: NumPy has no bfloat16
        return f"{part.dtype}{tuple(part.shape)}".encode() + values.view(torch.uint8).numpy().tobytes()
    return repr(part).encode()


def permutation(length: int, seed: int, purpose: str) -> Tensor:
    """A permutation of `length` samples for one purpose."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive(seed, purpose)))


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}"
