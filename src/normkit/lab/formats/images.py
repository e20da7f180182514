"""A folder of images, one folder per class, optionally below train/ and test/ (or val/).

The resize rule: every image is resized (bilinear) and cut at the centre to a square of SIDE pixels; only when all of
them already are squares of one size of at most SIDE, they stay as they are. Grey images stay grey when all of them are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.lab.errors import LabError, missing_extra
from normkit.lab.labelled import Labelled, hold_out

SIDE = 32
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_TEST_FOLDERS = ("test", "val", "valid", "validation")


def recognises(path: Path) -> bool:
    """Whether the directory has folders with images in them."""
    return path.is_dir() and any(_classes(root) for root in (path, path / "train"))


def read(path: Path) -> Labelled:
    """Images (n, c, h, w) in [0, 1], c = 1 or 3, and labels in the alphabetical order of the folders."""
    root = path / "train" if (path / "train").is_dir() and _classes(path / "train") else path
    names = _classes(root)
    if len(names) < 2:
        raise LabError(
            f"--data {path}: one class folder ({names[0]}) has images; expected at least two folders, one per class"
        )
    test_root = next((path / name for name in _TEST_FOLDERS if root != path and (path / name).is_dir()), None)
    roots = [root] if test_root is None else [root, test_root]
    files = [_files(part, names) for part in roots]
    pictures = [[_open(file) for file, _ in part] for part in files]
    mode = "L" if all(picture.mode in ("L", "1") for part in pictures for picture in part) else "RGB"
    side = _side([picture.size for part in pictures for picture in part])
    x = [torch.stack([_pixels(picture, mode, side) for picture in part]) for part in pictures]
    y = [torch.tensor([label for _, label in part]) for part in files]
    if test_root is None:
        return hold_out(x[0], y[0], len(names), path.name)
    return Labelled(x[0], y[0], len(names), (x[1], y[1]), path.name)


def _classes(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and any(map(_is_image, folder.iterdir())))


def _files(root: Path, names: list[str]) -> list[tuple[Path, int]]:
    unknown = sorted(set(_classes(root)) - set(names))
    if unknown:
        raise LabError(
            f"{root / unknown[0]}: this class has no folder in the training data; expected {', '.join(names)}"
        )
    found = [
        (file, label)
        for label, name in enumerate(names)
        if (root / name).is_dir()
        for file in sorted((root / name).iterdir())
        if _is_image(file)
    ]
    if not found:
        raise LabError(f"{root}: no images; expected folders {', '.join(names)} with images in them")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _open(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("Pillow", "lab", "reading an image folder") from None
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LabError(
            f"{path}: no image that can be read, or truncated ({error}); replace or remove the file"
        ) from None


def _side(sizes: list[tuple[int, int]]) -> int:
    sides = {side for size in sizes for side in size}
    return sides.pop() if len(sides) == 1 and max(sides) <= SIDE else SIDE


def _pixels(picture: Any, mode: str, side: int) -> Tensor:
    from PIL import Image, ImageOps

    square = ImageOps.fit(picture.convert(mode), (side, side), Image.Resampling.BILINEAR)
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).float().div_(255)
    return values.view(side, side, len(mode)).permute(2, 0, 1).contiguous()
