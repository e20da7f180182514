"""data-size: the text task on a part of its text, for norms that need no statistics (`--sweep share=0.01,0.1,1`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from normkit.lab.data import Data, Split, permutation
from normkit.lab.errors import LabError
from normkit.lab.experiment import Experiment
from normkit.lab.tasks.text import text

TARGET = 3.7  # in reach of a quick look on all of the text
ARMS = ("layer", "dyt", "derf")


def data_size(share: float = 0.1, depth: int = 2, width: int = 64, context: int = 64, heads: int = 4) -> Experiment:
    """The Transformer of the task text, trained on `share` of the windows; validation and test are those of text."""
    if not 0 < share <= 1:
        raise LabError(f"data-size with share {share:g}: the part of the text must be above 0 and at most 1")
    whole = text(depth, width, context, heads)
    assert isinstance(whole.data, Data)
    least = whole.batch_size / len(whole.data.train)
    if share < least:
        raise LabError(f"data-size with share {share:g}: one batch of windows is {least:.2g} of the text; choose more")
    return replace(
        whole,
        name="data-size",
        title=f"{whole.title}, {share:.3g} of it",
        description=(
            f"{whole.description} Here training sees {share:.3g} of the windows, the same ones in every arm; with a "
            "small part the same number of steps is many epochs, and what helps is what generalises. A bounded "
            "function in the place of a norm (DyT, Derf) has been reported to win on little data and to lose on much "
            "(arXiv:2604.23434)."
        ),
        data=Data(part(whole.data.train, share), whole.data.validation, whole.data.test),
        arms=ARMS,
        baseline="layer",
        target=TARGET,
        steps=250,
        quick_steps=60,
    )


def part(split: Any, share: float) -> Split:
    """A fixed random part of a split."""
    kept = permutation(len(split), 0, "share of the text")[: max(1, round(share * len(split)))]
    kept = torch.sort(kept).values
    return Split(len(kept), lambda indices: split.take(kept[indices]))
