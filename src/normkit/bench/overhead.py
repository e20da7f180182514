"""The fixed extra cost of a call: normkit's layers against torch's on tensors where it shows, and where it must not.

Issue by size: on one value per weight nothing but the call is timed; from 1 MB up, normkit's torch backend has to stay
within 5 % of torch's own layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from normkit.bench.cases import Case

WIDTH = 64


def _sizes() -> Iterator[Case]:
    images = {"tiny": (2, WIDTH, 4, 4), "1 MB": (8, WIDTH, 22, 23), "4 MB": (8, WIDTH, 44, 47)}
    rows = {"tiny": (8, WIDTH), "1 MB": (4096, WIDTH), "4 MB": (16384, WIDTH)}
    for size in images:
        for norm in ("batch", "instance", "group:8"):
            yield Case(norm, images[size], size)
        yield Case("batch", images[size], size, activation="relu", residual=True)
        for norm in ("layer", "rms"):
            yield Case(norm, rows[size], size, features_last=True)


SIZES: tuple[Case, ...] = tuple(_sizes())
