"""Filter response norm with a learned epsilon: |eps| + |learned_eps|, for maps of few pixels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from normkit import laws

SHAPES = [(4, 3, 1), (4, 3, 1, 1), (4, 3, 5), (4, 3, 4, 3), (2, 3, 2, 3, 2)]


def layer(**options) -> nk.FilterResponseNorm:
    torch.manual_seed(0)
    norm = nk.FilterResponseNorm(3, eps=-1e-6, learned_eps=1e-4, **options)
    with torch.no_grad():
        norm.weight.add_(0.3 * torch.randn(3))
        norm.bias.add_(0.3 * torch.randn(3))
        norm.learned_eps.fill_(-0.4)  # only its size counts
    return norm


def by_hand(norm: nn.Module, x: Tensor) -> Tensor:
    """Sample by sample and channel by channel."""
    rows = []
    for sample in x.unbind(0):
        channels = [
            values / (values.pow(2).sum() / values.numel() + abs(norm.eps) + norm.learned_eps.abs()).sqrt() * w + b
            for values, w, b in zip(sample.unbind(0), norm.weight, norm.bias, strict=True)
        ]
        rows.append(torch.stack(channels))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_outputs_and_gradients_are_those_by_hand(shape, backend):
    norm, x = layer(), (0.5 * torch.randn(shape) + 0.2).requires_grad_()
    exact, wide = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    upstream = torch.randn(shape)
    with nk.backend(backend):
        y = norm(x)
        y.backward(upstream)
    wanted = by_hand(exact, wide)
    wanted.backward(upstream.double())
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    for (name, own), other in zip(norm.named_parameters(), exact.parameters(), strict=True):
        assert torch.allclose(own.grad.double(), other.grad, rtol=1e-5, atol=1e-5), name


def test_second_derivatives():
    norm, x = layer().double(), torch.randn(2, 3, 2).double().requires_grad_()
    parts = [p.detach().requires_grad_() for p in (norm.weight, norm.bias, norm.learned_eps)]
    call = lambda x, w, b, e: nk.functional.filter_response_norm(x, w, b, 1e-6, learned_eps=e)
    assert torch.autograd.gradcheck(call, (x, *parts))
    assert torch.autograd.gradgradcheck(call, (x, *parts))


def test_the_laws_of_the_norm_hold_and_scale_as_far_as_epsilon_is_small():
    x = 3 * torch.randn(4, 3, 4, 4, dtype=torch.float64) + 1
    for value, laws_that_hold in ((0.4, {"sample", "channel"}), (1e-12, nk.FilterResponseNorm.spec.laws)):
        norm = nk.FilterResponseNorm(3, eps=0.0, affine=False, learned_eps=value).double()
        for law in laws_that_hold:
            assert laws.LAWS[law].residual(norm, x) < 1e-9, law
    large = nk.FilterResponseNorm(3, affine=False, learned_eps=0.4).double()
    assert laws.LAWS["scale"].residual(large, x) > 1e-4


def test_a_mask_a_residual_and_an_activation():
    norm, x = layer(activation="tlu"), torch.randn(4, 3, 6)
    lengths, skip = torch.tensor([6, 3, 1, 6]), torch.randn(4, 3, 6)
    y = norm(x, residual=skip, lengths=lengths)
    for sample, length in enumerate(lengths):
        part = norm(x[sample : sample + 1, :, :length], residual=skip[sample : sample + 1, :, :length])
        assert torch.allclose(y[sample : sample + 1, :, :length], part, atol=1e-6)
        assert not y[sample, :, length:].any()
    y.sum().backward()
    assert norm.learned_eps.grad.abs() > 0


def test_checkpoints_names_and_text():
    plain, learned = nk.FilterResponseNorm(3), layer()
    assert [*plain.state_dict()] == ["weight", "bias"]
    assert [*learned.state_dict()] == ["weight", "bias", "learned_eps"]
    again = nk.create(("frn", {"learned_eps": 1e-4}), 3)
    assert again.learned_eps.tolist() == pytest.approx([1e-4])
    again.load_state_dict(learned.state_dict())
    assert torch.equal(again.learned_eps, learned.learned_eps)
    again.reset_parameters()
    assert again.learned_eps.tolist() == pytest.approx([1e-4])
    assert "learned_eps=0.0001" in repr(again)
    assert "learned" not in repr(plain)
    assert [len(group["params"]) for group in nk.param_groups(nn.Sequential(again))] == [3]  # nothing of it decays
    with pytest.raises(ValueError, match="learned_eps=0; start it above 0"):
        nk.FilterResponseNorm(3, learned_eps=0)


def test_half_precision_and_autocast_keep_epsilon_wide():
    norm, x = layer(), torch.randn(4, 3, 5)
    wanted = norm(x)
    half = copy.deepcopy(norm).bfloat16()(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert torch.allclose(half.float(), wanted, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(norm(x.bfloat16()).float(), wanted, atol=0.05)


@pytest.mark.slow
def test_it_compiles_whole():
    norm, x = layer(), torch.randn(4, 3, 5)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), norm(x), atol=1e-6)
    lengths = torch.tensor([5, 3, 1, 4])
    assert torch.allclose(compiled(x, lengths=lengths), norm(x, lengths=lengths), atol=1e-6)


@pytest.mark.slow
def test_epsilon_is_learned_where_maps_have_one_pixel():
    """The class is the size of the one pixel, of which a small fixed epsilon leaves the sign alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 8, 1, 1, generator=generator)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    found = {}
    for learned in (None, 1e-4):
        torch.manual_seed(0)
        model = nn.Sequential(nk.FilterResponseNorm(8, learned_eps=learned), nn.Flatten(), nn.Linear(8, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        found[learned] = float((model(x).argmax(1) == y).float().mean())
    assert found[1e-4] > 0.9 > found[None] + 0.1, found
