"""nk.param_groups: weights decay, norms and biases do not, whatever has been done to the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normkit as nk


class LlamaRMSNorm(nn.Module):
    """A norm of somebody else, which has its name to go by."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.mixing = nn.Parameter(torch.ones(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.LSTM(4, 4)
        self.wide = nn.LayerNorm((3, 4))
        self.norm = nn.Sequential(nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nk.DyT(4), LlamaRMSNorm(4))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.normed = weight_norm(nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))


def names(model: nn.Module, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_what_decays_and_what_does_not():
    model = Everything()
    decaying, spared = nk.param_groups(model, weight_decay=0.3)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert names(model, decaying) == {
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "norm.3.mixing",
        "normed.parametrizations.weight.original0",
        "normed.parametrizations.weight.original1",
        "scale",
    }
    assert len(decaying["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_every_parameter_is_there_once_and_in_order():
    model = Everything()
    model.norm[0].weight.requires_grad = False
    groups = nk.param_groups(model)
    place = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    for group in groups:
        numbers = [place[id(parameter)] for parameter in group["params"]]
        assert numbers == sorted(set(numbers))
    torch.optim.AdamW(groups)  # which refuses a parameter in two groups


def test_a_weight_that_is_a_norm_elsewhere_does_not_decay():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.LayerNorm((1, 4), bias=False))
    model[1].weight = model[0].weight
    (group,) = nk.param_groups(model)
    assert group["weight_decay"] == 0.0


def test_it_is_the_same_after_surgery():
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))

    for operate in (nk.accelerate_, nk.sync_, lambda m: nk.convert_(m, "dyt"), lambda m: nk.convert_(m, "group:2")):
        model = fresh()
        operate(model)
        decaying, spared = nk.param_groups(model)
        assert names(model, decaying) == {"0.weight", "2.weight"}
        assert {"0.bias", "1.weight", "1.bias", "2.bias"} <= names(model, spared)


def test_options_and_exceptions():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    decaying, spared = nk.param_groups(model, 0.1, no_decay=lambda name, parameter: name == "1.weight", lr=0.5)
    assert decaying["lr"] == spared["lr"] == 0.5
    assert names(model, spared) == {"0.bias", "1.weight", "1.bias"}
