"""IDX files as MNIST has them (http://yann.lecun.com/exdb/mnist describes the format), plain or gzipped.

Magic number: two zero bytes, the type (0x08: unsigned byte), the number of dimensions; then each dimension as a
big-endian 32-bit integer, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from normkit.lab.errors import LabError
from normkit.lab.labelled import Labelled, hold_out

_UNSIGNED_BYTE = 0x08


def recognises(path: Path) -> bool:
    """Whether the directory holds IDX files."""
    return path.is_dir() and bool(_candidates(path))


def read(path: Path) -> Labelled:
    """Images (n, 1, h, w) in [0, 1] and labels; t10k-* (or test-*) files are the test data when they are there."""
    x, y = _pair(path, "train")
    classes = int(y.max()) + 1
    if not any(part.name.startswith(("t10k-", "test-")) for part in _candidates(path)):
        return hold_out(x, y, classes, path.name)
    test = _pair(path, "t10k" if _find(path, "t10k", "images") else "test")
    return Labelled(x, y, max(classes, int(test[1].max()) + 1), test, path.name)


def read_idx(path: Path) -> Tensor:
    """The array of one IDX file of unsigned bytes, uint8."""
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or not 1 <= content[3] <= 4:
        raise LabError(
            f"{path}: not an IDX file of unsigned bytes; expected it to start with 00 00 08 and the number of "
            f"dimensions, found {content[:4].hex(' ') or 'nothing'}"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise LabError(f"{path}: truncated in its header; expected {start} bytes, found {len(content)}")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise LabError(
            f"{path}: expected {start + math.prod(shape)} bytes for the shape {shape} in its header, found "
            f"{len(content)}; the file is truncated or damaged, fetch it again"
        )
    return torch.frombuffer(bytearray(content[start:]) or bytearray(1), dtype=torch.uint8)[: math.prod(shape)].view(
        shape
    )


def _pair(path: Path, part: str) -> tuple[Tensor, Tensor]:
    files = [_find(path, part, kind) for kind in ("images", "labels")]
    for kind, file in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), files, strict=True):
        if file is None:
            raise LabError(f"--data {path}: {part}-{kind} (or {part}-{kind}.gz) is missing beside the other IDX files")
    images, labels = (read_idx(file) for file in files if file is not None)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) == 0:
        raise LabError(
            f"{files[0]} has shape {tuple(images.shape)} and {files[1]} has shape {tuple(labels.shape)}; expected "
            "images (n, height, width) and labels (n) of the same n > 0"
        )
    return images.float().div_(255).unsqueeze(1), labels.long()


def _candidates(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if "-idx" in file.name or ".idx" in file.name)


def _find(path: Path, part: str, kind: str) -> Path | None:
    return next((file for file in _candidates(path) if file.name.startswith(f"{part}-{kind}")), None)


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise LabError(f"{path}: not a complete gzip file ({error}); fetch it again") from None
