"""The data that ships inside scikit-learn, or a user's own in its place."""

from __future__ import annotations

import torch

from normkit.lab import formats
from normkit.lab.errors import LabError, missing_extra
from normkit.lab.labelled import Labelled, hold_out

# 1797 digits are 1000 for training, 297 for validation and 500 for testing.
DIGITS_VALIDATION, DIGITS_TEST = 297, 500
# 569 tumours are 341 / 114 / 114: 60, 20 and 20 percent.
CANCER_VALIDATION, CANCER_TEST = 114, 114


def digits(data: str | None) -> tuple[Labelled, int | None]:
    """scikit-learn's 8x8 digits as images in [0, 1], or the user's images; and the size of the validation part."""
    if data is not None:
        return formats.read(data), None
    x, y = _load("load_digits")
    return hold_out(x.float().div(16).view(-1, 1, 8, 8), y, 10, "digits", DIGITS_TEST), DIGITS_VALIDATION


def cancer(data: str | None) -> tuple[Labelled, int | None]:
    """scikit-learn's breast-cancer table (569 tumours, 30 features), or the user's table."""
    if data is not None:
        return formats.read(data), None
    x, y = _load("load_breast_cancer")
    return hold_out(x.float(), y, 2, "breast cancer", CANCER_TEST), CANCER_VALIDATION


def images(data: str | None, task: str) -> tuple[Labelled, int | None]:
    """As `digits`, for a task that needs images."""
    source, validation = digits(data)
    if not source.is_image:
        raise LabError(
            f"{task} needs images, and {source.name} has {source.features} features per sample; give x of shape "
            "(n, h, w), (n, c, h, w) or (n, h, w, c), or take the task tabular or digits-relu"
        )
    return source, validation


def _load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        from sklearn import datasets
    except ImportError:
        raise missing_extra("scikit-learn", "lab", "this task's data") from None
    x, y = getattr(datasets, name)(return_X_y=True)
    return torch.from_numpy(x), torch.from_numpy(y).long()
