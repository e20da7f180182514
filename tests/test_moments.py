"""Moments against brute force in float64: measured, masked, merged in any order, exchanged between processes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from normkit import Moments

AXES = [(0,), (1,), (0, 2), (0, 1, 2), (-1,)]


def brute_force(x: torch.Tensor, axes: tuple[int, ...], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Count, mean and m2 one statistic at a time, in float64, with no formula shared with Moments."""
    axes = tuple(axis % x.dim() for axis in axes)
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    order = [*kept, *axes]
    shape = [x.shape[axis] for axis in kept]
    rows = x.double().permute(order).reshape(torch.Size(shape).numel(), -1)
    keep = (
        (torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)).permute(order).reshape(rows.shape)
    )
    found = []
    for row, chosen in zip(rows, keep, strict=True):
        values = row[chosen].tolist()
        mean = sum(values) / len(values) if values else 0.0
        found.append((len(values), mean, sum((value - mean) ** 2 for value in values)))
    return tuple(torch.tensor(column, dtype=torch.float64).reshape(shape) for column in zip(*found, strict=True))


def assert_moments(moments: Moments, expected: tuple[torch.Tensor, ...], largest: float, merges: int = 0) -> None:
    """The mean is known to d = 2 e max|x|, with e the epsilon of the arithmetic, and each merge adds as much.

    Squares around a mean that is off by d are off by count * d² in sum. A merge adds count * (difference of means)²,
    which is off by 2 d times a difference that is at most sqrt(m2 / count).
    """
    count, mean, m2 = expected
    e = torch.finfo(moments.mean.dtype).eps
    error = 2 * e * largest * (1 + merges)
    assert moments.mean.shape == mean.shape
    assert moments.m2.shape == m2.shape
    assert torch.equal(moments.count.expand_as(count), count)
    assert ((moments.mean - mean).abs() <= error).all()
    off = 4 * e * (1 + merges) * m2 + count * error**2 + (4 * error * (count * m2).sqrt() if merges else 0)
    assert ((moments.m2 - m2).abs() <= off).all()


def sample(offset: float = 3.0, scale: float = 5.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(6, 4, 5, dtype=torch.float64) * scale + offset).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_they_are_the_moments(axes, dtype):
    x = sample(dtype=dtype)
    moments = Moments.measure(x, axes)
    assert moments.count.dtype == torch.float64
    assert moments.mean.dtype == moments.m2.dtype == torch.promote_types(dtype, torch.float32)
    assert_moments(moments, brute_force(x, axes), float(x.abs().max()))


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_an_offset_of_1e4_at_deviation_1_costs_no_digits(axes):
    x = sample(1e4, 1.0)
    moments = Moments.measure(x, axes)
    count, mean, m2 = brute_force(x, axes)
    assert_moments(moments, (count, mean, m2), float(x.abs().max()))
    difference = x.square().mean(axes) - x.mean(axes).square()  # the formula that Moments never uses
    assert ((difference - m2 / count).abs() > 100 * (moments.var() - m2 / count).abs()).all()


def test_no_axis_is_refused():
    """torch takes an empty list of axes for all of them."""
    with pytest.raises(ValueError, match="no axis to pool"):
        Moments.measure(sample(), ())


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 1, 5), (1, 4, 1), (5,), (6, 1, 1)], ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_mask_leaves_values_out_whatever_they_are(axes, shape):
    """What is masked is NaN here: it must touch neither the moments nor the gradient."""
    x, mask = sample(), torch.rand(shape) < 0.5
    mask.view(-1)[0] = True
    expected = brute_force(x, axes, mask)
    hidden = x.masked_fill(~mask, torch.nan).requires_grad_()
    moments = Moments.measure(hidden, axes, mask)
    assert_moments(moments, expected, float(x.abs().max()))
    (moments.mean.sum() + moments.m2.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad.masked_select(~mask) == 0).all()


def test_a_mask_of_true_is_no_mask():
    x = sample()
    all_of_it, masked = Moments.measure(x, (0, 2)), Moments.measure(x, (0, 2), torch.ones(1, dtype=torch.bool))
    assert torch.equal(masked.count, all_of_it.count.expand(4))
    assert_moments(masked, brute_force(x, (0, 2)), float(x.abs().max()))


@pytest.mark.parametrize("mask", [None, torch.zeros(1, dtype=torch.bool)], ids=["no samples", "all masked"])
def test_no_value_at_all_is_a_count_of_zero(mask):
    nothing = Moments.measure(sample()[: 0 if mask is None else 6], (0, 2), mask)
    assert (nothing.count == 0).all()
    assert torch.equal(nothing.mean, torch.zeros(4))
    assert torch.equal(nothing.m2, torch.zeros(4))
    assert nothing.var().isnan().all()
    something = Moments.measure(sample(), (0, 2))
    for both in (nothing.merge(something), something.merge(nothing)):
        assert torch.equal(both.count.expand(4), something.count.expand(4))
        assert torch.equal(both.mean, something.mean)
        assert torch.equal(both.m2, something.m2)
    neither = nothing.merge(nothing)
    assert (neither.count == 0).all()
    assert not neither.mean.any()


def test_variance_is_biased_or_not_and_undefined_for_one_value():
    x = sample(dtype=torch.float64)
    moments = Moments.measure(x, (0, 2))
    for correction in (0, 1):
        expected = x.var((0, 2), correction=correction)
        assert ((moments.var(correction) - expected).abs() <= 30 * 4 * torch.finfo(torch.float64).eps * expected).all()
    alone = Moments.measure(x[:1, :, :1], (0, 2))
    assert torch.equal(alone.var(), torch.zeros(4, dtype=torch.float64))
    assert alone.var(correction=1).isnan().all()


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6), st.randoms(use_true_random=False), st.sampled_from([3.0, 1e4])
)
def test_parts_merge_in_any_order_and_any_grouping_to_the_whole(sizes, random, offset):
    generator = torch.Generator().manual_seed(random.randrange(2**32))
    x = (torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) * 2 + offset).float()
    mask = torch.rand(x.shape, generator=generator) < 0.7
    parts = [Moments.measure(part, (0,), keep) for part, keep in zip(x.split(sizes), mask.split(sizes), strict=True)]
    expected = brute_force(x.T, (1,), mask.T)
    largest = float(x.abs().max()) if x.numel() else 0.0
    assert_moments(Moments.merge_all(parts), expected, largest, len(parts))
    random.shuffle(parts)
    while len(parts) > 1:  # any tree, not only a chain
        place = random.randrange(len(parts) - 1)
        parts[place : place + 2] = [parts[place].merge(parts[place + 1])]
    assert_moments(parts[0], expected, largest, len(sizes))


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="nothing to merge; give at least one Moments"):
        Moments.merge_all([])


@pytest.mark.parametrize("masked", [False, True])
def test_measuring_and_merging_are_differentiable(masked):
    mask = torch.rand(6, 4, 5) < 0.6 if masked else None

    def both(x):
        first, second = (
            Moments.measure(half, (0, 2), keep)
            for half, keep in zip(x.split(3), (None, None) if mask is None else mask.split(3), strict=True)
        )
        merged = first.merge(second)
        return merged.mean, merged.m2, merged.var()

    assert torch.autograd.gradcheck(both, sample(dtype=torch.float64).requires_grad_())


def test_moments_of_a_tensor_in_any_memory_are_the_same():
    x = sample()
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for axes in AXES:
        assert_moments(Moments.measure(strided, axes), brute_force(x, axes), float(x.abs().max()))


# exchange between processes

RANKS = 3
SHARES = {"unequal": (4, 1, 7), "one empty": (5, 0, 2), "first empty": (0, 3, 1), "all empty": (0, 0, 0)}


def one_rank(rank: int, store: str) -> None:
    """Runs in a process of its own; an assertion that fails here fails the test."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    pair = dist.new_group([0, 1])
    sent = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (sent.append(tensor.numel()), reduce(tensor, *args, **kwargs))[1]
    try:
        for group, ranks in ((None, (0, 1, 2)), (pair, (0, 1))):
            if rank not in ranks:
                continue
            for offset in (3.0, 1e4):
                for sizes in SHARES.values():
                    for masked in (False, True):
                        exchanged_as_the_whole(rank, ranks, group, sizes, offset, masked)
        assert set(sent) == {2 * 3, 3}, "two reductions, of counts with means and of m2, for 3 channels"
    finally:
        dist.destroy_process_group()


def exchanged_as_the_whole(rank, ranks, group, sizes, offset, masked) -> None:
    generator = torch.Generator().manual_seed(7)
    x = (torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) * 2 + offset).float()
    mask = torch.rand(x.shape, generator=generator) < 0.6
    parts, keeps = x.split(sizes), mask.split(sizes)
    mine = Moments.measure(parts[rank], (0,), keeps[rank] if masked else None)
    before = [tensor.clone() for tensor in (mine.count, mine.mean, mine.m2)]
    moments = mine.exchange(group)
    whole, kept = torch.cat([parts[r] for r in ranks]), torch.cat([keeps[r] for r in ranks])
    expected = brute_force(whole.T, (1,), kept.T if masked else None)
    assert moments.mean.dtype == mine.mean.dtype
    assert_moments(moments, expected, float(whole.abs().max()) if whole.numel() else 0.0, 1)
    assert all(torch.equal(a, b) for a, b in zip((mine.count, mine.mean, mine.m2), before, strict=True))
    everyone = [torch.empty(2, 3) for _ in ranks]
    dist.all_gather(everyone, torch.stack([moments.mean, moments.m2]), group=group)
    assert all(torch.equal(other, everyone[0]) for other in everyone)


def test_processes_with_unequal_and_empty_shares_end_with_the_moments_of_the_whole(tmp_path):
    """Three processes, and two of them as a group of their own."""
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path / "store"),), nprocs=RANKS)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_far_from_zero_the_mean_is_rounded_once_and_not_with_every_addition(masked):
    x = torch.randn(50, 999) + 1e4
    moments = Moments.measure(x, (1,), torch.ones_like(x, dtype=torch.bool) if masked else None)
    last_bit = 2.0**-10  # of float32 at 1e4
    assert (moments.mean.double() - x.double().mean(1)).abs().max().item() <= 0.51 * last_bit
