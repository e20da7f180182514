"""Parity of what no row takes: evaluation, statistics merged in between, add_norm, graphs, more than 2**31 elements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normkit as nk
from normkit.kernels.triton_prenorm import add_norm
from normkit.statistics import Ghost

Pair = tuple[str, Tensor, Tensor]
"""What, as found, as it should be in float64."""
DTYPES = ("float32", "bfloat16", "float16")
FEW = 8
"""Elements at the end of a huge tensor that are compared."""


def _draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    values = torch.empty(shape).normal_(0.5, 2.0, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype)


def _all_of(layer: Callable[..., Tensor], own: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of inputs and parameters."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = layer(leaves[0], residual=leaves[1])
    of = {"x": leaves[0], "residual": leaves[1], **dict(own.named_parameters())}
    upstream = _draw(tuple(y.shape), torch.float32, "cpu", 3).to(y.device, y.dtype)
    return {"y": y.detach(), **dict(zip(of, torch.autograd.grad(y, list(of.values()), upstream), strict=True))}


def _against_oracle(
    own: nn.Module, dtype: torch.dtype, device: str, around: Callable[[nn.Module], Any] = lambda layer: layer
) -> Iterator[Pair]:
    inputs = [_draw((6, 24, 9, 7), dtype, device, seed) for seed in (1, 2)]
    exact: Any = copy.deepcopy(own).double()
    exact.backend = "torch" if own.statistics else "reference"  # the oracle knows no merged statistics
    found = _all_of(around(own.to(device)), own, *inputs)
    right = _all_of(exact, exact, *(t.cpu().double() for t in inputs))
    yield from ((name, found[name], right[name]) for name in right)


def _layer(backend: str = "triton", **options: Any) -> nn.Module:
    layer = nk.BatchNorm2d(24, activation="silu", backend=backend, **options)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-0.5, 0.5)
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    return layer


def evaluation(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """Running statistics."""
    yield from _against_oracle(_layer().eval(), dtype, device)


def running(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """Running statistics and counters behind three batches, the second of them with an infinity; on the kernels, and
    straight to torch's operator, behind which a kernel lets them in."""
    for backend in ("triton", "torch"):
        own = nk.BatchNorm2d(1500, backend=backend, device=device)
        exact = nk.BatchNorm2d(1500, backend="reference").double()
        for step in range(3):
            x = _draw((4, 1500, 3, 2), dtype, "cpu", step)
            x[0, 7] = torch.inf if step == 1 else x[0, 7]
            own(x.to(device))
            exact(x.double())
        for name in ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped"):
            yield f"{name} on {backend}", own.get_buffer(name), exact.get_buffer(name)


def halves(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """Measured by one launch, normalised by another: ghost batches."""
    yield from _against_oracle(_layer(statistics=Ghost(2)), dtype, device)


def resident(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """One launch whose programs wait for each other: right, and twenty times the same, whoever comes first."""
    shape = (16, 64, 28, 28) if device == "cuda" else (4, 16, 7, 7)
    for norm in (nk.BatchNorm2d(shape[1]), nk.GroupNorm(8, shape[1]), nk.InstanceNorm2d(shape[1], affine=True)):
        for last in (False, True):
            x, upstream = (_draw(shape, dtype, device, seed) for seed in (1, 2))
            if last:
                x, upstream = (t.to(memory_format=torch.channels_last) for t in (x, upstream))
            yield from _again_and_again(norm.to(device), x.requires_grad_(), upstream, "last" if last else "first")


def _again_and_again(own: Any, x: Tensor, upstream: Tensor, what: str) -> Iterator[Pair]:
    exact = copy.deepcopy(own).cpu().double()
    own.backend, exact.backend = "triton", "reference"
    wanted = x.detach().cpu().double().requires_grad_()
    right = exact(wanted)
    (gradient,) = torch.autograd.grad(right, wanted, upstream.cpu().double())
    name, first, same = f"{type(own).__name__}, channels {what}", None, True
    for _ in range(20 if x.is_cuda else 2):
        y = own(x)
        (dx,) = torch.autograd.grad(y, x, upstream)
        first = first or (y.detach(), dx)
        same = same and torch.equal(y, first[0]) and torch.equal(dx, first[1])
    assert first is not None
    yield f"y of {name}", first[0], right
    yield f"x of {name}", first[1], gradient
    yield f"the same again, {name}", torch.tensor([float(same)]), torch.ones(1)


def compiled(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """One graph of Inductor's; and in CUDA graphs of its own, which are captured by the second call and replayed."""
    yield from _against_oracle(_layer(), dtype, device, lambda layer: torch.compile(layer, fullgraph=True))
    for name, found, right in _against_oracle(_layer(), dtype, device, _captured):
        yield f"{name}, captured", found, right


def _captured(layer: nn.Module) -> Callable[..., Tensor]:
    program = torch.compile(layer, fullgraph=True, mode="reduce-overhead")

    def third_time(x: Tensor, residual: Tensor) -> Tensor:
        for _ in range(2):
            y = program(x, residual=residual)
            torch.autograd.grad(y, (x, residual), torch.ones_like(y))
        return program(x, residual=residual)

    return third_time


def added(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """``add_norm``, both outputs, with 1 + weight: rows that fit into a tile, and few that do not."""
    for shape in ((70, 200), (5, 20_000)):
        leaves = [_draw(shape, dtype, device, 1), _draw(shape, dtype, device, 2), _draw(shape[1:], dtype, device, 3)]
        found = _added(add_norm, [t.requires_grad_() for t in leaves])
        right = _added(_by_hand, [t.detach().cpu().double().requires_grad_() for t in leaves])
        yield from ((f"{name} of {shape}", found[name], right[name]) for name in right)


def _added(function: Any, leaves: list[Tensor]) -> dict[str, Tensor]:
    y, h = function(*leaves, weight_offset=1.0)
    gradients = torch.autograd.grad((y, h), leaves, (torch.ones_like(y) + leaves[1].detach(), torch.ones_like(h)))
    return {"y": y.detach(), "h": h.detach(), **dict(zip(("x", "residual", "weight"), gradients, strict=True))}


def _by_hand(x: Tensor, residual: Tensor, weight: Tensor, weight_offset: float) -> tuple[Tensor, Tensor]:
    h = x + residual
    return nn.functional.layer_norm(h, h.shape[-1:], weight + weight_offset), h


def replayed(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """A CUDA graph of forward and backward, replayed on other numbers than it was captured with."""
    for backend in ("triton", "torch") if device == "cuda" else ():
        for name, found, right in _replayed(_layer(backend).to(device), dtype, device):
            yield f"{name} on {backend}", found, right


def _replayed(own: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    inputs = [_draw((6, 24, 9, 7), dtype, device, seed) for seed in (5, 6)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _all_of(own, own, *inputs)
    torch.cuda.synchronize()
    # what _all_of copies from the CPU cannot be captured
    leaves, upstream = [t.requires_grad_() for t in inputs], torch.ones_like(inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = own(leaves[0], residual=leaves[1])
        dx, dweight = torch.autograd.grad(y, (leaves[0], own.weight), upstream)
    with torch.no_grad():
        leaves[0].copy_(_draw((6, 24, 9, 7), dtype, device, 7))
    exact: Any = copy.deepcopy(own).cpu().double()
    exact.backend = "reference"
    graph.replay()
    x, residual = (t.detach().cpu().double().requires_grad_() for t in leaves)
    right = exact(x, residual=residual)
    wanted = torch.autograd.grad(right, (x, exact.weight), torch.ones_like(right))
    yield from (("y", y, right), ("x", dx, wanted[0]), ("weight", dweight, wanted[1]))
    yield from ((name, own.get_buffer(name), exact.get_buffer(name)) for name in ("running_var", "num_batches_tracked"))


def huge(dtype: torch.dtype, device: str) -> Iterator[Pair]:
    """The end of tensors of more than 2**31 elements: rows, and two channels."""
    if device == "cpu" or dtype != torch.bfloat16:
        return
    x = torch.empty(2**21 + 3, 1024, dtype=dtype, device=device).normal_().requires_grad_()
    y = nk.RMSNorm(1024, eps=1e-5, device=device, dtype=dtype, backend="triton")(x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x[-FEW:].detach().double().requires_grad_()
    right = nn.functional.rms_norm(last, (1024,), eps=1e-5)
    (wanted,) = torch.autograd.grad(right, last, y[-FEW:].detach().double())
    yield from (("y of rows", y[-FEW:], right), ("x of rows", dx[-FEW:], wanted))
    del x, y, dx
    planes = torch.empty(1, 2, 2**15, 2**15 + 1, dtype=dtype, device=device).normal_(3.0, 2.0)
    z = nk.BatchNorm2d(2, device=device, backend="triton")(planes)[0, :, -1, -FEW:]
    for channel in range(2):
        var, mean = torch.var_mean(planes[0, channel].float(), correction=0)
        exact = (planes[0, channel, -1, -FEW:].double() - mean.double()) * torch.rsqrt(var.double() + 1e-5)
        yield f"y of channel {channel}", z[channel], exact


PATHS: dict[str, Callable[[torch.dtype, str], Iterator[Pair]]] = {
    path.__name__: path for path in (evaluation, running, halves, resident, compiled, added, replayed, huge)
}


def checks(name: str, device: str) -> Iterator[dict[str, Any]]:
    """One record per type."""
    for word in DTYPES:
        dtype = getattr(torch, word)
        record = {"kind": "parity", "row": name, "dtype": word}
        limit = 8 * torch.finfo(dtype).eps + 1e-5
        try:
            errors = {what: _distance(got, wanted) for what, got, wanted in PATHS[name](dtype, device)}
        except Exception as error:
            yield {**record, "state": "red", "why": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        wrong = [
            f"{what}: error {error:.1e}, may be {limit:.1e}" for what, error in errors.items() if not error <= limit
        ]
        if errors:
            yield {**record, "state": "red" if wrong else "green", "why": "; ".join(wrong) or None, "errors": errors}


def _distance(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach().cpu().double()
    return float((got.detach().cpu().double() - wanted).norm() / wanted.norm())
