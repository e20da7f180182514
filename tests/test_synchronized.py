"""Synchronised statistics: several processes, with batches of any size, compute what one does with the whole batch."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.statistics import Synchronized
from normkit.statistics.synchronized import Stored
from processes import Counted, spawn, summed
from twins import assert_same, step

RANKS = 3
SHARES = {"unequal": (4, 1, 7), "one empty": (5, 0, 2), "first empty": (0, 3, 1), "all empty": (0, 0, 0)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Of the greatest value of a tensor, or of 1."""
SHAPES = {1: [(), (6,)], 2: [(3, 4)], 3: [(2, 3, 2)]}
CLASSES = {1: nk.BatchNorm1d, 2: nk.BatchNorm2d, 3: nk.BatchNorm3d}
C = 5


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every rank, off-centre and off-scale."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * z + 2).to(dtype)


def pair(dim: int, dtype: torch.dtype, group: Any = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A plain layer and a synchronised one with the same parameters."""
    plain = CLASSES[dim](C, **options).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(draw(C, seed=1))
        plain.bias.copy_(draw(C, seed=2))
    synchronised = copy.deepcopy(plain)
    synchronised.statistics = Synchronized(group)
    return plain, synchronised


def assert_near(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == wanted.shape, what
    assert got.dtype == wanted.dtype, what
    if wanted.numel():
        error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error <= tolerance, f"{what}: {error:.1e} > {tolerance:.1e}"


def assert_as_the_whole(
    rank: int,
    ranks: tuple[int, ...],
    layers: tuple[nn.Module, nn.Module],
    x: Tensor,
    sizes: Any,
    what: str,
    **more: Any,
) -> None:
    """Output, every gradient and every buffer; ``more``: residual and mask of the whole batch, group, tolerance."""
    plain, synchronised = layers
    group, tolerance = more.get("group"), more.get("tolerance", TOLERANCE[x.dtype])
    place = ranks.index(rank)
    mine = lambda t: None if t is None else t.split(sizes)[place]
    residual, mask = more.get("residual"), more.get("mask")
    upstream = draw(*x.shape, seed=5, dtype=x.dtype)
    wanted, got = {}, {}
    for layer, found, part in ((plain, wanted, lambda t: t), (synchronised, got, mine)):
        leaves = [
            None if t is None else part(t).detach().clone(memory_format=torch.preserve_format).requires_grad_()
            for t in (x, residual)
        ]
        y = layer(leaves[0], residual=leaves[1], mask=part(mask))
        layer.zero_grad()
        y.backward(part(upstream))
        found |= {"output": y.detach(), "gradient of x": leaves[0].grad}
        found |= {} if residual is None else {"gradient of the residual": leaves[1].grad}
        found |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
        found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for name, value in got.items():
        if name.startswith("num_batches") and not x.numel():
            continue  # pooled statistics of nothing are left out, where torch's operator counts an empty batch
        if name.startswith("gradient of ") and name[12:] in dict(plain.named_parameters()):
            value = summed(value, group)
        reference = (
            mine(wanted[name]) if name in ("output", "gradient of x", "gradient of the residual") else wanted[name]
        )
        assert_near(value, reference, tolerance, f"{what}, rank {rank}, {name}")
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and got["output"].numel():
        assert got["output"].is_contiguous(memory_format=torch.channels_last), what


def in_each_process(rank: int) -> None:
    groups = ((None, (0, 1, 2)), (dist.new_group([0, 1]), (0, 1)), (dist.new_group([2]), (2,)))
    for group, ranks in groups:
        if rank in ranks and len(ranks) > 1:
            the_whole(rank, ranks, group)
            masked_as_the_whole(rank, ranks, group)
            far_off(rank, ranks, group)
    assert nk.BatchNorm1d(C, statistics=Synchronized(groups[2][0] if rank == 2 else None)).statistics.alone() is (
        rank == 2
    )
    second_derivatives(rank)
    cumulative_and_accumulated(rank)
    checkpointed(rank)
    one_reduction_each_way(rank)
    under_autocast(rank)
    not_finite(rank)
    in_evaluation_nothing_is_sent(rank)
    the_drop_in_and_a_fused_forward(rank)
    groups_are_copied_and_not_stored(rank, groups[1][0])


def the_whole(rank: int, ranks: tuple[int, ...], group: Any) -> None:
    """Any number of axes, memory, epilogue, backend and share of the batch."""
    for dtype in TOLERANCE:
        for dim, spaces in SHAPES.items():
            for space in spaces:
                for place, (name, shares) in enumerate(SHARES.items()):
                    sizes = [shares[r] for r in ranks]
                    x = draw(sum(sizes), C, *space, seed=3, dtype=dtype)
                    if dim == 2 and place % 2:
                        x = x.contiguous(memory_format=torch.channels_last)
                    residual = draw(*x.shape, seed=4, dtype=dtype) if place != 1 else None
                    activation = (None, "relu", "silu", nn.Tanh())[place]
                    layers = pair(
                        dim, dtype, group, activation=activation, backend=(None, None, "torch", "reference")[place]
                    )
                    if not sum(sizes):
                        layers[0].backend = layers[1].backend = None
                    what = f"{dtype} {dim}d {space} {name}"
                    more = {"residual": residual, "group": group}
                    assert_as_the_whole(rank, ranks, layers, x, sizes, what, **more)
                    assert_as_the_whole(rank, ranks, layers, x, sizes, f"{what}, again", **more)


def masked_as_the_whole(rank: int, ranks: tuple[int, ...], group: Any) -> None:
    """One mask for all channels, or one for each; ranks and samples with nothing in them."""
    for dtype in TOLERANCE:
        for name, shares in SHARES.items():
            sizes = [shares[r] for r in ranks]
            x = draw(sum(sizes), C, 6, seed=6, dtype=dtype)
            for shape in ((sum(sizes), 6), (sum(sizes), C, 6)):
                mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.6
                mask[:2] = False
                what = f"{dtype} masked {shape} {name}"
                assert_as_the_whole(rank, ranks, pair(1, dtype, group), x, sizes, what, mask=mask, group=group)


def far_off(rank: int, ranks: tuple[int, ...], group: Any) -> None:
    """1e4 deviations between the batch and its running mean, or between the batch and zero."""
    sizes = [4, 1, 7][: len(ranks)]
    for dtype, tolerance in TOLERANCE.items():
        x = draw(sum(sizes), C, 6, seed=8, dtype=dtype)
        layers = pair(1, dtype, group)
        for layer in layers:
            layer.running_mean.fill_(3e4)
        assert_as_the_whole(rank, ranks, layers, x, sizes, f"{dtype}, running mean far off", group=group)
        far = x + 3e4
        values = sum(sizes) * 6
        conditioning = 4 * torch.finfo(dtype).eps * 1e4 * values**0.5  # what the last bit of the input does to a sum
        limit = max(tolerance, conditioning)
        assert_as_the_whole(
            rank, ranks, pair(1, dtype, group), far, sizes, f"{dtype}, far off", group=group, tolerance=limit
        )
        with Counted() as sent:
            pair(1, dtype, group)[1](far.split(sizes)[ranks.index(rank)])
        assert sent == [(3 * C, torch.float64)] + [(C, torch.float64)] * (dtype == torch.float64)


def second_derivatives(rank: int) -> None:
    """Of a function of output and gradients, as a gradient penalty has it."""
    sizes = [4, 0, 7]
    x, upstream, weights = (draw(11, C, 6, seed=seed) for seed in (9, 10, 11))
    for activation in (None, "relu", "gelu"):
        found = []
        for layer, part in zip(pair(1, torch.float64, activation=activation), (None, rank), strict=True):
            mine = lambda t, part=part: t if part is None else t.split(sizes)[part]
            leaf = mine(x).clone().requires_grad_()
            y = layer(leaf)
            (first,) = torch.autograd.grad(y, leaf, mine(upstream), create_graph=True)
            loss = (first.square() * mine(weights)).sum() + (y * mine(weights)).sum()
            found.append(torch.autograd.grad(loss, [leaf, layer.weight, layer.bias]))
        (of_x, *of_parameters), (own_x, *own_parameters) = found
        assert_near(own_x, of_x.split(sizes)[rank], 1e-11, f"second derivative, {activation}")
        for own, whole in zip(own_parameters, of_parameters, strict=True):
            assert_near(summed(own), whole, 1e-11, f"second derivative of a parameter, {activation}")


def cumulative_and_accumulated(rank: int) -> None:
    """``momentum=None`` weighs by the values of all ranks; micro-batches of all ranks make one update."""
    sizes = [4, 0, 7]
    for options in ({"momentum": None}, {}):
        plain, synchronised = pair(1, torch.float64, **options)
        batches = [draw(11, C, 6, seed=seed) for seed in (12, 13)]
        batches[1] = batches[1][:, :, :2]
        if not options:
            with nk.accumulate_statistics(synchronised):
                for batch in batches:
                    synchronised(batch.split(sizes)[rank])
            plain(torch.cat(batches, 2))
        else:
            for batch in batches:
                plain(batch)
                synchronised(batch.split(sizes)[rank])
        for name, buffer in plain.named_buffers():
            assert_near(dict(synchronised.named_buffers())[name], buffer, 1e-12, f"{options} {name}")


def checkpointed(rank: int) -> None:
    """Bit for bit what is computed without checkpointing, and the statistics move once."""
    x = draw(11, C, 6, seed=14, dtype=torch.float32).split([4, 0, 7])[rank]
    for reentrant in (True, False):
        layer = nn.Sequential(pair(1, torch.float32)[1], nn.Conv1d(C, C, 1, bias=False), pair(1, torch.float32)[1])
        again = copy.deepcopy(layer)
        wrapped = lambda x, again=again, reentrant=reentrant: checkpoint(again, x, use_reentrant=reentrant)
        wanted = step(layer, x, torch.ones_like(x))
        leaf = x.clone().requires_grad_()
        y = wrapped(leaf)
        y.backward(torch.ones_like(x))
        got = {"output": y.detach(), "gradient of input": leaf.grad}
        got |= {f"gradient of {name}": p.grad for name, p in again.named_parameters()} | {**again.state_dict()}
        assert_same(got, wanted)
        assert again[0].num_batches_tracked == 1


def one_reduction_each_way(rank: int) -> None:
    """24 bytes per channel forward, 16 backward, whatever the input's type."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = nk.BatchNorm2d(C, statistics=Synchronized(), activation="relu").to(dtype)
        x = draw((4, 0, 7)[rank], C, 3, 4, seed=15, dtype=dtype).requires_grad_()
        with Counted() as sent:
            y = layer(x)
        assert sent == [(3 * C, torch.float64)]
        with Counted() as sent:
            y.backward(torch.ones_like(y))
        assert sent == [(2 * C, torch.float64)]


def under_autocast(rank: int) -> None:
    sizes = [4, 1, 7]
    x = draw(12, C, 6, seed=16, dtype=torch.float32)
    plain, synchronised = (nn.Sequential(nn.Conv1d(C, C, 1), norm) for norm in pair(1, torch.float32))
    synchronised[0].load_state_dict({k: summed(v) / RANKS for k, v in plain[0].state_dict().items()})
    plain[0].load_state_dict(synchronised[0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = plain(x), synchronised(x.split(sizes)[rank])
    assert got.dtype == wanted.dtype
    assert_near(got, wanted.split(sizes)[rank], 2 * torch.finfo(torch.bfloat16).eps, "autocast")
    assert synchronised[1].running_mean.dtype == torch.float32
    assert_near(synchronised[1].running_var, plain[1].running_var, 1e-5, "autocast, running variance")


def not_finite(rank: int) -> None:
    """A NaN on one rank is in the output of all, and in the statistics of none."""
    layer = nk.BatchNorm1d(C, statistics=Synchronized())
    x = draw(4, C, seed=17, dtype=torch.float32)
    if rank == 1:
        x[0, 2] = torch.nan
    assert layer(x).isnan().any(0).tolist() == [False, False, True, False, False]
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)
    assert torch.equal(layer.running_mean, torch.zeros(C))


def in_evaluation_nothing_is_sent(rank: int) -> None:
    """Ranks may evaluate as often as they like, and see what a plain layer gives."""
    for options in ({}, {"track_running_stats": False}):
        plain, synchronised = pair(1, torch.float32, **options)
        plain.eval(), synchronised.eval()
        with Counted() as sent:
            for _ in range(rank):
                x = draw(4 + rank, C, seed=18, dtype=torch.float32)
                assert torch.equal(synchronised(x), plain(x))
        assert not sent
    frozen = pair(1, torch.float32)[1]
    nk.freeze_(frozen)
    for _ in range(rank):
        frozen(draw(4, C, seed=18, dtype=torch.float32))


def the_drop_in_and_a_fused_forward(rank: int) -> None:
    """torch's layer refuses a CPU; a layer whose activation accelerate_ has taken in is synchronised as before."""
    sizes = [4, 0, 7]
    x = draw(11, C, 6, seed=20, dtype=torch.float32)
    mine = x.split(sizes)[rank]
    with pytest.raises(ValueError, match="on GPU"):
        nn.SyncBatchNorm(C)(mine)
    fused = nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())
    nk.sync_(fused)
    assert "forward fused" in nk.accelerate_(fused).verdict
    for layer in (nk.SyncBatchNorm(C, activation="relu"), fused):
        assert_near(layer(mine), nk.BatchNorm1d(C)(x).relu().split(sizes)[rank], 1e-5, type(layer).__name__)


def groups_are_copied_and_not_stored(rank: int, group: Any) -> None:
    if rank == 2:
        layer = nk.BatchNorm1d(C, statistics=Synchronized(group))
        with pytest.raises(RuntimeError, match="rank 2 is not in this process group"):
            layer(torch.randn(4, C))
        return
    layer = nk.BatchNorm1d(C, statistics=Synchronized(group))
    assert copy.deepcopy(layer).statistics.process_group is group
    assert "Synchronized(process_group=<ranks 0, 1>)" in repr(layer)
    for _ in range(2):
        layer = pickle.loads(pickle.dumps(layer))
    assert layer.eval()(torch.randn(4, C)).shape == (4, C)
    with pytest.raises(RuntimeError, match=r"new_group\(\[0, 1\]\)"):
        layer.train()(torch.randn(4, C))
    nk.sync_(layer, group)
    assert layer(torch.randn(4 * rank, C)).shape == (4 * rank, C)


def test_processes_compute_what_one_does_with_the_whole_batch(tmp_path):
    spawn(RANKS, tmp_path, in_each_process)


# ranks that do not call the same layers


def unequal_calls(rank: int) -> None:
    model = nn.ModuleDict({name: nk.BatchNorm1d(C, statistics=Synchronized()) for name in ("first", "second")})
    x = torch.randn(4, C)
    with nk.statistics.same_calls(model, seconds=20):
        model["second"](model["first"](x)).sum().backward()
    with pytest.raises(RuntimeError) as caught, nk.statistics.same_calls(model, seconds=20):
        [model[name](x) for name in (("first", "second") if rank == 0 else ("first",))]
    told = str(caught.value)
    assert (
        "call 2 of this block\n  rank 0: second (BatchNorm1d of 5 channels)\n  rank 1: the end of the block\n" in told
    )
    with pytest.raises(RuntimeError, match=r"rank 0: first .*\n  rank 1: second"), nk.statistics.same_calls(model):
        model["first" if rank == 0 else "second"](x)
    with pytest.raises((RuntimeError, KeyError)) as caught, nk.statistics.same_calls(model, seconds=20):
        model["first" if rank == 0 else "third"](x)
    assert rank or "rank 1: the end of the block, by KeyError" in str(caught.value)
    with nk.statistics.same_calls(model):  # neither evaluation nor frozen layers wait for anybody
        for _ in range(rank):
            model.eval()["first"](x)
    model.train()
    assert not model["first"]._forward_pre_hooks
    if rank == 0:
        late = (
            "rank 0 is at first .* call 1 of this block, and rank 1 did not come to any synchronised layer within 0.2 s"
        )
        with pytest.raises(RuntimeError, match=late), nk.statistics.same_calls(model, seconds=0.2):
            model["first"](x)


def test_unequal_calls_are_an_error_with_the_name_of_the_layer(tmp_path):
    spawn(2, tmp_path, unequal_calls)


# compiled


def compiled(rank: int) -> None:
    torch.use_deterministic_algorithms(False)  # torch.compile warns of it
    sizes = [3, 5]
    x = draw(8, C, 6, seed=19, dtype=torch.float32)
    plain, synchronised = pair(1, torch.float32)
    run = torch.compile(nn.Sequential(nn.Identity(), synchronised), backend="aot_eager")
    for _ in range(2):
        whole, leaf = x.clone().requires_grad_(), x.split(sizes)[rank].clone().requires_grad_()
        wanted, got = plain(whole).relu(), run(leaf).relu()
        wanted.backward(x)
        got.backward(x.split(sizes)[rank])
        assert_near(got.detach(), wanted.detach().split(sizes)[rank], 1e-5, "compiled, output")
        assert_near(leaf.grad, whole.grad.split(sizes)[rank], 1e-5, "compiled, gradient")
    assert_near(synchronised.running_var, plain.running_var, 1e-5, "compiled, running variance")
    assert synchronised.num_batches_tracked == 2


@pytest.mark.slow
def test_compiled_models_break_their_graph_at_a_synchronised_layer_and_are_right(tmp_path):
    spawn(2, tmp_path, compiled)


def test_a_world_of_one_compiles_whole():
    layer = nk.BatchNorm1d(C, statistics=Synchronized(required=False))
    run = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(8, C)
    assert torch.equal(run(x), nk.BatchNorm1d(C, backend="torch")(x))


# one process


def test_without_a_process_group_the_error_says_what_to_do():
    layer = nk.BatchNorm2d(C, statistics=Synchronized())
    x = torch.randn(4, C, 3, 3)
    with pytest.raises(
        RuntimeError, match=r"(?s)BatchNorm2d: statistics=Synchronized\(\).*init_process_group\(\).*torchrun"
    ):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert layer.eval()(x).shape == x.shape
    assert "batch_norm" in str(nk.explain(layer.train(), x))


@pytest.mark.parametrize("where", ["no group, not required", "a world of one"])
def test_one_process_is_plain_batch_norm(where, tmp_path):
    alone = where == "a world of one"
    plain, synchronised = nk.BatchNorm1d(C), nk.BatchNorm1d(C, statistics=Synchronized(required=alone))
    x = torch.randn(6, C) * 3 + 2
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_same(step(synchronised, x, x), step(plain, x, x))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            synchronised(x[:1])
        with nk.statistics.same_calls(synchronised):
            synchronised(x)
    finally:
        if alone:
            dist.destroy_process_group()


def test_the_policy_is_given_by_name_too():
    layer = nk.create("batch", C, dim=1, statistics=Synchronized())
    assert repr(layer).endswith("statistics=Synchronized())")
    assert [*layer.state_dict()] == [*nn.BatchNorm1d(C).state_dict()]


@pytest.mark.parametrize("make", [lambda: Synchronized([0, 1]), lambda: nk.sync_(nk.BatchNorm1d(C), "gloo")])
def test_what_is_no_process_group_is_refused_at_once(make):
    with pytest.raises(TypeError, match=r"is no process group.\n.*new_group"):
        make()


# nk.SyncBatchNorm


def test_sync_batch_norm_is_a_drop_in():
    ours, torchs = (inspect.signature(cls).parameters for cls in (nk.SyncBatchNorm, nn.SyncBatchNorm))
    positional = lambda parameters: [
        (p.name, p.default) for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert positional(ours) == positional(torchs)
    assert issubclass(nk.SyncBatchNorm, nn.SyncBatchNorm)
    layer, other = nk.SyncBatchNorm(C, 1e-3, None, True, True, None), nn.SyncBatchNorm(C, 1e-3, None, True, True, None)
    layer.load_state_dict(other.state_dict())
    other.load_state_dict(layer.state_dict())
    assert layer.process_group is None
    assert nk.SyncBatchNorm(C, bias=False).bias is None
    assert nk.SyncBatchNorm(C, track_running_stats=False).running_mean is None


@pytest.mark.parametrize("shape", [(6, C), (6, C, 4), (6, C, 4, 3), (6, C, 2, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_sync_batch_norm_in_one_process_gives_the_numbers_of_torchs(shape, options):
    ours, torchs = nk.SyncBatchNorm(C, **options, backend="torch"), nn.SyncBatchNorm(C, **options)
    x, upstream = torch.randn(shape) * 3 + 2, torch.randn(shape)
    for _ in range(2):
        got, wanted = step(ours, x, upstream), step(torchs, x, upstream)
        for name, value in wanted.items():
            assert_near(got[name], value, 1e-6, name)
    assert torch.allclose(ours.eval()(x), torchs.eval()(x), rtol=0, atol=1e-6)


def test_sync_batch_norm_refuses_what_torchs_refuses():
    for shape, words in (((4,), "at least 2D input"), ((4, 0), "non-zero")):
        for layer in (nk.SyncBatchNorm(C), nn.SyncBatchNorm(C)):
            with pytest.raises(ValueError, match=words):
                layer(torch.zeros(shape))


def test_sync_batch_norm_is_copied_stored_and_given_another_group():
    layer = nk.SyncBatchNorm(C, activation="relu")
    assert "statistics=Synchronized(required=False)" in repr(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other(torch.randn(8, C)) >= 0).all()
    layer.process_group = group = Stored((0, 1))
    assert layer.statistics == Synchronized(group, required=False)
    assert layer.process_group is group


def test_torchs_converter_makes_torchs_layer_as_ever():
    assert type(nk.SyncBatchNorm.convert_sync_batchnorm(nk.BatchNorm2d(C))) is nn.SyncBatchNorm
