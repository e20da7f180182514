"""Masks of padded batches: every pooled norm sees the data as if the padding had been cut out.

What is padding is NaN here, in the input, in the residual and in the upstream gradient: whatever looks at it shows.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import normkit as nk
from cases import CASES, DTYPES, FORMS, NARROW, Case, Form, channels_last
from normkit.kernels import loading
from normkit.layout import parse, roles, solve
from normkit.vocabulary.spec import REGISTRY

ORDINARY = CASES[0]
POOLED = [form for form in FORMS if form.spec.over is not None]
PLANAR = [form for form in POOLED if form.dim == 2]
TRACKING = [form for form in POOLED if form.options.get("track_running_stats")]
BY_FEATURE = [form for form in POOLED if form.spec.over.startswith("n...")]
LENGTHS = [[5, 3, 2], [2, 2, 1], [0, 3, 2], [4, 1, 1]]
"""Of four samples along up to three axes: a full one, shorter ones, one that is padding alone."""
every_form = pytest.mark.parametrize("form", POOLED, ids=str)
every_planar_form = pytest.mark.parametrize("form", PLANAR, ids=str)


def padded_axes(form: Form) -> tuple[int, ...]:
    """The axes of the input along which samples end early: space, unless it is normalised over like the features."""
    return tuple(range(1, 2 + form.dim - form.trailing)) if form.trailing else tuple(range(2, 2 + form.dim))


def lengths_for(form: Form) -> Tensor:
    table = torch.tensor(LENGTHS)[:, : len(padded_axes(form))]
    return table.squeeze(1) if table.shape[1] == 1 else table


def box(form: Form, sample: int) -> tuple[slice, ...]:
    """Where the values of a sample are that count, in an input with the axis of the samples."""
    index = [slice(sample, sample + 1)] + [slice(None)] * (form.dim + 1)
    for axis, length in zip(padded_axes(form), LENGTHS[sample], strict=False):
        index[axis] = slice(0, length)
    return tuple(index)


def mask_for(form: Form, x: Tensor) -> Tensor:
    """Of the shape of the input."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for sample in range(len(LENGTHS)):
        mask[box(form, sample)] = True
    return mask


def by_position(form: Form, mask: Tensor) -> Tensor:
    """(n, s...), without the channels."""
    for axis in reversed(range(1, mask.dim())):
        if axis not in padded_axes(form):
            mask = mask.select(axis, 0)
    return mask


class Batch:
    """Input, residual and upstream gradient of one padded batch; NaN where they are padding."""

    def __init__(self, form: Form, dtype: torch.dtype = torch.float64, case: Case = ORDINARY) -> None:
        self.form, x = form, case.input(form, dtype)
        self.mask = mask_for(form, x)
        self.lengths = lengths_for(form)
        self.x = self.poisoned(x).requires_grad_()
        self.residual = self.poisoned(2 * torch.randn(x.shape).to(dtype) - 1).requires_grad_()
        self.upstream = self.poisoned(torch.randn(x.shape).to(dtype))

    def poisoned(self, t: Tensor) -> Tensor:
        t = t.clone()
        t[~self.mask] = torch.nan
        return t

    def seen(self, layer: nn.Module, y: Tensor) -> dict[str, Tensor]:
        """The output and all gradients, NaN where the padding let one through."""
        leaves = {"input": self.x, "residual": self.residual, **dict(layer.named_parameters())}
        found = torch.autograd.grad(y, [*leaves.values()], self.upstream)
        return {"output": y.detach()} | dict(zip(leaves, found, strict=True))

    def step(self, layer: nn.Module, call: nn.Module | None = None, **keep: Tensor) -> dict[str, Tensor]:
        keep, call = keep or {"lengths": self.lengths}, layer if call is None else call
        return self.seen(layer, call(self.x, residual=self.residual, **keep)) | running(layer)

    def step_without_padding(self, layer: nn.Module) -> dict[str, Tensor]:
        """The same from inputs out of which the padding was cut; 0 is put in its place afterwards."""
        y = torch.zeros_like(self.x)
        if "sample" in self.form.spec.laws:
            y, after = self._sample_by_sample(layer, y)
        else:  # the values that count as so many samples of one position each
            rows = [t.movedim(1, -1)[self.mask.select(1, 0)] for t in (self.x, self.residual)]
            x, residual = (t.reshape(*t.shape, *[1] * self.form.dim) for t in rows)
            whole = layer(x, residual=residual).flatten(1)
            y = y.movedim(1, -1).masked_scatter(self.mask.movedim(1, -1), whole).movedim(-1, 1)
            after = running(layer)
        y = torch.where(self.mask, y, 0)  # no gradient where the upstream one is NaN
        return self.seen(layer, y) | after

    def _sample_by_sample(self, layer: nn.Module, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Running statistics are the average of what each sample makes of them."""
        parameters, before, after = dict(layer.named_parameters()), running(layer), []
        for sample in range(len(LENGTHS)):
            part = box(self.form, sample)
            if self.x[part].numel():
                own = {name: value.clone() for name, value in before.items()}
                given = (self.x[part],), {"residual": self.residual[part]}
                y[part] = functional_call(layer, parameters | own, *given)
                after.append(own)
        return y, {name: torch.stack([own[name] for own in after]).mean(0) for name in before}


def running(layer: nn.Module) -> dict[str, Tensor]:
    names = ("running_mean", "running_var")
    return {name: getattr(layer, name).clone() for name in names if getattr(layer, name, None) is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        scale = max(1.0, value.abs().max().item())
        worst = (got[name].double() - value.double()).abs().max().item()
        assert worst <= bound * scale, f"{name}: off by {worst}"  # NaN fails too


def assert_identical(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].equal(value), name


def test_every_norm_that_pools_takes_a_mask():
    for name in nk.list_norms():
        family = REGISTRY[name]
        if family.spec.over is not None:
            for callable_ in (family.pick(2).forward, getattr(nk.functional, name)):
                assert {"mask", "lengths"} <= {*inspect.signature(callable_).parameters}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@every_form
def test_a_masked_batch_is_the_batch_without_its_padding(form, backend, training):
    layer = form.layer(ORDINARY, torch.float64, activation="gelu", backend=backend).train(training)
    other, batch = copy.deepcopy(layer), Batch(form)
    got = batch.step(layer)
    assert_close(got, batch.step_without_padding(other), 1e-12)
    for name in ("output", "input", "residual"):
        assert (got[name][~batch.mask] == 0).all()
        assert (got[name][2] == 0).all()  # the sample that is padding alone


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
@every_planar_form
def test_the_same_in_every_type(form, dtype):
    """Rounding adds up over the terms of a sum, 72 at most, and what is narrow is rounded once more."""
    layer = form.layer(ORDINARY, DTYPES[dtype], activation="relu")
    other, batch = copy.deepcopy(layer), Batch(form, DTYPES[dtype])
    got = batch.step(layer)
    assert got["output"].dtype == batch.x.dtype
    assert_close(got, batch.step_without_padding(other), 72 * torch.finfo(DTYPES[dtype]).eps)
    for name in running(layer):
        assert got[name].dtype == torch.float32


@every_form
def test_lengths_and_masks_of_all_shapes_are_one_thing(form):
    layer, batch = form.layer(ORDINARY, torch.float64, activation="silu"), Batch(form)
    shapes = [by_position(form, batch.mask), batch.mask]
    shapes.append(shapes[0].reshape([s if a in (0, *padded_axes(form)) else 1 for a, s in enumerate(batch.x.shape)]))
    wanted = batch.step(copy.deepcopy(layer))
    for mask in shapes:
        assert_close(batch.step(copy.deepcopy(layer), mask=mask), wanted, 1e-14)
    assert_identical(batch.step(copy.deepcopy(layer), lengths=batch.lengths.int()), wanted)


# any mask at all, against the definition


def by_definition(form: Form, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Row by row of the values that share their statistics: those that count, by themselves."""
    over = "n [c] s..." if getattr(layer, "channels_first", False) else form.spec.over
    layout = solve(over, tuple(x.shape), groups=form.options.get("num_groups", 1), trailing=form.trailing or 1)
    last = tuple(range(-len(layout.pooled), 0))
    rows, keep = (t.reshape(layout.view).movedim(layout.pooled, last) for t in (x, mask))
    shape, values = rows.shape, layout.values
    rows, keep = rows.reshape(-1, values), keep.reshape(-1, values)
    out = torch.zeros_like(rows)
    for row, kept in enumerate(keep):
        own = rows[row, kept]
        if own.numel():
            own = own - own.mean() if form.spec.center else own
            out[row, kept] = own / (own.square().mean() + (layer.eps or torch.finfo(x.dtype).eps)).sqrt()
    y = out.reshape(shape).movedim(last, layout.pooled)
    for name, combine in (("weight", torch.mul), ("bias", torch.add)):
        if (parameter := getattr(layer, name, None)) is not None:
            y = combine(y, parameter.reshape(layout.weight_view))
    return torch.where(mask, y.reshape(x.shape), 0)


def partial_masks(x: Tensor) -> Iterator[Tensor]:
    """Masks that keep part of every axis, and of none but one axis, in all shapes that broadcast."""
    for axes in itertools.chain([range(x.dim())], ([axis] for axis in range(x.dim()))):
        mask = torch.rand([x.shape[axis] if axis in axes else 1 for axis in range(x.dim())]) < 0.7
        yield mask


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@every_form
def test_any_mask_leaves_out_what_it_says_features_and_channels_too(form, backend):
    layer = form.layer(ORDINARY, torch.float64, backend=backend)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    for mask in partial_masks(ORDINARY.input(form, torch.float64)):
        batch = Batch(form)
        batch.mask = mask.expand_as(batch.x)
        batch.x = batch.poisoned(ORDINARY.input(form, torch.float64)).requires_grad_()
        upstream = batch.poisoned(torch.randn_like(batch.x))
        seen = []
        for y in (layer(batch.x, mask=mask), by_definition(form, layer, batch.x, batch.mask)):
            leaves = {"input": batch.x, **dict(layer.named_parameters())}
            found = torch.autograd.grad(y, [*leaves.values()], upstream)
            seen.append({"output": y.detach()} | dict(zip(leaves, found, strict=True)))
        assert_close(*seen, 1e-11)  # a row may keep two values that are near each other


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.samples and 2 in case.dims], ids=lambda case: case.name
)
@every_planar_form
def test_the_definition_holds_for_every_input(form, case):
    """Off scale, at an offset, with gaps between the elements, in any order in memory: as without a mask."""
    layer, x = form.layer(case, torch.float64), case.input(form, torch.float64)
    mask = form.arrange(torch.rand(case.samples, 1, *case.space[:2]) < 0.8)
    got, wanted = layer(x, mask=mask), by_definition(form, layer, x, mask.expand_as(x))
    assert_close({"y": got.detach()}, {"y": wanted.detach()}, 1e-9)  # 1e4 deviations away, 1e-12 is the last digit


@every_planar_form
def test_the_variance_survives_an_offset(form):
    """In float32, 1e4 deviations from 0: the mean is known to 1e-3, E[x²] - E[x]² to nothing."""
    case = Case("offset", "", lambda z: z + 1e4, channels=36, space=(7, 6, 1))
    layer, x = form.layer(case), case.input(form, torch.float32)
    mask = form.arrange(torch.rand(4, 1, 7, 6) < 0.8)
    truth = copy.deepcopy(layer).double()
    got, wanted = layer(x, mask=mask), truth(x.double(), mask=mask)
    assert_close({"y": got.detach()}, {"y": wanted.detach()}, 4 * torch.finfo(torch.float32).eps * 1e4)


@every_planar_form
def test_no_samples_at_all(form):
    case = Case("no_samples", "", lambda z: z, samples=0)
    layer, x = form.layer(case), case.input(form, torch.float32).requires_grad_()
    before = running(layer)
    y = layer(x, lengths=lengths_for(form)[:0])
    assert y.shape == x.shape
    y.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())
    assert_identical(running(layer), before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", [form for form in PLANAR if "sample" in form.spec.laws], ids=str)
def test_what_is_left_out_needs_no_epsilon(form, backend):
    """A sample that is padding alone has a variance of 0, and 0 / 0 would come back through the gradient of weight."""
    layer, batch = form.layer(ORDINARY, torch.float64, backend=backend), Batch(form)
    layer.eps = 0.0
    wanted = batch.step_without_padding(copy.deepcopy(layer))
    assert_close(batch.step(layer), wanted, 1e-12)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@every_planar_form
def test_the_zero_in_the_place_of_padding_may_be_infinitely_far_off(form, backend):
    """Where all that counts is -30000, the blank beside it is ten million deviations away: infinity in float16."""
    layer, batch = form.layer(ORDINARY, torch.float16, activation="silu", backend=backend), Batch(form, torch.float16)
    with torch.no_grad():
        batch.x.copy_(batch.poisoned(torch.full_like(batch.x, -3e4)))
    for name, value in batch.step(layer).items():
        assert value.isfinite().all(), name


# what does not change


@pytest.mark.parametrize("form", BY_FEATURE, ids=str)
def test_tokens_that_are_kept_are_normalised_as_without_a_mask(form):
    """Bit for bit: the statistics of a token are its own."""
    layer, batch = form.layer(ORDINARY), Batch(form, torch.float32)
    x = torch.where(batch.mask, batch.x, 0.5)
    y = layer(x, lengths=batch.lengths)
    assert y[batch.mask].equal(layer(x)[batch.mask])


@pytest.mark.parametrize("form", TRACKING, ids=str)
def test_in_evaluation_nothing_changes_but_the_padding(form):
    layer, batch = form.layer(ORDINARY), Batch(form, torch.float32)
    batch.step(layer)
    layer.eval()
    before, x = running(layer), torch.where(batch.mask, batch.x, 0.5)
    y = layer(x, lengths=batch.lengths)
    assert y[batch.mask].equal(layer(x)[batch.mask])
    assert_identical(running(layer), before)


@every_form
def test_a_mask_that_keeps_all_changes_no_number(form):
    layer, x = form.layer(ORDINARY, torch.float64), ORDINARY.input(form, torch.float64)
    other = copy.deepcopy(layer)
    got, wanted = layer(x, mask=torch.ones(x.shape, dtype=torch.bool)), other(x)
    assert_close({"output": got, **running(layer)}, {"output": wanted, **running(other)}, 1e-13)


@every_form
def test_a_batch_of_padding_alone_moves_nothing_and_has_no_gradient(form):
    layer, batch = form.layer(ORDINARY, activation="relu"), Batch(form, torch.float32)
    before = running(layer)
    seen = batch.step(layer, lengths=torch.zeros_like(batch.lengths))
    assert_identical({name: seen.pop(name) for name in before}, before)
    for name, value in seen.items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("form", TRACKING, ids=str)
def test_a_channel_that_is_left_out_leaves_the_running_statistics_alone(form):
    """It has no mean, and statistics that are not finite move nothing."""
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    before, mask = running(layer), torch.ones(1, x.shape[1], *[1] * form.dim, dtype=torch.bool)
    mask[:, 3] = False
    y = layer(x, mask=mask)
    assert (y[:, 3] == 0).all()
    assert y[:, 4].abs().max() > 0
    assert_identical(running(layer), before)


def test_the_running_statistics_average_instances_that_have_them():
    """Means 2 and 5 average to 3.5; the instance of one value has no variance: 4 * 2/1 of the first alone."""
    layer = nk.InstanceNorm1d(1, track_running_stats=True, momentum=0.5)
    x = torch.tensor([[[0.0, 4.0, 9.0]], [[5.0, 9.0, 9.0]], [[9.0, 9.0, 9.0]]])
    layer(x, lengths=torch.tensor([2, 1, 0]))
    assert layer.running_mean.tolist() == [1.75]
    assert layer.running_var.tolist() == [4.5]


@pytest.mark.parametrize("form", TRACKING, ids=str)
def test_a_batch_with_a_nan_that_counts_moves_nothing(form):
    layer, batch = form.layer(ORDINARY), Batch(form, torch.float32)
    before = running(layer)
    with torch.no_grad():
        batch.x[(0,) * batch.x.dim()] = torch.nan
    layer(batch.x, lengths=batch.lengths)
    assert_identical(running(layer), before)


# shapes, layouts, wrappers


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_single_sample_has_a_mask_without_the_axis_of_samples(dim):
    layer, x = nk.create("instance", 3, dim=dim), 5 * torch.randn(2, 3, *(5, 4, 3)[:dim]) + 2
    lengths = torch.tensor([3, 2, 2][:dim])
    wanted = layer(x[:1], lengths=lengths[None] if dim > 1 else lengths)[0]
    alone = lengths if dim > 1 else lengths[0]
    assert layer(x[0], lengths=alone).equal(wanted)
    assert layer(x[0], mask=wanted[0] != 0).equal(wanted)
    assert layer(x[0], lengths=alone, residual=x[1]).equal(torch.where(wanted[0] != 0, wanted + x[1], torch.zeros(())))


def test_a_lazy_layer_takes_its_size_from_a_masked_batch():
    for layer in (nk.LazyInstanceNorm1d(), nk.LazyBatchNorm1d()):
        y = layer(torch.randn(2, 3, 5), lengths=torch.tensor([5, 2]))
        assert layer.num_features == 3
        assert (y[1, :, 2:] == 0).all()


@pytest.mark.parametrize("form", [form for form in PLANAR if not form.trailing], ids=str)
def test_channels_last_stays_channels_last(form):
    layer, batch = form.layer(ORDINARY), Batch(form, torch.float32)
    wanted = batch.step(copy.deepcopy(layer))
    batch.x = channels_last(batch.x.detach()).requires_grad_()
    got = batch.step(layer)
    assert got["output"].is_contiguous(memory_format=torch.channels_last)
    assert_close(got, wanted, 1e-5)


@every_form
def test_the_functional_form_is_the_layer(form):
    layer, batch = form.layer(ORDINARY, torch.float64), Batch(form)
    kept, eps = running(layer), layer.eps
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    keep = {"lengths": batch.lengths, "residual": batch.residual}
    match form.name:
        case "batch_norm" | "instance_norm":
            given = (*(kept.values() or (None, None)), weight, bias, True, layer.momentum, eps)
        case "group_norm":
            given = (layer.num_groups, weight, bias, eps)
        case "layer_norm":
            given = (layer.normalized_shape, weight, bias, eps)
        case "filter_response_norm":
            given = (weight, bias, eps)
        case "power_norm":
            given = (layer.running_square, weight, bias, True, eps)
        case _:
            given = (layer.normalized_shape, weight, eps)
    if hasattr(layer, "channels_first"):
        keep["channels_first"] = layer.channels_first
    y = getattr(nk.functional, form.name)(batch.x, *given, **keep)
    got = batch.seen(layer, y) | kept
    assert_close(got, batch.step(layer), 1e-12)


def test_functional_batch_norm_in_evaluation_uses_the_running_statistics():
    x = torch.tensor([[[1.0, torch.nan]], [[3.0, 5.0]]])
    mean, var = torch.ones(1), torch.full((1,), 4.0)
    y = nk.functional.batch_norm(x, mean, var, eps=0.0, lengths=torch.tensor([1, 2]))
    assert y.tolist() == [[[0.0, 0.0]], [[1.0, 2.0]]]
    assert (mean.item(), var.item()) == (1.0, 4.0)


@pytest.mark.parametrize("form", TRACKING, ids=str)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_recomputing_forward_moves_nothing(form, reentrant):
    layer, batch = form.layer(ORDINARY), Batch(form, torch.float32)
    other = copy.deepcopy(layer)

    def through(x: Tensor, residual: Tensor, lengths: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(x, residual=residual, lengths=lengths), x, use_reentrant=reentrant)

    y = through(batch.x, batch.residual, batch.lengths)
    y.backward(batch.upstream)
    got = batch.x.grad
    wanted = batch.step(other)
    assert got.equal(wanted["input"])
    assert_identical(running(layer), running(other))


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # torch's own RMS norm, with a weight in float32
@every_planar_form
def test_under_autocast_the_output_has_the_type_that_it_has_without_a_mask(form):
    layer, batch = form.layer(ORDINARY), Batch(form, torch.float32)
    wanted = layer(ORDINARY.input(form, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = layer(ORDINARY.input(form, torch.bfloat16)), batch.step(layer)
        narrow = layer(batch.x.bfloat16(), lengths=batch.lengths)
    assert plain.dtype == narrow.dtype == wanted.dtype
    for name in ("output", "input"):
        assert got[name].dtype == torch.float32
        assert (got[name][~batch.mask] == 0).all()
        assert got[name].isfinite().all()


def assert_compiles(form: Form, **keep: Tensor) -> None:
    torch._dynamo.reset()
    layer, batch = form.layer(ORDINARY, activation="silu"), Batch(form, torch.float32)
    other = copy.deepcopy(layer)
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with nk.backend("torch"):
        assert_close(batch.step(layer, whole, **keep), batch.step(other, **keep), 1e-5)
    torch._dynamo.reset()


PLAIN = [form for form in PLANAR if form.label == ""]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in dynamo
@pytest.mark.parametrize("form", PLAIN, ids=str)
def test_torch_compile_takes_it_whole(form):
    assert_compiles(form, lengths=lengths_for(form))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in dynamo
@every_planar_form
def test_torch_compile_takes_every_mask_whole(form):
    mask = mask_for(form, ORDINARY.input(form, torch.float32))
    for shape in (mask, by_position(form, mask)):
        assert_compiles(form, mask=shape)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in dynamo
@pytest.mark.parametrize("form", [form for form in PLAIN if "[s...]" in form.spec.over], ids=str)
def test_one_graph_serves_batches_of_any_size(form):
    torch._dynamo.reset()
    layer = form.layer(ORDINARY)
    other = copy.deepcopy(layer)
    whole = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, height, width in ((5, 7, 4), (9, 3, 6), (2, 8, 5)):
            x = form.arrange(5 * torch.randn(n, ORDINARY.channels, height, width) + 3).contiguous()
            keep = form.arrange(torch.rand(n, 1, height, width) < 0.7)
            assert_close({"y": whole(x, mask=keep)}, {"y": other(x, mask=keep)}, 1e-5)
            assert_close(running(layer), running(other), 1e-5)
    torch._dynamo.reset()


@every_planar_form
def test_it_can_be_differentiated_twice(form):
    layer = form.layer(ORDINARY, torch.float64, activation="gelu")
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    batch = Batch(form)
    x, residual = (torch.where(batch.mask, t.detach(), 0.3).requires_grad_() for t in (batch.x, batch.residual))
    names, values = [*dict(layer.named_parameters())], [p.detach().requires_grad_() for p in layer.parameters()]

    def run(x: Tensor, residual: Tensor, *values: Tensor) -> Tensor:
        given = {**dict(zip(names, values, strict=True)), **{name: b.clone() for name, b in state.items()}}
        return functional_call(layer, given, (x,), {"residual": residual, "lengths": batch.lengths})

    assert gradcheck(run, (x, residual, *values), fast_mode=True)
    assert gradgradcheck(run, (x, residual, *values), fast_mode=True)


@every_planar_form
def test_vmap_and_gradients_by_function_are_those_of_one_input_after_the_other(form):
    layer = form.layer(ORDINARY, torch.float64).eval()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    xs = torch.stack([ORDINARY.input(form, torch.float64) for _ in range(2)])
    masks = torch.rand(xs.shape) < 0.7
    weights = torch.randn(xs.shape[1:], dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x,), {"mask": mask}) * weights).sum()

    got = vmap(grad(loss, argnums=1), (None, 0, 0))(parameters, xs, masks)
    for i in range(2):
        x = xs[i].clone().requires_grad_()
        loss(parameters, x, masks[i]).backward()
        assert_close({"x": got[i]}, {"x": x.grad}, 1e-12)
    shared = vmap(lambda x: layer(x, lengths=lengths_for(form)))(xs)
    assert_close({"y": shared[1]}, {"y": layer(xs[1], lengths=lengths_for(form))}, 1e-12)
    both = torch.stack([lengths_for(form), lengths_for(form).flip(0)])
    own = vmap(lambda x, lengths: layer(x, lengths=lengths))(xs, both)
    assert_close({"y": own[1]}, {"y": layer(xs[1], lengths=both[1])}, 1e-12)


class Masked(nn.Module):
    """A model whose norm hears of the padding."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.relu(self.norm(x, mask=mask) + x)


@every_planar_form
def test_a_traced_or_accelerated_model_keeps_its_mask(form):
    model, x = Masked(form.layer(ORDINARY)).eval(), ORDINARY.input(form, torch.float32)
    mask = mask_for(form, x)
    wanted = model(x, mask)
    traced = torch.fx.symbolic_trace(model)
    (node,) = traced.graph.find_nodes(op="call_module", target="norm")
    assert "mask" in node.kwargs
    assert traced(x, mask).equal(wanted)
    nk.accelerate_(model, example_inputs=(x, mask))
    assert_close({"y": model(x, mask)}, {"y": wanted}, 1e-5)


@every_planar_form
def test_an_exported_program_takes_a_mask(form):
    model, x = Masked(form.layer(ORDINARY)).eval(), ORDINARY.input(form, torch.float32)
    mask = mask_for(form, x)
    program = torch.export.export(model, (x, mask)).module()
    other = torch.rand(x.shape) < 0.5
    assert_close({"y": program(x, other)}, {"y": model(x, other)}, 1e-6)


@pytest.mark.skipif(loading.module is None, reason="there are no compiled kernels here")
def test_a_kernel_asked_for_by_name_refuses_what_it_cannot_leave_out():
    x, mask = torch.randn(4, 6, 5), torch.rand(4, 5) < 0.5
    with nk.backend("native"):
        with pytest.raises(RuntimeError, match="a mask leaves out some of the values that share their statistics"):
            nk.functional.group_norm(x, 2, mask=mask)
        y = nk.functional.layer_norm(x, (6,), channels_first=True, mask=mask)  # whole positions: it can
    assert (y.movedim(1, -1)[~mask] == 0).all()


# what is refused

IMAGES = [form for form in POOLED if len(padded_axes(form)) == 2 and form.label in ("", "-channels_first")]


@pytest.mark.parametrize("form", IMAGES, ids=str)
def test_bad_masks_are_one_clear_error_each(form):
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    lengths, mask = lengths_for(form), mask_for(form, x)
    for keep, error, words in (
        ({"mask": mask, "lengths": lengths}, ValueError, "give one of them"),
        ({"mask": mask.float()}, TypeError, r"the mask is of torch\.float32; it must be of torch\.bool"),
        ({"mask": mask[:, :2]}, ValueError, r"the mask has the shape .* give it \(4, 5, 3\)"),
        ({"mask": mask[0]}, ValueError, "the mask has the shape"),
        ({"lengths": lengths + 1}, ValueError, "a length is 6, and axis . of the input has 5 places"),
        ({"lengths": lengths - 1}, ValueError, "a length is -1"),
        ({"lengths": lengths[:, 0]}, ValueError, r"needs \(4, 2\): one length per sample and padded axis"),
        ({"lengths": lengths[:3]}, ValueError, r"lengths have the shape \(3, 2\)"),
        ({"lengths": lengths.float()}, TypeError, "no integer type"),
    ):
        with pytest.raises(error, match=f"(?is){form.name.split('_')[0]}.*{words}"):
            layer(x, **keep)


def test_lengths_of_what_has_only_samples_and_channels_are_refused():
    for name in ("batch", "layer", "rms", "group:3"):
        with pytest.raises(ValueError, match=r"an input of the shape \(4, 12\) has only samples and channels"):
            nk.create(name, 12, dim=1, **({"channels_first": False} if name in ("layer", "rms") else {}))(
                torch.randn(4, 12), lengths=torch.ones(4, dtype=torch.int64)
            )


def test_what_does_not_fit_is_refused_as_it_is_without_a_mask():
    x, keep = 5 * torch.randn(4, 6, 5), torch.rand(4, 6, 5) < 0.7
    with pytest.raises(RuntimeError, match=r"layer_norm: .*normalized_shape=\[6\]"):
        nk.functional.layer_norm(x, (6,), mask=keep)
    with pytest.raises(RuntimeError, match="made for 4 channels, the input has 6 on axis 1"):
        nk.functional.instance_norm(x, weight=torch.ones(4), mask=keep)
    with pytest.raises(RuntimeError, match=r"group_norm: .*num_groups=4"):
        nk.functional.group_norm(x, 4, mask=keep)
    with pytest.raises(ValueError, match=r"the residual has the shape \(1, 6, 1\)"):
        nk.functional.group_norm(x, 3, mask=keep, residual=torch.ones(1, 6, 1))
    with pytest.raises(ValueError, match="needs more axes than the 1 of the input"):
        nk.functional.layer_norm(torch.ones(6), (1, 6), mask=torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("over", sorted({form.spec.over for form in POOLED} | {"n [c] s..."}))
def test_the_roles_of_axes_do_not_depend_on_their_sizes(over):
    inside = any(axis.inside for axis in parse(over))
    layout = solve(over, (4, 12, 5, 3), groups=4 if inside else 1)
    pooled, weighted, padded = roles(over, 4)
    assert (pooled, weighted) == (layout.pooled, layout.weighted)
    assert padded == ((1, 2) if over.startswith("n...") else (2, 3))
