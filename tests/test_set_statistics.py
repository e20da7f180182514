"""nk.set_statistics_: another policy in the middle of training, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normkit as nk
from normkit import statistics as S


def model(kind=nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU(), nn.Conv2d(8, 4, 3), kind(4))
    for _ in range(3):
        network(torch.randn(8, 3, 8, 8) * 2 + 1)
    return network


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nk.BatchNorm2d])
@pytest.mark.parametrize(
    "policy", ["ghost:4", "taper:0.3", S.Renorm(warmup=0), "l1", S.Batch("running"), S.Running()], ids=str
)
def test_a_model_with_a_new_policy_is_the_model_that_was_built_with_it(kind, policy):
    network = model(kind)
    chosen = S.named(policy) if isinstance(policy, str) else policy
    built = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nk.BatchNorm2d(8, statistics=chosen),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nk.BatchNorm2d(4, statistics=chosen),
    )
    built.load_state_dict(network.state_dict(), strict=True)
    certificate = nk.set_statistics_(network, policy)
    assert list(network.state_dict()) == list(built.state_dict())
    x = torch.randn(8, 3, 8, 8)
    for _ in range(2):
        assert torch.equal(network(x), built(x))
    assert torch.equal(network.eval()(x), built.eval()(x))
    certificate.undo()
    assert type(network[1]) is kind
    assert "statistics_state" not in dict(network.named_modules())
    network.train()(x)


def test_taper_goes_from_the_batch_to_a_frozen_layer():
    network = model()
    x = torch.randn(8, 3, 8, 8)
    plain, frozen = copy.deepcopy(network), copy.deepcopy(network)
    nk.freeze_(frozen, affine=False)
    for gate, other in ((1.0, plain), (0.0, frozen)):
        tapered = copy.deepcopy(network)
        nk.set_statistics_(tapered, S.Taper(gate))
        torch.testing.assert_close(tapered(x), other(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Taper: gate=1.5"):
        S.Taper(1.5)


def test_what_cannot_be_set_is_refused_with_a_reason_and_the_rest_is_left():
    network = nn.Sequential(nk.BatchNorm1d(4, statistics=S.PerDomain(2)), nk.BatchNorm1d(4), nn.BatchNorm1d(4))
    certificate = nk.set_statistics_(network, "ghost:2", filter_fn=lambda module, name: name != "2")
    assert [row.module for row in certificate.refused] == ["0"]
    assert "would be lost" in certificate.refused[0].reason
    assert network[1].statistics == S.Ghost(2)
    assert type(network[2]) is nn.BatchNorm1d
    again = nk.set_statistics_(network, S.Ghost(2), filter_fn=lambda module, name: name == "1")
    assert not again.changed
    certificate = nk.set_statistics_(network, S.PerStep(3), filter_fn=lambda module, name: name == "1")
    assert "build the layer" in certificate.refused[0].reason
    with pytest.raises(ValueError, match="no policy named 'gost'"):
        nk.set_statistics_(network, "gost:2")
    certificate = nk.set_statistics_(nn.BatchNorm1d(4, track_running_stats=False), "taper:0.5")
    assert "keeps none" in " ".join(certificate.refused[0].reason.split())
