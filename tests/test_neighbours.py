"""What stands before and after a norm: as the code tells it and as a pass shows it, and what is measured on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import healthy_models
import normkit as nk
from healthy_models import Residual, batches, digits
from normkit.measure.flow import read_code
from normkit.measure.neighbours import GRAPH, padding, read_neighbours
from normkit.measure.structure import kind_of, read_structure
from normkit.vocabulary.evidence import Evidence
from normkit.vocabulary.reading import Reading

NAMES = {quantity.name for quantity in GRAPH}


def facts(readings: list[Reading]) -> set[tuple[str, object, str]]:
    return {(r.quantity, r.value, r.module) for r in readings if r.quantity in NAMES}


@pytest.mark.parametrize("name", [name for name in healthy_models.OWN if not name.startswith("frozen")])
def test_the_code_and_a_pass_tell_the_same(name):
    model = healthy_models.OWN[name]()
    if read_code(model) is None:
        pytest.skip("torch.fx cannot follow this model: only a pass tells")
    of_code, followed = read_neighbours(model)
    of_pass, _ = read_neighbours(model, digits()[0][:8])
    assert followed
    assert facts(of_code) == facts(of_pass)


def of(model: nn.Module, batch: Tensor | None = None) -> Evidence:
    return Evidence(read_neighbours(model, batch)[0])


class Wired(nn.Module):
    """One of everything: a bias before a norm, a branch that ends in one, dropout, an activation before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.drop, self.conv2, self.norm2 = nn.Dropout(0.5), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.norm3 = nn.ReLU(), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        y = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.conv2(self.drop(y)))
        return self.norm3(self.relu(x)) + self.norm3(-x)


@pytest.mark.parametrize("batch", [None, digits()[0][:16]], ids=["code", "pass"])
def test_what_is_where(batch):
    found = of(Wired(), batch)
    word = lambda quantity: {module: found.word(quantity, module) for module in found.modules(quantity)}
    assert word("bias_before") == {"norm0": "stem"}
    assert word("foldable_into") == {"norm0": "stem", "norm1": "conv1", "norm2": "conv2"}
    assert word("dropout_before") == {"norm2": "drop"}
    assert [module for module, yes in found.numbers("ends_branch") if yes] == ["norm2"]
    assert found.number("calls", "norm3") == 2
    assert found.number("skips") == 2


def test_an_output_that_others_read_is_not_folded_nor_its_bias_useless():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) * y

    assert not {"bias_before", "foldable_into"} & of(Read()).quantities


def test_in_place_additions_and_activations_are_followed():
    class InPlace(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
            y += x
            return F.relu_(y)

    for batch in (None, torch.randn(4, 4, 8, 8)):
        found = of(InPlace(4, nn.BatchNorm2d), batch)
        assert [module for module, yes in found.numbers("ends_branch") if yes] == ["norm2"]


@pytest.mark.parametrize("first", [True, False])
def test_a_norm_in_the_shortcut_ends_no_branch(first):
    class Strided(Residual):
        def __init__(self) -> None:
            super().__init__(4, nn.BatchNorm2d)
            self.shortcut, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            branch, shortcut = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())), self.norm(self.shortcut(x))
            return branch + shortcut if first else shortcut + branch

    for batch in (None, torch.randn(4, 4, 8, 8)):
        found = of(Strided(), batch)
        assert [module for module, yes in found.numbers("ends_branch") if yes] == ["norm2"]


def test_a_model_whose_code_cannot_be_followed_says_so_without_a_batch():
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) if x.sum() > 0 else self.norm(-x)

    readings, followed = read_neighbours(Turns())
    assert (readings, followed) == ([], False)
    assert "a batch" in nk.diagnose(Turns()).not_asked["unfolded_norms"]
    assert of(Turns(), digits()[0][:4]).number("calls", "norm") == 1


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_shift_of_dropout_is_the_one_of_the_formula(p):
    torch.manual_seed(0)
    x = torch.randn(20_000, 4) + 1.0
    model = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(4))
    shift = of(model, x).number("dropout_variance_shift", "1")
    mean, var = x.mean(0), x.var(0, correction=0)
    expected = (((var + mean**2) / (1 - p) - mean**2) / var).log().mean().item()
    assert shift == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_logits_are_those_of_the_definition(causal):
    class Heads(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, is_causal=causal)

    q, k = 3 * torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    found = Evidence(read_neighbours(Heads(), ((q, k), None))[0])
    assert found.number("attention_logit") == pytest.approx((q @ k.mT / 8**0.5).max().item(), rel=1e-5)


def test_attention_by_hand_and_of_torch_is_seen():
    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    x = torch.randn(2, 5, 8)
    assert of(ByHand(), x).number("attention_logit") == pytest.approx((x @ x.mT).max().item(), rel=1e-5)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    found = Evidence(read_neighbours(layer, ((x, x, x), None))[0])
    assert found.number("attention_logit") is not None


def test_padding_is_what_repeats_the_end_of_samples_of_unequal_length():
    x = torch.randn(4, 3, 10)
    assert padding(x) == 0
    x[0, :, 6:] = 0.0
    x[1, :, 8:] = 7.0
    assert padding(x) == pytest.approx((4 + 2) / 40)
    x[:, :, 5:] = 0.0
    assert padding(x) == 0  # samples of equal length: a border


def test_features_along_the_last_axis_are_told_from_channels_along_axis_1():
    class Rows(nn.Module):
        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.linear, self.norm, self.turn = nn.Linear(8, 8), nn.BatchNorm1d(8), turn

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.linear(x.squeeze(1)))
            return self.norm(y.transpose(1, 2) if self.turn else y)

    x = digits()[0][:16]
    assert of(Rows(False), x).word("features_last_before", "norm") == "linear"
    assert "features_last_before" not in of(Rows(True), x)
    assert "features_last_before" not in of(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)), x)


def test_structure_reads_what_stands_in_the_model():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nk.BatchNorm2d(4, momentum=None), nn.GroupNorm(2, 4).eval(), nn.BatchNorm2d(4)
    )
    model[1](torch.randn(4, 4, 3, 3))
    nk.freeze_(model, filter_fn=lambda module, name: name == "3")
    found = Evidence(read_structure(model))
    assert found.word("momentum", "1") == "average"
    assert (found.number("batches_seen", "1"), found.number("statistics_at_start", "1")) == (1, 0)
    assert (found.number("frozen", "1"), found.number("frozen", "3")) == (0, 1)
    assert (found.number("groups", "2"), found.number("in_training", "2")) == (2, 0)
    assert found.word("statistics_dtype", "1") == "float32"
    assert "keeps_statistics" not in [r.quantity for r in found.readings if r.module == "2"]


def test_the_start_is_left_by_the_share_of_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.2))
    for x, _ in batches(3):
        model(x)
    assert Evidence(read_structure(model)).number("start_share", "0") == pytest.approx(0.8**3)


def test_norms_are_known_whoever_wrote_them():
    class LlamaRMSNorm(nn.Module):
        pass

    known = {nn.BatchNorm2d(1): "batch_norm", nn.LayerNorm(1): "layer_norm", nk.DyT(1): "dyt"}
    known |= {LlamaRMSNorm(): "LlamaRMSNorm", nn.InstanceNorm1d(1): "instance_norm", nn.Linear(1, 1): ""}
    for module, kind in known.items():
        assert kind_of(module) == kind
