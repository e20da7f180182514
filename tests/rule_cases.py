"""For every rule: models that are well, models that are sick, and how the sick ones are cured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit as nk
from healthy_models import Residual, batches, digits, mlp, residual
from normkit.diagnosis import Diagnosis
from normkit.vocabulary.finding import Severity
from normkit.vocabulary.reading import Reading


@dataclass
class Asked:
    """What a doctor is shown: a model with what goes with it, or the readings of a run."""

    model: nn.Module | None = None
    batch: Any = None
    loss_fn: Callable[..., Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    readings: Iterable[Reading] = ()
    call: Callable[[nn.Module, Any], Any] | None = None

    def diagnose(self, rule: str) -> Diagnosis:
        if self.model is None:
            return Diagnosis.of_readings(self.readings, {}, select=rule)
        return nk.diagnose(self.model, self.batch, self.loss_fn, self.optimizer, select=rule, call=self.call)


@dataclass(frozen=True)
class Case:
    """One way to be sick."""

    rule: str
    severity: Severity
    sick: Callable[[], Asked]
    well: Callable[[], Asked]
    """Nearly the same, and nothing is wrong with it."""
    cure: Callable[[Asked], Asked] | None = None
    """By hand; ``None``: apply_ carries the prescription out."""
    safety: str = "retrain"
    given: dict[str, Any] = field(default_factory=dict)
    name: str = ""


def images(count: int = 64) -> Tensor:
    return digits()[0][:count]


def with_batch(model: nn.Module, batch: Any = None) -> Asked:
    return Asked(model, images() if batch is None else batch)


def with_loss(model: nn.Module) -> Asked:
    return Asked(model, (images(), digits()[1][:64]), F.cross_entropy)


def moved(model: nn.Module, steps: int = 100) -> nn.Module:
    """Running statistics of digits."""
    model.train()
    with torch.no_grad():
        for x, _ in batches(steps):
            model(x)
    return model


def convolution(norm: nn.Module, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, bias=bias), norm, nn.ReLU())


def changed(model: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


def without_gradients(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def half_frozen() -> nn.Sequential:
    model = convolution(nn.BatchNorm2d(8))
    without_gradients(model[1])
    return model


def by_hand(change: Callable[[nn.Module], object]) -> Callable[[Asked], Asked]:
    """What a person would do about it, on a copy."""

    def cure(asked: Asked) -> Asked:
        return replace(asked, model=changed(copy.deepcopy(asked.model), change))

    return cure


def instead(build: Callable[[], Asked]) -> Callable[[Asked], Asked]:
    """What a person would build in its place."""
    return lambda asked: build()


class Sequences(nn.Module):
    """Features along the last axis, and a batch norm that takes axis 1 for them, or is given it."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.turned = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), turned

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x.squeeze(1))
        return self.norm(y.transpose(1, 2)).transpose(1, 2) if self.turned else self.norm(y)


class Twice(nn.Module):
    """One norm on two inputs."""

    def __init__(self, shift: float, norms: int = 1) -> None:
        super().__init__()
        self.norms, self.shift = nn.ModuleList(nn.BatchNorm2d(1) for _ in range(norms)), shift

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](x) + self.norms[-1](x + self.shift)


class Attention(nn.Module):
    """Queries and keys of some size, normalised or not."""

    def __init__(self, size: float, normalised: bool = False) -> None:
        super().__init__()
        self.size, self.norm = size, nn.RMSNorm(8) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        query, key = self.norm(self.size * x), self.norm(self.size * x)
        return F.scaled_dot_product_attention(query, key, x)


class HandwrittenLayerNorm(nn.Module):
    """In the type that comes in, or in float32; means by torch's mean, or by another operator."""

    def __init__(self, width: int, wide: bool = False, averaged_by: Callable[[Tensor, Tensor], Tensor] | None = None):
        super().__init__()
        self.weight, self.wide, self.averaged_by = nn.Parameter(torch.ones(width)), wide, averaged_by

    def forward(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.float() if self.wide else x
        d = x - self.mean(x)
        return (d * (self.mean(d.square()) + 1e-5).rsqrt()).to(given) * self.weight

    def mean(self, x: Tensor) -> Tensor:
        if self.averaged_by is None:
            return x.mean(-1, keepdim=True)
        return self.averaged_by(x, torch.full((1, x.shape[-1]), 1 / x.shape[-1], dtype=x.dtype))


def in_half(norm: nn.Module, mean: float, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Asked:
    return Asked(nn.Sequential(norm).to(dtype), (scale * images().squeeze(1) + mean).to(dtype))


def under_autocast(norm: nn.Module) -> Asked:
    def call(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    return Asked(nn.Sequential(norm), images().squeeze(1) + 30, call=call)


class Padded(nn.Module):
    """Sequences (n, c, l) through a batch norm, with or without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def lengths(short: int) -> Tensor:
    """(64, 8, 8), padded with 0 from a length on that alternates between ``short`` and 8."""
    x = images().squeeze(1).clone()
    x[::2, :, short:] = 0.0
    x[1::2, :, -1] += 1.0
    return x


def plain_deep(depth: int, norm: bool = True, skip: bool = False, activation: Any = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for place in range(depth):
        block = [nn.Linear(64, 64, bias=False), *([nn.BatchNorm1d(64)] if norm else []), activation()]
        layers.append(Skip(nn.Sequential(*block)) if skip and place else nn.Sequential(*block))
    return nn.Sequential(*layers, nn.Linear(64, 10))


class Skip(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.branch(x)


def dropping(p: float, behind: bool = False) -> nn.Module:
    norm, dropout = nn.BatchNorm2d(8), nn.Dropout(p)
    body = [nn.Conv2d(1, 8, 3), nn.ReLU()]
    tail = [nn.Conv2d(8, 8, 3, bias=False)]
    return nn.Sequential(*body, *([*tail, norm, dropout] if behind else [dropout, *tail, norm]))


def averaged() -> Asked:
    """Weights from one place, running statistics from another."""
    model = moved(mlp("batch"))
    with torch.no_grad():
        model[1].weight.mul_(5.0)
    return Asked(model.eval(), (images(), digits()[1][:64]), F.cross_entropy)


def run(**series: list[float]) -> Asked:
    """Readings of a run, a step each; ``kind`` and the like of one batch norm beside them."""
    facts = [Reading("kind", "batch_norm", "norm"), Reading("keeps_statistics", 1.0, "norm")]
    facts += [Reading("in_training", 1.0, "norm")]
    of_norm = ("statistics_moves", "rank_spread")
    of_parameter = ("update_to_weight",)
    place = lambda name: "norm" if name in of_norm else "weight" if name in of_parameter else ""
    values = [Reading(n, v, place(n), step) for n, vs in series.items() for step, v in enumerate(vs)]
    values += [Reading("buffers_overwritten", 1.0)] if "processes" in series else []
    return Asked(readings=[*facts, *values])


def same_run(**series: list[float]) -> Callable[[Asked], Asked]:
    return instead(lambda: run(**series))


def open_network(scale: float) -> Asked:
    model = residual(nn.BatchNorm2d, blocks=16, width=4)
    for block in model.modules():
        if isinstance(block, Residual):
            nn.init.constant_(block.norm2.weight, scale)
    return Asked(model)


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> Asked:
    return Asked(model, optimizer=optimizer)


def replaced() -> Asked:
    model = convolution(nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1] = nn.GroupNorm(2, 8)
    return optimized(model, optimizer)


def synchronised() -> nn.Module:
    model = convolution(nn.BatchNorm2d(8))
    nk.sync_(model)
    return model


def converted() -> Asked:
    return Asked(nn.SyncBatchNorm.convert_sync_batchnorm(convolution(nk.BatchNorm2d(8, activation="relu"))))


def decayed(groups: bool) -> Asked:
    model = convolution(nn.BatchNorm2d(8))
    parameters = nk.param_groups(model, 0.1) if groups else model.parameters()
    return optimized(model, torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1))


def dead(bias: float) -> nn.Module:
    model = mlp(None)
    nn.init.constant_(model[1].bias, bias)
    return model


def after_activation(bias: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
    nn.init.constant_(model[0].bias[:4], bias)
    return model


def set_bias(value: float) -> Callable[[nn.Module], object]:
    return lambda model: [
        nn.init.constant_(m.bias, value) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]


def float_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.float()


def batch_norm(**options: Any) -> Asked:
    return Asked(convolution(nn.BatchNorm2d(8, **options)))


def fill(name: str, value: float) -> Callable[[nn.Module], object]:
    return lambda model: (
        model.get_parameter(name).view(-1)[:1].fill_(value)
        if name.endswith("weight")
        else (model.get_buffer(name)[:1].fill_(value))
    )


def well_evaluated() -> Asked:
    return Asked(moved(convolution(nn.BatchNorm2d(8))).eval())


def small_images(model: nn.Module, size: float) -> Asked:
    return Asked(model, images() * size)


def nan_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target) + (output.sum() * 0.0).sqrt()


def gaps(model: nn.Module, factor: float) -> Asked:
    """Running variances that are off by a factor, in a model in training."""
    moved(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.mul_(factor)
    return Asked(model, (images(), digits()[1][:64]), F.cross_entropy)


LOADER = {"loader": [x for x, _ in batches(4)]}
GROUPS = [nn.Flatten(), nn.Linear(64, 8), nn.GroupNorm(8, 8), nn.ReLU()]

CASES = (
    Case(
        "first_nan",
        "error",
        lambda: Asked(readings=[Reading("first_nan", "0 (Linear) gives the first values that are not finite", "0", 7)]),
        lambda: run(gradient_nonfinite=[0.0]),
        same_run(gradient_nonfinite=[0.0]),
    ),
    Case(
        "non_finite_parameters",
        "error",
        lambda: Asked(changed(convolution(nn.BatchNorm2d(8)), fill("0.weight", float("nan")))),
        batch_norm,
        by_hand(fill("0.weight", 0.0)),
    ),
    Case(
        "non_finite_gradients",
        "error",
        lambda: Asked(mlp("batch"), (images(), digits()[1][:64]), nan_loss),
        lambda: with_loss(mlp("batch")),
        instead(lambda: with_loss(mlp("batch"))),
    ),
    Case(
        "non_finite_statistics",
        "error",
        lambda: Asked(changed(convolution(nn.BatchNorm2d(8)), fill("1.running_var", float("inf"))), images()),
        batch_norm,
        given=LOADER,
    ),
    Case(
        "non_finite_statistics",
        "error",
        lambda: Asked(changed(convolution(nn.BatchNorm2d(8)), fill("1.running_var", -1.0)), images()),
        well_evaluated,
        given=LOADER,
        name="negative variance",
    ),
    Case(
        "activation_lost",
        "error",
        converted,
        batch_norm,
        instead(
            lambda: (lambda model: (nk.sync_(model), Asked(model))[1])(
                convolution(nk.BatchNorm2d(8, activation="relu"))
            )
        ),
    ),
    Case(
        "channels_on_wrong_axis",
        "error",
        lambda: with_batch(Sequences(False)),
        lambda: with_batch(Sequences(True)),
        instead(lambda: with_batch(Sequences(True))),
    ),
    Case(
        "groups_of_one",
        "error",
        lambda: with_batch(nn.Sequential(*GROUPS)),
        lambda: with_batch(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GroupNorm(2, 8))),
    ),
    Case(
        "few_values_per_channel",
        "error",
        lambda: with_batch(mlp("batch"), images(2)),
        lambda: with_batch(mlp("batch")),
        instead(lambda: with_batch(mlp("batch"))),
        name="two",
    ),
    Case(
        "few_values_per_channel",
        "warning",
        lambda: with_batch(mlp("batch"), images(6)),
        lambda: with_batch(residual(nn.BatchNorm2d), images(32)),
        lambda asked: (nk.convert_(asked.model, "group:auto"), asked)[1],
        name="six",
    ),
    Case(
        "optimizer_misses_parameters",
        "error",
        replaced,
        lambda: decayed(True),
        lambda asked: optimized(asked.model, torch.optim.SGD(asked.model.parameters(), lr=0.1)),
    ),
    Case(
        "exported_in_training",
        "error",
        lambda: Asked(readings=[*run(exported=[1.0]).readings]),
        lambda: Asked(readings=[*run(exported=[0.0]).readings]),
        instead(lambda: Asked(readings=[r for r in run(exported=[1.0]).readings if r.quantity != "in_training"])),
    ),
    Case("frozen_but_training", "error", lambda: with_batch(half_frozen()), batch_norm, safety="eval_identical"),
    Case(
        "momentum_reversed",
        "warning",
        lambda: batch_norm(momentum=0.99),
        lambda: batch_norm(momentum=0.01),
        by_hand(lambda model: setattr(model[1], "momentum", 0.01)),
    ),
    Case(
        "momentum_reversed",
        "error",
        lambda: batch_norm(momentum=0.0),
        lambda: batch_norm(momentum=None),
        by_hand(lambda model: setattr(model[1], "momentum", None)),
        name="never",
    ),
    Case(
        "half_precision_statistics",
        "error",
        lambda: Asked(convolution(nn.BatchNorm2d(8)).half()),
        lambda: Asked(convolution(nk.BatchNorm2d(8)).half()),
        by_hand(float_statistics),
    ),
    Case(
        "imprecise_arithmetic",
        "warning",
        lambda: in_half(HandwrittenLayerNorm(8), 30.0),
        lambda: in_half(HandwrittenLayerNorm(8), 0.0),
        instead(lambda: in_half(HandwrittenLayerNorm(8, wide=True), 30.0)),
    ),
    Case(
        "imprecise_arithmetic",
        "error",
        lambda: in_half(HandwrittenLayerNorm(8), 0.0, torch.float16, 400.0),
        lambda: in_half(nn.LayerNorm(8), 0.0, torch.float16, 400.0),
        instead(lambda: in_half(nk.LayerNorm(8), 0.0, torch.float16, 400.0)),
        name="overflow",
    ),
    Case(
        "imprecise_arithmetic",
        "warning",
        lambda: under_autocast(HandwrittenLayerNorm(8, averaged_by=F.linear)),
        lambda: under_autocast(HandwrittenLayerNorm(8)),
        instead(lambda: under_autocast(nk.LayerNorm(8))),
        name="autocast",
    ),
    Case(
        "statistics_hold_their_start",
        "error",
        lambda: with_batch(convolution(nn.BatchNorm2d(8)).eval()),
        well_evaluated,
        given=LOADER,
        safety="train_identical",
    ),
    Case(
        "statistics_hold_their_start",
        "warning",
        lambda: with_batch(moved(convolution(nn.BatchNorm2d(8)), 3).eval()),
        lambda: Asked(moved(convolution(nn.BatchNorm2d(8, momentum=None)), 3).eval()),
        lambda asked: with_batch(moved(asked.model, 60).eval()),
        name="three batches",
    ),
    Case(
        "synchronization_cannot_work",
        "note",
        lambda: Asked(synchronised()),
        batch_norm,
        safety="eval_identical",
    ),
    Case(
        "ranks_differ",
        "warning",
        lambda: run(rank_spread=[0.0, 0.5]),
        lambda: run(rank_spread=[0.0, 0.01]),
        same_run(rank_spread=[0.5, 0.0]),
    ),
    Case(
        "forward_twice_before_backward",
        "warning",
        lambda: run(forward_passes=[2.0] * 3, backward_passes=[1.0] * 3, processes=[4.0]),
        lambda: run(forward_passes=[2.0] * 3, backward_passes=[1.0] * 3, processes=[1.0]),
        same_run(forward_passes=[1.0] * 3, backward_passes=[1.0] * 3, processes=[4.0]),
    ),
    Case(
        "accumulation_splits_batches",
        "warning",
        lambda: run(forward_passes=[4.0] * 3),
        lambda: run(forward_passes=[2.0] * 3, backward_passes=[1.0] * 3),
        same_run(forward_passes=[1.0] * 3),
    ),
    Case(
        "statistics_move_twice",
        "warning",
        lambda: run(statistics_moves=[2.0] * 3, backward_passes=[1.0] * 3),
        lambda: run(statistics_moves=[4.0] * 3, backward_passes=[4.0] * 3),
        same_run(statistics_moves=[1.0] * 3, backward_passes=[1.0] * 3),
    ),
    Case(
        "padding_in_statistics",
        "warning",
        lambda: with_batch(Padded(), lengths(3)),
        lambda: with_batch(Padded(), lengths(8)),
        instead(lambda: with_batch(Padded(), lengths(8))),
    ),
    Case(
        "shared_norm",
        "warning",
        lambda: with_batch(Twice(3.0)),
        lambda: with_batch(Twice(0.0)),
        instead(lambda: with_batch(Twice(3.0, norms=2))),
    ),
    Case(
        "dropout_before_norm",
        "warning",
        lambda: with_batch(dropping(0.5)),
        lambda: with_batch(dropping(0.5, behind=True)),
        instead(lambda: with_batch(dropping(0.0))),
    ),
    Case(
        "no_running_statistics",
        "warning",
        lambda: batch_norm(track_running_stats=False),
        lambda: Asked(convolution(nn.InstanceNorm2d(8))),
        instead(batch_norm),
    ),
    Case(
        "norm_after_activation",
        "warning",
        lambda: with_batch(after_activation(-100.0)),
        lambda: with_batch(after_activation(0.5)),
        instead(lambda: with_batch(convolution(nn.BatchNorm2d(8)))),
    ),
    Case(
        "dead_activations",
        "warning",
        lambda: with_batch(dead(-20.0)),
        lambda: with_batch(dead(0.0)),
        by_hand(set_bias(0.0)),
    ),
    Case(
        "saturated_activations",
        "warning",
        lambda: small_images(mlp(None, nn.Tanh), 100.0),
        lambda: with_batch(mlp(None, nn.Tanh)),
        instead(lambda: small_images(mlp("batch", nn.Tanh), 100.0)),
    ),
    Case(
        "attention_logits",
        "warning",
        lambda: with_batch(Attention(10.0)),
        lambda: with_batch(Attention(1.0)),
        instead(lambda: with_batch(Attention(10.0, normalised=True))),
    ),
    Case(
        "signal_lost_with_depth",
        "warning",
        lambda: with_batch(plain_deep(12, norm=False)),
        lambda: with_batch(plain_deep(12)),
        instead(lambda: with_batch(plain_deep(12))),
    ),
    Case(
        "gradients_explode",
        "warning",
        lambda: with_loss(plain_deep(40)),
        lambda: with_loss(plain_deep(4)),
        instead(lambda: with_loss(plain_deep(40, skip=True))),
    ),
    Case(
        "gradients_explode",
        "warning",
        lambda: with_loss(plain_deep(10, norm=False, activation=nn.Sigmoid)),
        lambda: with_loss(plain_deep(3, norm=True, activation=nn.Sigmoid)),
        instead(lambda: with_loss(plain_deep(4, norm=True, activation=nn.Sigmoid))),
        name="vanishing",
    ),
    Case(
        "constant_channels",
        "warning",
        lambda: small_images(convolution(nn.BatchNorm2d(8)), 1e-3),
        lambda: with_batch(convolution(nn.BatchNorm2d(8))),
        instead(lambda: with_batch(convolution(nn.BatchNorm2d(8)))),
    ),
    Case(
        "pruned_channels",
        "note",
        lambda: Asked(changed(convolution(nn.BatchNorm2d(8)), lambda model: model[1].weight[:2].fill_(1e-5))),
        lambda: open_network(0.0),
        by_hand(lambda model: model[1].weight.fill_(1.0)),
    ),
    Case(
        "stale_statistics",
        "error",
        averaged,
        lambda: with_loss(moved(mlp("batch"))),
        given=LOADER,
        safety="train_identical",
    ),
    Case(
        "train_eval_gap",
        "error",
        lambda: gaps(changed(moved(mlp("batch")), lambda m: m[-1].weight.mul_(5.0)), 0.01),
        lambda: gaps(mlp("batch"), 1.0),
        given=LOADER,
        safety="train_identical",
    ),
    Case(
        "update_size",
        "warning",
        lambda: run(update_to_weight=[0.2] * 3),
        lambda: run(update_to_weight=[0.2, 1e-3, 1e-3]),
        same_run(update_to_weight=[1e-3] * 3),
    ),
    Case(
        "update_size",
        "warning",
        lambda: run(update_to_weight=[1e-8] * 3),
        lambda: run(update_to_weight=[1e-4] * 3),
        same_run(update_to_weight=[1e-3] * 3),
        name="too small",
    ),
    Case(
        "loss_spikes",
        "warning",
        lambda: run(loss=[1.0] * 6 + [9.0, 1.0]),
        lambda: run(loss=[3.0, 2.0, 1.5, 1.2, 1.1, 1.0, 2.0]),
        same_run(loss=[1.0] * 8),
    ),
    Case(
        "loss_spikes",
        "error",
        lambda: run(loss=[1.0, float("nan")]),
        lambda: run(loss=[1.0]),
        same_run(loss=[1.0] * 8),
        name="no number",
    ),
    Case(
        "norm_parameters_decay", "note", lambda: decayed(False), lambda: decayed(True), instead(lambda: decayed(True))
    ),
    Case(
        "bias_before_norm",
        "note",
        lambda: Asked(convolution(nn.BatchNorm2d(8), bias=True)),
        batch_norm,
        instead(batch_norm),
    ),
    Case(
        "residual_branches_start_open",
        "note",
        lambda: open_network(1.0),
        lambda: open_network(0.0),
        instead(lambda: open_network(0.0)),
    ),
    Case(
        "unfolded_norms",
        "note",
        well_evaluated,
        batch_norm,
        lambda asked: Asked(nk.fold(asked.model, example_inputs=images())),
    ),
)
