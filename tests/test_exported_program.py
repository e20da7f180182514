"""An exported program becomes a model of layers that computes the same, under the names that it had."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit as nk
from normkit.integrations.exported_program import EXPORTED, layered

pytestmark = pytest.mark.slow


class Everything(nn.Module):
    """Each operator that becomes a layer; one layer twice; functions that no layer called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.conv, self.shared = nn.Conv2d(8, 8, 3, stride=2, dilation=1, groups=2), nn.BatchNorm2d(8)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.line, self.volume = nn.Conv1d(8, 8, 3, padding=1), nn.Conv3d(8, 8, 1)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.RMSNorm(8, eps=1e-6), nn.SiLU())
        self.tail = nn.Sequential(nn.BatchNorm1d(8, affine=False, momentum=0.3), nn.Tanh(), nn.Linear(8, 4, bias=False))

    def forward(self, x):
        x = self.shared(self.conv(self.stem(x)))
        x = x + F.sigmoid(self.instance(self.group(self.shared(2 * x))))
        x = self.volume(x.unsqueeze(2)).squeeze(2).flatten(2)
        x = F.hardswish(self.line(x)).mean(2)
        return self.tail(self.head(F.layer_norm(x, (8,))))


def moved(model: nn.Module) -> nn.Module:
    """No buffer and no scale as it was made."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def of_the_model(model: nn.Module) -> dict[str, str]:
    return {name: repr(layer) for name, layer in model.named_modules() if name and not [*layer.children()]}


@pytest.mark.parametrize("training", [False, True])
def test_it_has_the_same_layers_and_computes_the_same(training):
    model, x = moved(Everything()).train(training), torch.randn(5, 3, 8, 8)
    found = layered(torch.export.export(model, (x,)))
    made = of_the_model(found)
    for name, words in of_the_model(model).items():
        assert made.pop(name) == words.replace("inplace=True", "").replace("ReLU(inplace=True)", "ReLU()"), name
    assert sorted(words.partition("(")[0] for words in made.values()) == ["Hardswish", "LayerNorm", "Sigmoid"]
    assert found.meta[EXPORTED]
    for layer, module in (
        (found.get_submodule(n), m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)
    ):
        assert layer.training is training
        assert torch.equal(layer.running_var, module.running_var)
    for batch in (x, torch.randn(9, 3, 8, 8)):
        assert torch.equal(found(batch), model(batch))
    for (name, ours), theirs in zip(model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    if training:
        state = found.state_dict()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name in state)


def test_it_is_diagnosed_like_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.99), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)
    )
    program, x = torch.export.export(model.eval(), (torch.randn(2, 3, 8, 8),)), torch.randn(32, 3, 8, 8)
    of_program, of_model = nk.diagnose(program, x), nk.diagnose(model, x)
    assert [finding.rule for finding in of_program.findings] == [finding.rule for finding in of_model.findings]
    same = {(r.quantity, r.module): r.value for r in of_model.readings if isinstance(r.value, float)}
    for reading in of_program.readings:
        if reading.quantity != "exported" and isinstance(reading.value, float):
            assert same.pop((reading.quantity, reading.module)) == pytest.approx(reading.value, rel=1e-5, nan_ok=True)
    assert {quantity for quantity, _ in same} <= {"exported"}


def test_a_module_is_handed_back():
    model = nn.Linear(2, 2)
    assert layered(model) is model
