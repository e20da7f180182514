"""Model, optimizer and initial weights of one arm: the same linear weights for every arm that has the same seed."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from normkit.blocks import fixup_
from normkit.clipping import clip_adaptively_before_steps
from normkit.lab.arm import OPTIONS, Arm
from normkit.lab.binding import bind_norms
from normkit.lab.errors import LabError, nearest
from normkit.lab.experiment import Experiment
from normkit.lab.initial import scale_weights_, weights_fingerprint
from normkit.lab.norm_layer import NormLayer, norms_of
from normkit.lab.seeds import derive, generator
from normkit.statistics import Synchronized

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,  # weight decay 0.01, as torch has it
}


def build_model(experiment: Experiment, arm: Arm, seed: int) -> tuple[nn.Module, str]:
    """The network of an arm in training mode, and the fingerprint of its weights before the arm's gain.

    The builder runs under a seeded global generator and norms draw nothing, so weights that it draws itself agree
    across arms too; `Experiment.initial` draws from a generator of its own.
    """
    seed_everything(derive(seed, "model"))
    model = experiment.model(NormLayer(arm.norm, experiment.dim, arm.running), **_options(experiment, arm))
    if not isinstance(model, nn.Module):
        raise LabError(
            f"the model builder of {experiment.name} returned {type(model).__name__}; expected a torch.nn.Module"
        )
    if not norms_of(model):
        raise LabError(
            f"the model builder of {experiment.name} never called norm_layer, so every arm would be the same network; "
            "build each norm as norm_layer(num_features)"
        )
    _check_processes(experiment, model, arm)
    bind_norms(model, arm.name)
    if experiment.initial is not None:
        experiment.initial(model, generator(seed, "weights"))
    drawn = weights_fingerprint(model)
    if arm.residual == "fixup":
        fixup_(model, head=_head(model), draw=False)
    if arm.init != 1:
        scale_weights_(model, arm.init)
    return model.train(), drawn


def build_optimizer(experiment: Experiment, arm: Arm, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The arm's optimizer, or the experiment's when the arm names none."""
    name = arm.optimizer or experiment.optimizer
    options = experiment.optimizer_options if name == experiment.optimizer else {}
    optimizer = _OPTIMIZERS[name](model.parameters(), lr=lr, **options)
    if arm.clip is not None:
        clip_adaptively_before_steps(optimizer, arm.clip, skip=_head(model).parameters())
    return optimizer


def _head(model: nn.Module) -> nn.Module:
    """The last linear layer: the classifier."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def seed_everything(seed: int) -> None:
    """Seeds the global generators of torch, Python and (when something imported it) numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def check_arms(experiment: Experiment, arms: tuple[Arm, ...]) -> None:
    """Builds every arm's network once; raises LabError for an arm that cannot be built, before anything is trained."""
    for arm in arms:
        try:
            build_model(experiment, arm, seed=0)
        except LabError:
            raise
        except Exception as error:
            raise LabError(
                f"arm {arm.name!r}: the network of {experiment.name} cannot be built: {type(error).__name__}: {error}"
            ) from error


def _check_processes(experiment: Experiment, model: nn.Module, arm: Arm) -> None:
    if arm.processes > 1 and experiment.update is not None:
        raise LabError(
            f"arm {arm.name!r} averages the gradients of {arm.processes} processes in every step, and "
            f"{experiment.name} takes its steps by itself; leave processes:{arm.processes} out"
        )
    policies = [getattr(norm, "statistics", None) for norm in norms_of(model).values()]
    if arm.processes == 1 and any(isinstance(policy, Synchronized) for policy in policies):
        raise LabError(
            f"arm {arm.name!r} synchronises the statistics of several processes, and its runs have one; write "
            f"{arm.name}+processes:2"
        )


def _options(experiment: Experiment, arm: Arm) -> dict[str, Any]:
    """What the arm asks of the builder beyond its norm; LabError when the builder does not take it."""
    asked: dict[str, tuple[Any, bool]] = {
        "dropout": (arm.dropout, arm.dropout != 0),
        "placement": (arm.placement, arm.placement != "before"),
        "residual": (arm.residual, arm.residual != "plain"),
    } | {key: (value, True) for key, value in arm.choices}
    parameters = inspect.signature(experiment.model).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, (_, needed) in asked.items():
        if needed and not takes_all and name not in parameters:
            meant = "" if name in OPTIONS else nearest(name, (*OPTIONS, *parameters))
            raise LabError(
                f"arm {arm.name!r} needs `{name}`{meant}, but the model builder of {experiment.name} takes "
                f"({', '.join(parameters)}); add a parameter `{name}` to the builder or leave the arm out"
            )
    return {name: value for name, (value, _) in asked.items() if takes_all or name in parameters}
