"""A user's own data: the format is recognised from what lies at the path, and nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path

from normkit.lab.errors import LabError
from normkit.lab.formats import cifar, idx, images, npz
from normkit.lab.labelled import Labelled

FORMATS = (
    "MNIST-style IDX files (train-images-idx3-ubyte and train-labels-idx1-ubyte, plain or .gz), CIFAR-10's binary "
    "version (data_batch_1.bin ...), a folder with one folder of images per class, or an .npz file with x and y"
)


def read(path: str | Path) -> Labelled:
    """Labelled samples from a file or directory; LabError names the file and what was expected."""
    path = Path(path).expanduser()
    if not path.exists():
        raise LabError(f"--data {path}: no such file or directory; give {FORMATS}")
    for reader in (npz, idx, cifar, images):
        if reader.recognises(path):
            return reader.read(path)
    found = "the file" if path.is_file() else f"{len(list(path.iterdir()))} entries"
    raise LabError(f"--data {path}: {found} in no format that is known; give {FORMATS}")
