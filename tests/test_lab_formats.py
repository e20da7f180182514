"""Every format of --data with real files, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from normkit.lab import LabError, formats
from normkit.lab.formats.images import SIDE

COUNT = 30
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 5, 4), dtype=np.uint8)
LABELS = (np.arange(COUNT) % 3).astype(np.uint8)


def write_idx(path, array):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, ending="", test=False):
    for part in ("train", *(("t10k",) if test else ())):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", PIXELS)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", LABELS)


def write_cifar(path, count=COUNT, label=3):
    images = np.random.default_rng(1).integers(0, 256, (count, 3072), dtype=np.uint8)
    path.write_bytes(np.hstack([np.full((count, 1), label, np.uint8), images]).tobytes())
    return images


def write_images(folder, mode="L", size=(6, 6), classes=("ant", "bee"), count=12):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new(mode, size, color=index * 10 if mode == "L" else (index * 10, 0, 255)).save(
                folder / name / f"{index}.png"
            )


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_as_mnist_has_them(tmp_path, ending):
    write_mnist(tmp_path, ending, test=True)
    found = formats.read(tmp_path)
    assert found.x.shape == (COUNT, 1, 5, 4)
    assert torch.equal((found.x[:, 0] * 255).round().to(torch.uint8), torch.from_numpy(PIXELS))
    assert found.y.tolist() == LABELS.tolist()
    assert (found.classes, len(found.test[0])) == (3, COUNT)


def test_idx_files_without_test_files_are_split(tmp_path):
    write_mnist(tmp_path)
    found = formats.read(str(tmp_path))
    assert (len(found.x), len(found.test[0])) == (COUNT - COUNT // 4, COUNT // 4)


def _damage_idx(tmp_path, how):
    write_mnist(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    if how == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
    elif how == "header only":
        images.write_bytes(images.read_bytes()[:7])
    elif how == "no idx":
        images.write_bytes(b"GIF89a, really")
    elif how == "floats":
        images.write_bytes(b"\0\0\x0d\x03" + images.read_bytes()[4:])
    elif how == "labels missing":
        labels.unlink()
    elif how == "fewer labels":
        write_idx(labels, LABELS[:-1])
    elif how == "torn gzip":
        images.rename(tmp_path / "x")
        write_idx(tmp_path / "train-images-idx3-ubyte.gz", PIXELS)
        gz = tmp_path / "train-images-idx3-ubyte.gz"
        gz.write_bytes(gz.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "truncated",
            r"train-images-idx3-ubyte: expected 616 bytes for the shape \(30, 5, 4\) in its header, found 615",
        ),
        ("header only", "truncated in its header; expected 16 bytes, found 7"),
        ("no idx", "train-images-idx3-ubyte: not an IDX file.*found 47 49 46 38"),
        ("floats", "not an IDX file of unsigned bytes.*found 00 00 0d 03"),
        ("labels missing", "train-labels-idx1-ubyte .*is missing"),
        ("fewer labels", r"shape \(30, 5, 4\).*shape \(29,\).*same n"),
        ("torn gzip", r"train-images-idx3-ubyte\.gz: not a complete gzip file"),
    ],
)
def test_wrong_idx_files_are_named_with_what_was_expected(tmp_path, how, words):
    _damage_idx(tmp_path, how)
    with pytest.raises(LabError, match=words):
        formats.read(tmp_path)


def test_cifar_binary_batches(tmp_path):
    first = write_cifar(tmp_path / "data_batch_1.bin")
    write_cifar(tmp_path / "data_batch_2.bin", label=9)
    write_cifar(tmp_path / "test_batch.bin", count=7)
    found = formats.read(tmp_path)
    assert found.x.shape == (2 * COUNT, 3, 32, 32)
    assert found.classes == 10
    assert found.y.tolist() == [3] * COUNT + [9] * COUNT
    assert torch.equal((found.x[0] * 255).round().to(torch.uint8).flatten(), torch.from_numpy(first[0]))
    assert len(found.test[0]) == 7


def test_wrong_cifar_batches_are_named(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    write_cifar(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(LabError, match=r"data_batch_1\.bin: 92185 bytes; expected a multiple of 3073"):
        formats.read(tmp_path)
    write_cifar(path, label=77)
    with pytest.raises(LabError, match="label 77 in record 0; expected labels 0 to 9"):
        formats.read(tmp_path)


def test_the_pickled_version_of_cifar_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was read",))

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LabError, match="pickles are not read; fetch the binary version"):
        formats.read(tmp_path)


def test_a_folder_of_grey_images_keeps_its_size(tmp_path):
    write_images(tmp_path)
    found = formats.read(tmp_path)
    assert found.x.shape == (18, 1, 6, 6)
    assert found.classes == 2
    assert {round(float(value) * 255) for value in found.x.flatten()} <= {index * 10 for index in range(12)}
    assert sorted(torch.cat([found.y, found.test[1]]).tolist()) == [0] * 12 + [1] * 12


def test_coloured_images_of_other_sizes_are_cut_to_squares(tmp_path):
    write_images(tmp_path / "train", mode="RGB", size=(50, 40))
    write_images(tmp_path / "test", mode="RGB", size=(40, 50), count=2)
    found = formats.read(tmp_path)
    assert found.x.shape == (24, 3, SIDE, SIDE)
    assert found.test[0].shape == (4, 3, SIDE, SIDE)
    assert bool((found.x[:, 2] == 1).all())


def test_wrong_image_folders_are_named(tmp_path):
    write_images(tmp_path / "one", classes=("ant",))
    with pytest.raises(LabError, match=r"one class folder \(ant\).*at least two"):
        formats.read(tmp_path / "one")
    write_images(tmp_path / "two")
    broken = tmp_path / "two" / "ant" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(LabError, match=r"3\.png: no image that can be read"):
        formats.read(tmp_path / "two")
    broken.write_text("not a picture")
    with pytest.raises(LabError, match=r"3\.png: no image that can be read"):
        formats.read(tmp_path / "two")
    write_images(tmp_path / "three" / "train")
    write_images(tmp_path / "three" / "test", classes=("ant", "cat"))
    with pytest.raises(LabError, match="cat: this class has no folder in the training data"):
        formats.read(tmp_path / "three")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((7,), (7,)), ((5, 4), (1, 5, 4)), ((3, 5, 4), (3, 5, 4)), ((5, 4, 3), (3, 5, 4)), ((1, 5, 4), (1, 5, 4))],
)
def test_npz_vectors_and_images(tmp_path, shape, expected):
    x = np.random.default_rng(0).normal(size=(COUNT, *shape))
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["cat", "ant", "bee"])[LABELS])
    found = formats.read(tmp_path / "a.npz")
    assert tuple(found.x.shape[1:]) == expected
    assert found.classes == 3
    together = torch.cat([found.x, found.test[0]])
    assert np.isclose(float(together.sum()), x.sum(), rtol=1e-4)
    assert torch.bincount(torch.cat([found.y, found.test[1]])).tolist() == [10, 10, 10]


def test_npz_with_test_arrays_and_labels_that_do_not_start_at_zero(tmp_path):
    x = np.arange(80.0).reshape(40, 2)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) % 2 * 5 - 7, x_test=x[:6], y_test=np.array([-7, -2] * 3))
    found = formats.read(tmp_path / "a.npz")
    assert found.y[:4].tolist() == [0, 1, 0, 1]
    assert found.test[1].tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((30, 2))}, "holds x; expected arrays x and y: y is missing"),
        ({"a": np.zeros(3)}, "holds a; expected arrays x and y"),
        ({"x": np.zeros((30, 2)), "y": np.zeros(29, int)}, r"y has dtype int64 and shape \(29,\).*\(30,\)"),
        ({"x": np.zeros((30, 2)), "y": np.linspace(0, 1, 30)}, "y has dtype float64.*one integer or word"),
        ({"x": np.zeros(30), "y": np.zeros(30, int)}, r"x has dtype float64 and shape \(30,\)"),
        ({"x": np.zeros((30, 2)), "y": np.zeros(30, int)}, "one class only"),
        ({"x": np.full((30, 2), np.nan), "y": np.arange(30) % 2}, "60 values that are nan or inf"),
        ({"x": np.zeros((9, 2)), "y": np.arange(9) % 2}, "9 samples are too few"),
        (
            {"x": np.zeros((30, 2)), "y": np.arange(30) % 2, "x_test": np.zeros((4, 3)), "y_test": np.zeros(4, int)},
            "x_test and y_test do not fit",
        ),
        ({"x": np.zeros((30, 2)), "y": np.arange(30) % 2, "x_test": np.zeros((4, 2))}, "y_test is missing"),
    ],
)
def test_wrong_npz_files_are_named(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(LabError, match=rf"(?s)a\.npz: .*{words}|{words}"):
        formats.read(tmp_path / "a.npz")


def test_a_pickle_inside_an_npz_is_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}] * 30, dtype=object), y=np.arange(30) % 2)
    with pytest.raises(LabError, match=r"a\.npz: not an \.npz file of plain arrays"):
        formats.read(tmp_path / "a.npz")


def test_a_truncated_npz_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 2)), y=np.arange(30) % 2)
    path = tmp_path / "a.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LabError, match=r"a\.npz: not an \.npz file"):
        formats.read(path)


def test_what_is_no_known_format_lists_the_formats(tmp_path):
    with pytest.raises(LabError, match="no such file or directory; give MNIST-style"):
        formats.read(tmp_path / "nothing")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(LabError, match=r"a\.csv: the file in no format that is known"):
        formats.read(tmp_path / "a.csv")
    with pytest.raises(LabError, match="1 entries in no format that is known"):
        formats.read(tmp_path)
