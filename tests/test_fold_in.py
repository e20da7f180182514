"""nk.fold_: frozen norms go into the layers beside them, in a model that goes on training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normkit as nk


def network(frozen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nk.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).double()
    for _ in range(5):
        model(torch.randn(16, 3, 8, 8).double() * 2 + 1)
    if frozen:
        nk.freeze_(model, affine=False)
    return model


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def test_it_computes_the_same_in_training_and_in_evaluation_and_goes_on_training():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    certificate = nk.fold_(model, X, optimizer=optimizer)
    assert [p.module for p in certificate.changed if p.module] == ["1", "4"]
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert model.training
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(X), before.train(mode)(X), rtol=1e-10, atol=1e-12)
    model.train()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    was = model[0].bias.detach().clone()
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].bias, was)


def test_undo_gives_the_model_back_and_the_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, groups = copy.deepcopy(model.state_dict()), [list(map(id, g["params"])) for g in optimizer.param_groups]
    nk.fold_(model, X, optimizer=optimizer).undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert groups == [list(map(id, g["params"])) for g in optimizer.param_groups]


def test_what_goes_by_the_batch_is_refused_and_the_rest_is_folded():
    model = network(frozen=False)
    nk.freeze_(model, affine=False, filter_fn=lambda module, name: name == "1")
    certificate = nk.fold_(model, X)
    assert [p.module for p in certificate.changed] == ["1"]
    assert [row.module for row in certificate.refused] == ["4"]
    assert "freeze_ it first" in certificate.refused[0].reason
    assert type(model[4]) is nn.BatchNorm2d


def test_a_dry_run_changes_nothing():
    model = network()
    keys = list(model.state_dict())
    assert nk.plan(nk.fold_, model, X).changed
    assert list(model.state_dict()) == keys


def test_a_model_that_does_not_take_the_example_is_as_it_was():
    model = network()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="example_inputs"):
        nk.fold_(model, torch.randn(2, 5, 8, 8).double())
    assert list(model.state_dict()) == keys
