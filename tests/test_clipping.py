"""Adaptive clipping against the loop over units that the paper writes, and the hook on optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normkit as nk


def model() -> nn.Module:
    """Kernels, matrices, vectors, a number; units without weight, without gradient, with and without need."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2))
    net.scale = nn.Parameter(torch.tensor(0.5))
    net.unused = nn.Parameter(torch.ones(3))
    for parameter in net.parameters():
        if parameter is not net.unused:
            size = torch.logspace(-4, 2, max(len(parameter) if parameter.dim() else 1, 1))
            shape = (-1, *[1] * (parameter.dim() - 1)) if parameter.dim() else ()
            parameter.grad = torch.randn_like(parameter) * size.reshape(shape)
    net[0].weight.data[1] = 0.0
    net[3].weight.grad[2] = 0.0
    return net


def by_hand(parameters, clip, eps):
    """Unit by unit; the part of units that were scaled down."""
    scaled = units = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        pairs = zip(parameter, parameter.grad, strict=True) if parameter.dim() > 1 else [(parameter, parameter.grad)]
        for weight, gradient in pairs:
            most = clip * max(weight.norm().item(), eps)
            units += 1
            if gradient.norm().item() > most:
                gradient.mul_(most / gradient.norm().item())
                scaled += 1
    return scaled / units


@pytest.mark.parametrize(("clip", "eps"), [(0.01, 1e-3), (1.0, 1e-3), (0.01, 10.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_loop_over_units(dtype, clip, eps):
    got = model().to(dtype)
    for parameter, other in zip(got.parameters(), model().parameters(), strict=True):
        parameter.grad = None if other.grad is None else other.grad.to(dtype)
    wanted = copy.deepcopy(got).double()
    for parameter, other in zip(wanted.parameters(), got.parameters(), strict=True):
        parameter.grad = None if other.grad is None else other.grad.double().clone()
    with torch.no_grad():
        part = by_hand(wanted.parameters(), clip, eps)
    assert nk.clip_grad_adaptive_(got.parameters(), clip, eps).item() == pytest.approx(part, abs=1e-6)
    assert part not in (0, 1)
    error = 16 * torch.finfo(dtype).eps
    for mine, other in zip(got.parameters(), wanted.parameters(), strict=True):
        if other.grad is None:
            assert mine.grad is None
            continue
        assert ((mine.grad.double() - other.grad).abs() <= error * other.grad.abs()).all()


def test_a_single_tensor_no_gradients_and_what_is_refused():
    one = nn.Parameter(torch.ones(2, 2))
    one.grad = torch.ones(2, 2)
    assert nk.clip_grad_adaptive_(one).item() == 1.0
    assert nk.clip_grad_adaptive_([nn.Parameter(torch.ones(2))]).item() == 0.0
    for wrong in ({"clip": 0.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match="both must be above 0"):
            nk.clip_grad_adaptive_([one], **wrong)
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse.*\n.*sparse=False"):
        nk.clip_grad_adaptive_(table.parameters())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad], ids=lambda k: k.__name__)
def test_the_hook_clips_before_every_step_of_any_optimizer_until_it_is_removed(kind):
    hooked, plain = model(), model()
    plain.load_state_dict(hooked.state_dict())
    optimizers = [
        kind([{"params": m[:4].parameters()}, {"params": m[4].parameters(), "clip": None}], lr=0.1)
        for m in (hooked, plain)
    ]
    handle = nk.clip_adaptively_before_steps(optimizers[0], clip=0.02, skip=[hooked[0].bias])
    for attached in (True, True, False):
        for mine, other in zip(hooked.parameters(), plain.parameters(), strict=True):
            if mine.grad is not None:
                mine.grad = torch.randn_like(mine)
                other.grad = mine.grad.clone()
        if attached:
            held = [p for p in plain[:4].parameters() if p is not plain[0].bias]
            nk.clip_grad_adaptive_(held, clip=0.02)
        else:
            handle.remove()
        for optimizer in optimizers:
            optimizer.step()
        for mine, other in zip(hooked.parameters(), plain.parameters(), strict=True):
            assert mine.equal(other)
