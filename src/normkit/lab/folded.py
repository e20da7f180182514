"""The trained network in evaluation, as it is and folded: the time of a batch, and how far the outputs agree."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import normkit as nk
from normkit.lab.closing import in_turns
from normkit.lab.data import Data
from normkit.lab.norm_layer import norms_of
from normkit.lab.probe import SAMPLES

MEASURES = ("evaluation_ms", "folded_ms", "fold_error")


@torch.no_grad()
def measure(model: nn.Module, data: Data, batch_size: int) -> dict[str, float | None]:
    """All of MEASURES; the last two None where no norm goes as a whole.

    evaluation_ms: median milliseconds for a batch with the network as training left it. folded_ms: the same after
    `blocks.settle_` and `nk.fold`, the two in turns. fold_error: greatest difference of the outputs on samples that the
    fold has not seen, over their greatest value.
    """
    trained = copy.deepcopy(model).eval()
    batch, others = data.validation.first(batch_size)[0], data.test.first(SAMPLES)[0]
    wanted = trained(others)
    folded = _folded(trained, batch) if _keeps_numbers(trained) and bool(torch.isfinite(wanted).all()) else None
    turns = in_turns(_timed(trained, batch), _timed(trained if folded is None else folded, batch))
    before, after = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
    if folded is None:
        return dict(zip(MEASURES, (before, None, None), strict=True))
    error = float((folded(others) - wanted).abs().max() / wanted.abs().max())
    return dict(zip(MEASURES, (before, after, error), strict=True))


def _keeps_numbers(model: nn.Module) -> bool:
    """Whether evaluation goes by numbers of the training anywhere: those of layer and RMS norm come with the input."""
    return any(next(norm.buffers(), None) is not None for norm in norms_of(model).values())


def _folded(model: nn.Module, batch: Any) -> nn.Module | None:
    """A new model without the norms that can go; None where none can, or where layer norm has a share still."""
    try:
        settled = nk.blocks.settle_(copy.deepcopy(model))
    except ValueError:
        return None
    folded: Any = nk.fold(settled, batch)
    return folded if folded.certificate.changed else None


def _timed(model: nn.Module, batch: Any) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model(batch)
        return time.perf_counter() - begin

    return run
