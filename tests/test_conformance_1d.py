"""Behaviour of normalization layers that surprises people: first shown on torch, then what normkit does about it.

A test whose name begins with test_torch goes red when torch mends the thing; then docs/conformance.md wants a new line.
The numbers of the rows are those of docs/conformance.md; rows about statistics are in test_conformance_statistics.py.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from twins import CHANNELS, TRACKING, assert_same, off_scale

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
CHOICES = ("auto", "torch")
each_tracking = pytest.mark.parametrize("twin", [t for t in TRACKING if all(t.options.values())], ids=str)


@pytest.fixture(autouse=True, params=CHOICES)
def _on_each_backend_that_may_run(request):
    with nk.backend(request.param):
        yield


def statistics(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items() if name.startswith(("running", "num"))}


# Row 15: a group of a single value.

LONELY = {"(n, c)": (5, CHANNELS), "(n, c, 1, 1)": (5, CHANNELS, 1, 1)}


@pytest.mark.parametrize("shape", LONELY)
def test_torch_group_norm_says_nothing_of_groups_of_one_value(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = nn.GroupNorm(CHANNELS, CHANNELS)(off_scale(LONELY[shape], 1))
    assert y.abs().max() < 1e-2  # rounding noise in the place of the input


@pytest.mark.parametrize("shape", LONELY)
def test_group_norm_warns_of_groups_of_one_value_and_only_once(shape):
    layer, x = nk.GroupNorm(CHANNELS, CHANNELS), off_scale(LONELY[shape], 1)
    with pytest.warns(UserWarning, match=r"every group holds a single value.*num_groups=6.*Choose fewer groups"):
        y = layer(x)
    assert y.abs().max() < 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        nk.GroupNorm(3, CHANNELS)(x)
        nk.GroupNorm(CHANNELS, CHANNELS)(off_scale((5, CHANNELS, 2), 1))


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_instance_norm_refuses_a_single_value_in_both(namespace):
    with pytest.raises(ValueError, match="Expected more than 1 spatial element when training"):
        namespace.InstanceNorm2d(CHANNELS)(off_scale((5, CHANNELS, 1, 1), 1))


# Row 16: a number of channels that is not used.


@pytest.mark.parametrize("namespace", [nn, nk], ids=["torch", "normkit"])
def test_instance_norm_of_another_number_of_channels_only_warns_in_both(namespace):
    with pytest.warns(UserWarning, match="size at dim=1 does not match num_features"):
        y = namespace.InstanceNorm2d(7)(off_scale((2, 3, 4, 4), 1))
    assert y.shape == (2, 3, 4, 4)


# Row 22: instance norm and channels-last.

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def channels_last_input(dim: int) -> Tensor:
    return off_scale((2, CHANNELS, 5, 4, 3)[: dim + 2], 1).contiguous(memory_format=LAYOUTS[dim])


@pytest.mark.parametrize("dim", LAYOUTS)
def test_torch_instance_norm_gives_contiguous_for_channels_last(dim):
    layer = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dim](CHANNELS)
    assert layer(channels_last_input(dim)).is_contiguous()


@pytest.mark.parametrize("name", nk.list_norms())
@pytest.mark.parametrize("dim", LAYOUTS)
def test_channels_last_in_is_channels_last_out_for_every_norm(dim, name):
    layer = nk.create(f"{name}:3" if name == "group_norm" else name, CHANNELS, dim=dim)
    x = channels_last_input(dim)
    for training in (True, False):
        y = layer.train(training)(x, residual=x)
        assert y.is_contiguous(memory_format=LAYOUTS[dim])
        assert layer(x.contiguous()).is_contiguous()


# Row 23: a counter that runs ahead.


def test_torch_counts_a_batch_that_it_refuses():
    layer = nn.BatchNorm1d(CHANNELS)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(off_scale((1, CHANNELS), 1))
    assert layer.num_batches_tracked.item() == 1


def test_a_batch_that_is_refused_is_not_counted():
    layer = nk.BatchNorm1d(CHANNELS)
    before = statistics(layer)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(off_scale((1, CHANNELS), 1))
    assert_same(statistics(layer), before)


# Row 24: instance norm without samples.


def test_torch_affine_instance_norm_cannot_take_an_empty_batch():
    with pytest.raises(IndexError):
        nn.InstanceNorm2d(CHANNELS, affine=True)(torch.empty(0, CHANNELS, 5, 4))


def test_torch_instance_norm_statistics_do_not_survive_an_empty_batch():
    layer = nn.InstanceNorm2d(CHANNELS, track_running_stats=True)
    layer(torch.empty(0, CHANNELS, 5, 4))
    assert layer.running_mean.isnan().all()


@each_tracking
def test_an_empty_batch_leaves_the_statistics_alone(twin):
    layer = twin.layer()
    layer(twin.input())
    before = statistics(layer)
    assert layer(twin.input(samples=0)).numel() == 0
    after = statistics(layer)
    if twin.mixes_samples:  # torch counts it
        assert after.pop("num_batches_tracked") == before.pop("num_batches_tracked") + 1
    assert_same(after, before)
    assert layer.num_batches_skipped.item() == 0


# Row 25: momentum=None and the compiler.


def test_torch_batch_norm_with_momentum_none_does_not_compile_whole():
    torch._dynamo.reset()
    layer = torch.compile(nn.BatchNorm2d(CHANNELS, momentum=None), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        layer(off_scale((5, CHANNELS, 4, 4), 1))


def test_batch_norm_with_momentum_none_compiles_whole():
    torch._dynamo.reset()
    layer = nk.BatchNorm2d(CHANNELS, momentum=None)
    other = copy.deepcopy(layer)
    whole = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        x = off_scale((5, CHANNELS, 4, 4), 1)
        with nk.backend("torch"):
            assert whole(x).equal(other(x))
    assert_same(statistics(layer), statistics(other))


# Row 26: a checkpoint for a lazy layer.


def test_torch_lazy_instance_norm_forgets_its_channels_when_a_checkpoint_comes_first():
    layer = nn.LazyInstanceNorm2d()
    layer.load_state_dict(nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True).state_dict())
    with pytest.raises(ValueError, match=r"num_features \(0\)"):
        layer(off_scale((5, CHANNELS, 4, 4), 1))


def test_lazy_layers_take_their_channels_from_a_checkpoint():
    for ours, torchs in ((nk.LazyInstanceNorm2d, nn.InstanceNorm2d), (nk.LazyBatchNorm2d, nn.BatchNorm2d)):
        layer = ours()
        layer.load_state_dict(torchs(CHANNELS, affine=True, track_running_stats=True).state_dict())
        assert layer(off_scale((5, CHANNELS, 4, 4), 1)).shape == (5, CHANNELS, 4, 4)
        assert layer.num_features == CHANNELS


# Row 28: a batch of one, whose sample axis may have any stride.


def gradient(layer: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), x, upstream)[0]


def odd(x: Tensor) -> Tensor:
    """The same numbers channels-last, with a stride of 1 along the axis of size 1."""
    samples, channels, _, width = x.shape
    assert samples == 1
    return torch.empty(x.numel()).as_strided(x.shape, (1, 1, width * channels, channels)).copy_(x)


def test_torch_batch_norm_has_a_wrong_gradient_for_a_batch_of_one_with_an_odd_stride():
    x, upstream = off_scale((1, CHANNELS, 5, 4), 1), torch.randn(1, CHANNELS, 5, 4)
    layer = nn.BatchNorm2d(CHANNELS)
    right = gradient(layer, x, upstream)
    for wrong in (gradient(layer, odd(x), upstream), gradient(layer, x, odd(upstream))):
        assert (wrong - right).abs().max() > 0.1 * right.abs().max()


@pytest.mark.parametrize("name", nk.list_norms())
def test_the_gradient_of_a_batch_of_one_does_not_depend_on_a_stride_that_means_nothing(name):
    """Another kernel, another order of summation: an error per element, of numbers as large as the largest."""
    x, upstream = off_scale((1, CHANNELS, 5, 4), 1), torch.randn(1, CHANNELS, 5, 4)
    layer = nk.create(f"{name}:3" if name == "group_norm" else name, CHANNELS)
    right = gradient(layer, x, upstream)
    bound = x.numel() * torch.finfo(x.dtype).eps * right.abs().max()
    for got in (
        gradient(layer, odd(x), upstream),
        gradient(layer, x, odd(upstream)),
        gradient(layer, odd(x), odd(upstream)),
    ):
        assert ((got - right).abs() <= bound).all()


# The page.


def rows() -> dict[str, list[str]]:
    cells = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cell[0].strip(): [c.strip() for c in cell[1:]] for cell in cells if cell[0].strip().isdigit()}


def test_the_page_names_every_row_once_and_what_becomes_of_it():
    assert sorted(map(int, rows())) == list(range(1, 29))
    for cells in rows().values():
        assert cells[1] in ("yes", "no", "not run here")
        assert cells[2].split(":")[0] in ("same as torch", "differs", "open")


def test_the_rows_that_tests_show_are_those_the_page_says_are():
    others = ("test_conformance_statistics.py", "test_conformance_fold.py")
    files = [Path(__file__), *(Path(__file__).with_name(name) for name in others)]
    source = "".join(path.read_text() for path in files)
    shown = {number for number in rows() if f"# Row {number}:" in source}
    about_statistics = {"1", "2", "11", "12", "13", "14", "17", "20", "21"}
    about_folding = {"7", "8", "9", "10", "18"}
    assert shown == about_statistics | about_folding | {"15", "16", "22", "23", "24", "25", "26", "28"}
    for number in shown:
        assert rows()[number][1] == "yes"
        assert not rows()[number][2].startswith("open")
