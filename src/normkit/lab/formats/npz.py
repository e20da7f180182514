"""An .npz file with x and y (and, if they are there, x_test and y_test), read with allow_pickle=False.

x: (n, features), grey images (n, h, w), or images with 1, 3 or 4 channels, first (n, c, h, w) or last (n, h, w, c).
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.lab.errors import LabError, missing_extra
from normkit.lab.labelled import Labelled, hold_out

_CHANNELS = (1, 3, 4)


def recognises(path: Path) -> bool:
    """Whether the path is an .npz file."""
    return path.is_file() and path.suffix == ".npz"


def read(path: Path) -> Labelled:
    """Samples and labels; labels may be any integers or words, they are numbered in sorted order."""
    arrays = _load(path)
    import numpy as np

    x, y = _inputs(path, "x", arrays["x"]), arrays["y"]
    _check_labels(path, "y", y, len(x))
    names, labels = np.unique(y, return_inverse=True)
    if len(names) < 2:
        raise LabError(f"{path}: y has one class only ({names[0]!r}); expected at least two")
    target = torch.from_numpy(labels.astype(np.int64))
    if "x_test" not in arrays:
        return hold_out(x, target, len(names), path.stem)
    test_x, test_y = _inputs(path, "x_test", arrays["x_test"]), arrays["y_test"]
    _check_labels(path, "y_test", test_y, len(test_x))
    unknown = set(np.unique(test_y).tolist()) - set(names.tolist())
    if unknown or test_x.shape[1:] != x.shape[1:]:
        raise LabError(
            f"{path}: x_test and y_test do not fit x and y (shapes {test_x.shape}, {x.shape}; labels {unknown})"
        )
    test = (test_x, torch.from_numpy(np.searchsorted(names, test_y).astype(np.int64)))
    return Labelled(x, target, len(names), test, path.stem)


def _load(path: Path) -> dict[str, Any]:
    try:
        import numpy as np
    except ImportError:
        raise missing_extra("numpy", "lab", "reading an .npz file") from None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("x", "y", "x_test", "y_test")}
            found = file.files
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise LabError(
            f"{path}: not an .npz file of plain arrays ({error}); write it with numpy.savez(path, x=x, y=y)"
        ) from None
    for name in ("x", "y", *(("y_test",) if "x_test" in arrays else ())):
        if name not in arrays:
            raise LabError(f"{path}: holds {', '.join(found) or 'nothing'}; expected arrays x and y: {name} is missing")
    return arrays


def _inputs(path: Path, name: str, array: Any) -> Tensor:
    if array.dtype.kind not in "fiub" or array.ndim not in (2, 3, 4) or array.size == 0:
        raise LabError(
            f"{path}: {name} has dtype {array.dtype} and shape {array.shape}; expected numbers of shape (n, features), "
            "(n, h, w), (n, c, h, w) or (n, h, w, c)"
        )
    x = torch.from_numpy(array.astype("float32"))
    if not bool(torch.isfinite(x).all()):
        raise LabError(
            f"{path}: {name} has {int((~torch.isfinite(x)).sum())} values that are nan or inf; remove them first"
        )
    if x.ndim == 3:
        return x.unsqueeze(1)
    if x.ndim == 4 and x.shape[1] not in _CHANNELS and x.shape[3] in _CHANNELS:
        return x.permute(0, 3, 1, 2).contiguous()
    return x


def _check_labels(path: Path, name: str, y: Any, count: int) -> None:
    if y.dtype.kind not in "iubUS" or y.shape != (count,):
        raise LabError(
            f"{path}: {name} has dtype {y.dtype} and shape {y.shape}; expected one integer or word per sample, "
            f"shape ({count},)"
        )
