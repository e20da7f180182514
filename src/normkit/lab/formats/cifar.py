"""CIFAR-10's binary version: records of 1 label byte and 3072 bytes, red, green and blue planes of 32 x 32 pixels.

The Python version of the same data is a pickle and is not read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from normkit.lab.errors import LabError
from normkit.lab.labelled import Labelled, hold_out

_RECORD = 1 + 3 * 32 * 32
_CLASSES = 10


def recognises(path: Path) -> bool:
    """Whether the directory holds data_batch_*.bin, or only the Python version (which gets its own error)."""
    return path.is_dir() and any(path.glob("data_batch_*"))


def read(path: Path) -> Labelled:
    """Images (n, 3, 32, 32) in [0, 1] and labels; test_batch.bin is the test data when it is there."""
    batches = sorted(path.glob("data_batch_*.bin"))
    if not batches:
        raise LabError(
            f"--data {path}: data_batch_1 without .bin is the Python version of CIFAR-10, a pickle, and pickles are "
            "not read; fetch the binary version (cifar-10-binary.tar.gz)"
        )
    parts = [_read_batch(batch) for batch in batches]
    x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    test = path / "test_batch.bin"
    if not test.exists():
        return hold_out(x, y, _CLASSES, path.name)
    return Labelled(x, y, _CLASSES, _read_batch(test), path.name)


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    content = path.read_bytes()
    if not content or len(content) % _RECORD:
        raise LabError(
            f"{path}: {len(content)} bytes; expected a multiple of {_RECORD} (1 label byte and 3072 pixel bytes per "
            "image, 30730000 bytes for 10000 images); the file is truncated or no CIFAR-10 binary batch"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _RECORD)
    labels = records[:, 0].long()
    if int(labels.max()) >= _CLASSES:
        raise LabError(
            f"{path}: label {int(labels.max())} in record {int(labels.argmax())}; expected labels 0 to 9, so this is "
            "no CIFAR-10 binary batch (CIFAR-100 has two label bytes and is not read)"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32).float().div_(255), labels
