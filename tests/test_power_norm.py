"""Power norm when it is warm: the running square, and a gradient that is the paper's and not the derivative."""

from __future__ import annotations

import copy

import pytest
import torch

import normkit as nk


class ByHand:
    """The algorithm as the paper and its code write it, in float64, without autograd."""

    def __init__(self, channels: int, decay: float, warmup: int, eps: float) -> None:
        self.square, self.nu = torch.ones(channels).double(), torch.zeros(channels).double()
        self.decay, self.warmup, self.eps, self.batches = decay, warmup, eps, 0

    def step(self, x, weight, bias, upstream, keep=None):
        """Output and gradients of one batch of rows (m, c); ``keep``: which rows count."""
        kept = torch.ones(len(x)).bool() if keep is None else keep
        rows, g = x[kept], (upstream * weight)[kept]
        batch = (rows**2).mean(0)
        warm = self.batches >= self.warmup
        z = rows / torch.sqrt((self.square if warm else batch) + self.eps)
        projected = (1 - self.decay) * self.nu if warm else (g * z).mean(0) / 1.0
        of_rows = (g - projected * z) / torch.sqrt(batch + self.eps)
        if warm:
            self.nu = self.nu + ((g - projected * z) * z).mean(0)
        self.square = self.decay * self.square + (1 - self.decay) * batch
        self.batches += 1
        y, of_x = torch.zeros_like(x), torch.zeros_like(x)
        y[kept], of_x[kept] = z * weight + bias, of_rows
        return y, of_x, (upstream[kept] * z).sum(0), upstream[kept].sum(0)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("space", [(), (5,), (3, 4)], ids=str)
def test_it_is_the_algorithm_of_the_paper_before_and_after_the_warm_up(space, masked):
    layer = nk.PowerNorm(6, warmup=3, decay=0.7, eps=1e-3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 6))
        layer.bias.copy_(torch.linspace(-1, 1, 6))
    truth = ByHand(6, 0.7, 3, 1e-3)
    for _ in range(7):
        x = (3 * torch.randn(8, 6, *space).double() + 1).requires_grad_()
        upstream = torch.randn(x.shape).double() + 0.3
        mask = torch.rand(8, *space) < 0.7 if masked else None
        layer.zero_grad()
        y = layer(x, mask=mask)
        y.backward(upstream)
        rows = lambda t: t.detach().movedim(1, -1).reshape(-1, 6)
        keep = None if mask is None else mask.flatten()
        wanted = truth.step(rows(x), layer.weight.detach(), layer.bias.detach(), rows(upstream), keep)
        got = rows(y), rows(x.grad), layer.weight.grad, layer.bias.grad
        for mine, other in zip(got, wanted, strict=True):
            assert torch.allclose(mine, other, rtol=1e-10, atol=1e-10)
        assert torch.allclose(layer.running_square, truth.square)
        assert torch.allclose(layer.nu, truth.nu)
    assert truth.nu.abs().max() > 0.01
    evaluated = layer.eval()(x)
    by_running = x / (truth.square + 1e-3).sqrt().view(-1, *[1] * len(space)) * layer.weight.view(-1, *[1] * len(space))
    assert torch.allclose(evaluated, by_running + layer.bias.view(-1, *[1] * len(space)))


def test_every_backend_that_runs_it_warm_has_the_gradient_of_the_paper():
    x, upstream = torch.randn(9, 4, 5), torch.randn(9, 4, 5)
    found = []
    for backend in ("auto", "torch", "reference"):
        layer = nk.PowerNorm(4, warmup=0, backend=None if backend == "auto" else backend)
        layer.nu.fill_(0.5)
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(upstream)
        found.append([leaf.grad, layer.nu, layer.running_square, layer.weight.grad])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found[0], other, strict=True))
    with pytest.raises(RuntimeError, match="cannot run this input"):
        nk.PowerNorm(4, warmup=0, backend="native")(x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in dynamo
def test_one_graph_goes_from_the_warm_up_into_the_other_phase():
    torch._dynamo.reset()
    layer = nk.PowerNorm(4, warmup=2, decay=0.5)
    other = copy.deepcopy(layer)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            x, upstream = torch.randn(9, 4, 3), torch.randn(9, 4, 3)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            for call, leaf in zip((whole, other), leaves, strict=True):
                call(leaf).backward(upstream)
            assert torch.allclose(*(leaf.grad for leaf in leaves), atol=1e-6)
            assert all(torch.allclose(a, b) for a, b in zip(layer.buffers(), other.buffers(), strict=True))
    assert layer.nu.any()


def test_two_calls_before_one_backward_pass():
    layer = nk.PowerNorm(4, warmup=0)
    x = torch.randn(8, 4, requires_grad=True)
    (layer(x) + layer(2 * x)).sum().backward()
    assert x.grad.isfinite().all()


def test_a_batch_that_is_not_finite_moves_nothing():
    layer = nk.PowerNorm(4, warmup=0)
    x = torch.randn(8, 4, requires_grad=True)
    layer(x).sum().backward()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    bad = x.detach().clone()
    bad[0] = torch.nan
    layer(bad.requires_grad_()).sum().backward()
    assert all(value.equal(before[name]) for name, value in layer.named_buffers())


def test_what_is_kept_stays_float32_and_is_saved():
    layer = nk.PowerNorm(4, warmup=0).bfloat16()
    assert layer.running_square.dtype == layer.nu.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    layer(torch.randn(8, 4).bfloat16()).float().sum().backward()
    again = nk.PowerNorm(4, warmup=0).bfloat16()
    again.load_state_dict(layer.state_dict())
    assert again.nu.equal(layer.nu)
    assert {*layer.state_dict()} == {"weight", "bias", "running_square", "nu", "num_batches_tracked"}


def test_the_groups_of_the_recipe_are_scaled_first():
    x = 5 * torch.randn(8, 6, 3)
    scaled = (x.view(8, 2, 3, 3) / (x.view(8, 2, 3, 3).square().mean(2, keepdim=True) + 1e-5).sqrt()).view(8, 6, 3)
    assert torch.allclose(nk.PowerNorm(6, group_scaling=2)(x), nk.PowerNorm(6)(scaled), atol=1e-6)
    with pytest.raises(ValueError, match="6 channels do not divide into group_scaling=4"):
        nk.PowerNorm(6, group_scaling=4)


def test_statistics_frozen_holds_what_it_keeps_forward_and_backward():
    norm = nk.PowerNorm(4, warmup=1)
    for _ in range(3):
        norm(torch.randn(16, 4, requires_grad=True)).square().sum().backward()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with nk.statistics_frozen(norm):
        norm(torch.randn(16, 4, requires_grad=True)).square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    norm(torch.randn(16, 4, requires_grad=True)).square().sum().backward()
    assert not any(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    assert copy.deepcopy(norm).hold is not norm.hold
