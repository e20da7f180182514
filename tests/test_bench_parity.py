"""Parity before any number: every peer agrees with the oracle, and every mistake is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench_cases import BRIEF, EVERY_OP, name_of
from normkit.bench import parity, peers
from normkit.bench.cases import Case
from normkit.bench.inputs import inputs, weight_dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", EVERY_OP, ids=name_of)
def test_every_implementation_of_every_op_agrees_with_the_oracle(case, dtype):
    for layout in case.layouts:
        given = inputs(case, dtype, layout)
        weights = getattr(torch, weight_dtype(case, dtype))
        right = parity.truth(case, given, weights)
        found = [peer for peer in peers.peers(case, weights, given, BRIEF.wanted) if isinstance(peer, peers.Peer)]
        assert {"torch", "normkit"} <= {peer.name for peer in found}
        torchs = parity.check(found[0], given, right)
        for peer in found:
            agreements = parity.check(peer, given, right)
            assert parity.objection(agreements, torchs) is None, (peer.name, layout)
            assert {"y", "x"} <= set(agreements)
            assert ("residual" in agreements) == case.residual


WRONG = {
    "biased by a percent": lambda y, x: y * 1.01,
    "shifted": lambda y, x: y + 0.003 * y.detach().abs().max(),
    "one wrong element": lambda y, x: y + torch.eye(1, y.numel()).reshape(y.shape) * y.detach().abs().max() * 0.01,
    "right, with a wrong gradient": lambda y, x: y + 0.01 * (x - x.detach()),
    "right, with nine tenths of the gradient": lambda y, x: 0.9 * y + 0.1 * y.detach(),
    "not a number": lambda y, x: y * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_parity_sees_a_wrong_result(wrong):
    case = Case("batch", (6, 8, 5, 5), "", activation="relu", residual=True)
    given = inputs(case, "float32", "contiguous")
    right = parity.truth(case, given, torch.float32)
    peer = peers.eager(case, torch.float32)
    assert parity.objection(parity.check(peer, given, right)) is None
    broken = replace(peer, call=lambda x, residual: WRONG[wrong](peer.call(x, residual), x))
    assert parity.objection(parity.check(broken, given, right)) is not None


def test_parity_sees_one_wrong_element_among_a_million():
    """Its share of the norm would be within rounding."""
    case = Case("batch", (64, 64, 16, 16), "")
    given = inputs(case, "float32", "contiguous")
    right = parity.truth(case, given, torch.float32)
    peer = peers.eager(case, torch.float32)

    def call(x, residual):
        y = peer.call(x, residual)
        off = torch.zeros_like(y)
        off[3, 5, 7, 11] = 1e-4 * float(y.detach().abs().max())
        return y + off

    assert parity.objection(parity.check(peer, given, right)) is None
    assert not parity.check(replace(peer, call=call), given, right)["y"].holds


@pytest.mark.parametrize("norm", ["batch", "group:4"])
def test_parity_sees_a_wrong_epsilon(norm):
    case = Case(norm, (6, 8, 5, 5), "")
    given = inputs(case, "float32", "contiguous")
    right = parity.truth(case, given, torch.float32)
    peer = peers.eager(case, torch.float32)
    peer.layer.eps = 1e-2
    assert "y: error" in str(parity.objection(parity.check(peer, given, right)))


@pytest.mark.parametrize("case", EVERY_OP, ids=name_of)
def test_the_oracle_in_pieces_is_the_oracle_in_one(case, monkeypatch):
    found = []
    for piece in (10**9, 1):
        monkeypatch.setattr(parity, "PIECE", piece)
        given = inputs(case, "float32", case.layouts[-1])
        found.append(parity.truth(case, given, torch.float32))
    assert found[0].keys() == found[1].keys()
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))


def test_the_upstream_gradient_is_zero_only_beside_the_kink():
    case = Case("batch", (16, 32, 9, 9), "", activation="relu", residual=True)
    given, untouched = (inputs(case, "bfloat16", "contiguous") for _ in range(2))
    parity.truth(case, given, torch.float32)
    zeroed = (given.upstream == 0) & (untouched.upstream != 0)
    assert 0 < zeroed.float().mean() < 0.1
    z = peers.layer(case, torch.float32)(given.x.detach(), residual=given.residual.detach()).float()
    bound = 3 * torch.finfo(torch.bfloat16).eps * (z.abs() + 2 * given.residual.detach().abs().float() + 1)
    assert (z.abs() <= bound)[zeroed].all()
