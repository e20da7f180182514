"""torch.compile takes every layer whole: one graph, no second compilation, the numbers and the state of eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from cases import CASES, FORMS, Form
from twins import TRACKING, assert_same, off_scale

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, in dynamo

ORDINARY = CASES[0]
PLANAR = [form for form in FORMS if form.dim == 2]
OTHERS = [form for form in FORMS if form.dim != 2]
BATCHES = (5, 9, 2)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Nothing compiled before, and a second compilation of the same frame is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True), nk.backend("torch"):
        yield
    torch._dynamo.reset()


def compiled(layer: nn.Module, **options: object) -> nn.Module:
    return torch.compile(layer, fullgraph=True, **{"backend": "aot_eager", **options})


def step(call: nn.Module, layer: nn.Module, x: Tensor, *, residual: bool) -> dict[str, Tensor]:
    """Output, gradients and state after one step through ``call``, which is ``layer`` or its compiled form."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    r = (2 * torch.randn(x.shape) - 1).requires_grad_()
    y = call(x, residual=r) if residual else call(x)
    leaves = {"input": x, **({"residual": r} if residual else {}), **dict(layer.named_parameters())}
    found = torch.autograd.grad(y, list(leaves.values()), torch.randn(y.shape))
    gradients = {f"gradient of {name}": value for name, value in zip(leaves, found, strict=True)}
    return {"output": y.detach(), **gradients, **{name: b.clone() for name, b in layer.named_buffers()}}


def assert_compiles(form: Form, backend: str) -> None:
    for training in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        mine = form.layer(ORDINARY, activation="silu").train(training)
        if training and form.dim == 2 and form.label == "":
            mine.activation = nn.PReLU()
        other = copy.deepcopy(mine)
        whole = compiled(mine, backend=backend)
        for _ in range(3):
            x = ORDINARY.input(form, torch.float32)
            assert_same(step(whole, mine, x, residual=True), step(other, other, x, residual=True))
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@pytest.mark.parametrize(
    "form", [form if form.spec.twin else pytest.param(form, marks=pytest.mark.slow) for form in PLANAR], ids=str
)
def test_one_graph_in_training_and_in_evaluation_with_eagers_numbers(form):
    assert_compiles(form, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("form", OTHERS, ids=str)
def test_the_same_for_the_other_dimensions(form):
    assert_compiles(form, "aot_eager")


BATCH_AND_OTHERS = [form for form in PLANAR if form.label in ("", "-channels_first")]
# Of the norms that torch does not have `make test` compiles each once, in the test above.
EACH = [form if form.spec.twin else pytest.param(form, marks=pytest.mark.slow) for form in BATCH_AND_OTHERS]


@pytest.mark.parametrize("form", EACH, ids=str)
def test_going_from_training_to_evaluation_and_back_compiles_each_once_and_is_right(form):
    mine = form.layer(ORDINARY)
    other, whole = copy.deepcopy(mine), compiled(mine, backend="eager")
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=False):
        for training in (True, False, True, False):
            mine.train(training), other.train(training)
            x = ORDINARY.input(form, torch.float32)
            assert_same(step(whole, mine, x, residual=False), step(other, other, x, residual=False))
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    modes = 2 if [*mine.buffers()] else 1
    assert seen == [1, modes, modes, modes]


@pytest.mark.parametrize("form", EACH, ids=str)
def test_one_graph_serves_batches_and_maps_of_any_size(form):
    mine = form.layer(ORDINARY, activation="relu")
    other, whole = copy.deepcopy(mine), compiled(mine, dynamic=True, backend="eager")
    for training in (True, False):
        torch._dynamo.reset()
        mine.train(training), other.train(training)
        for n, h, w in ((5, 7, 4), (9, 3, 6), (2, 8, 5)):
            x = form.arrange(off_scale((n, ORDINARY.channels, h, w), 1)).contiguous()
            assert_same(step(whole, mine, x, residual=True), step(other, other, x, residual=True))


@pytest.mark.parametrize("twin", [t for t in TRACKING if all(t.options.values())], ids=str)
def test_the_cumulative_average_needs_no_second_graph(twin):
    """Eager code reads the counter and gives torch's numbers; in a graph it is a tensor: two more roundings a step."""
    mine = twin.layer(momentum=None)
    other, whole = copy.deepcopy(mine), compiled(mine)
    for _ in range(3):
        x = twin.input()
        got, wanted = step(whole, mine, x, residual=False), step(other, other, x, residual=False)
        for name in ("running_mean", "running_var"):
            bound = 6 * torch.finfo(torch.float32).eps * x.square().max()
            assert (got.pop(name) - wanted.pop(name)).abs().max() <= bound
        assert_same(got, wanted)
    assert mine.num_batches_tracked.item() == (3 if twin.mixes_samples else 0)


@pytest.mark.parametrize("value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("twin", [t for t in TRACKING if all(t.options.values())], ids=str)
def test_compiled_statistics_are_guarded_too(twin, value):
    layer = twin.layer()
    whole = compiled(layer)
    whole(twin.input())
    before = {name: buffer.clone() for name, buffer in layer.state_dict().items()}
    bad = twin.input()
    bad.view(-1)[3] = value
    whole(bad)
    assert_same(layer.state_dict(), before)
    assert layer.num_batches_skipped.item() == 1
    whole(twin.input())
    assert not layer.running_mean.equal(before["running_mean"])
    assert layer.num_batches_skipped.item() == 1


def test_functional_forms_compile_whole():
    x, weight = off_scale((5, 6, 4), 1), torch.rand(6) + 0.5

    def several(x: Tensor) -> Tensor:
        x = nk.functional.batch_norm(x, None, None, weight, training=True, activation="relu")
        x = nk.functional.group_norm(x, 3, weight, residual=x)
        x = nk.functional.instance_norm(x)
        x = nk.functional.layer_norm(x, (6,), weight, channels_first=True)
        x = nk.functional.rms_norm(x, (4,), activation=torch.tanh)
        return nk.functional.dyt(nk.functional.identity(x), torch.ones(1))

    assert compiled(several)(x).equal(several(x))


class Residual(nn.Module):
    """Convolution, norm, addition, activation: what a compiler is meant to make one of."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(ORDINARY.channels, ORDINARY.channels, 3, padding=1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x), residual=x)


INDUCTOR = [form for form in BATCH_AND_OTHERS if form.name in ("batch_norm", "group_norm")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when Inductor is loaded
@pytest.mark.parametrize("form", INDUCTOR, ids=str)
def test_inductor_once_per_family_of_kernels(form):
    """It adds the same terms in another order: at most one error per element, of numbers as large as the largest."""
    mine = Residual(form.layer(ORDINARY, activation="silu"))
    other = copy.deepcopy(mine)
    whole = compiled(mine, backend="inductor")
    x = ORDINARY.input(form, torch.float32)
    upstream, seen = torch.randn(x.shape), []
    for model, own in ((whole, mine), (other, other)):
        y = model(x)
        seen.append([y, *torch.autograd.grad(y, [*own.parameters()], upstream), *own.buffers()])
    for got, wanted in zip(*seen, strict=True):
        bound = x.numel() * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert ((got - wanted).abs() <= bound).all()
