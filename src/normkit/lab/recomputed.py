"""The same trained weights, evaluated with other statistics than the running ones: what the running ones cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.arm import Arm
from normkit.lab.build import build_model
from normkit.lab.data import Data
from normkit.lab.experiment import Experiment
from normkit.lab.norm_layer import norms_of
from normkit.lab.probe import untouched_generators
from normkit.statistics import MovingAverage, Virtual
from normkit.statistics.policy import plain_state_dict

MEASURES = ("test_exact", "test_batch")
MOST = 1024  # training samples that are pooled, in one batch: more would not fit the memory of every task


@torch.no_grad()
def measure(model: nn.Module, experiment: Experiment, arm: Arm, data: Data, batch_size: int) -> dict[str, Any]:
    """Both of MEASURES; None for an arm with another norm than batch norm, or one that goes by a reference batch, and
    where no norm of the arm is in what evaluation runs (a discriminator's).

    test_exact: the metric on test data with the statistics of the training set as one batch, so that each norm has the
    moments of just what reaches it. test_batch: with those of the test batch, of at least `batch_size` samples.
    """
    if not all(map(_goes_by_running_statistics, norms_of(model).values())):
        return dict.fromkeys(MEASURES)
    with untouched_generators():
        twin = _of_one_batch(model, experiment, arm)
        if twin is None:
            return dict.fromkeys(MEASURES)
        inputs, _ = data.train.first(MOST)
        ran: list[nn.Module] = []
        hooks = [norm.register_forward_hook(lambda norm, *_: ran.append(norm)) for norm in norms_of(twin).values()]
        twin(inputs)
        if not ran:
            return dict.fromkeys(MEASURES)
        for hook in hooks:
            hook.remove()
        exact = _evaluate(twin.eval(), experiment, data.test.chunks())
        _measuring(twin)
        parts = torch.arange(len(data.test)).tensor_split(max(1, len(data.test) // batch_size))
        return {"test_exact": exact, "test_batch": _evaluate(twin, experiment, map(data.test.take, parts))}


def _goes_by_running_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(
        getattr(norm, "statistics", None), Virtual
    )


def _of_one_batch(model: nn.Module, experiment: Experiment, arm: Arm) -> nn.Module | None:
    """The trained network with norms that go by one batch and by nothing before it, about to measure.

    None where norms were folded away in training.
    """
    averaging = any(isinstance(getattr(norm, "statistics", None), MovingAverage) for norm in norms_of(model).values())
    norm = "batch:moving_average:1" if averaging else "batch"
    twin, _ = build_model(experiment, replace(arm, norm=norm, processes=1), seed=0)
    if norms_of(twin).keys() != norms_of(model).keys():
        return None
    twin.load_state_dict(plain_state_dict(model))
    for layer in norms_of(twin).values():
        layer.reset_running_stats()  # type: ignore[operator]
        layer.momentum = None  # type: ignore[assignment]  # one batch is all that it averages over
    return _measuring(twin)


def _measuring(model: nn.Module) -> nn.Module:
    """In evaluation, but for the norms: dropout is no part of the question."""
    model.eval()
    for norm in norms_of(model).values():
        norm.train()
    return model


def _evaluate(model: nn.Module, experiment: Experiment, batches: Iterable[tuple[Any, Tensor]]) -> float:
    outputs, targets = zip(*((model(x), y) for x, y in batches), strict=True)
    return float(experiment.metric.function(torch.cat(outputs), torch.cat(targets)))
