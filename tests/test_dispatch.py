"""Which backend runs, how a new one plugs in, what ``explain`` says and leaves alone, and the words of refusals."""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch
from torch import nn

import normkit as nk
from cases import FORMS, ORDINARY
from mutants import Kernel, kernel_backend
from normkit import dispatch
from normkit.dispatch import BACKENDS, Backend
from oracle import examine, refusal


def plug(monkeypatch, *backends: Backend) -> None:
    """Put backends before all others: all that a new kernel has to do."""
    new = {backend.name: backend for backend in backends}
    monkeypatch.setattr(dispatch, "BACKENDS", {**new, "torch": dispatch.TORCH, "reference": dispatch.REFERENCE})


class Counting:
    """A kernel that is right, and counts its calls; it refuses what its reasons say."""

    def __init__(self, *reasons: str) -> None:
        self.calls, self.reasons = [], list(reasons)
        self.backend = Backend("counting", lambda call: self.reasons, self.run)

    def run(self, call):
        self.calls.append(call)
        return kernel_backend(Kernel).run(call)


# how a new backend plugs in


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_new_backend_serves_every_norm_without_an_edit_to_any(form, monkeypatch):
    kernel = Counting()
    plug(monkeypatch, kernel.backend)
    layer, x = form.layer(ORDINARY, activation="relu"), ORDINARY.input(form, torch.float32)
    assert nk.explain(layer, x).backend == "counting"
    assert kernel.calls == []
    examine(layer, x, ORDINARY.input(form, torch.float32))
    (call,) = kernel.calls
    assert call.spec is form.spec
    assert (call.problem() is None) == (form.spec.over is None)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_backend_with_a_reason_is_passed_over_and_its_reason_told(form, monkeypatch):
    kernel = Counting("rows of 12 are too odd", "it is Monday")
    plug(monkeypatch, kernel.backend)
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    layer(x)
    explanation = nk.explain(layer, x)
    assert kernel.calls == []
    assert explanation.backend == "torch"
    assert explanation.reasons["counting"] == ["rows of 12 are too odd", "it is Monday"]
    assert "  not counting: rows of 12 are too odd; it is Monday" in str(explanation).splitlines()


def test_a_backend_asked_for_by_name_fails_with_every_reason_and_never_falls_through(monkeypatch):
    odd, other = Counting("rows of 12 are too odd", "it is Monday"), Counting("no such device")
    plug(monkeypatch, odd.backend, Backend("other", other.backend.reasons_against, other.run))
    layer, x = nk.LayerNorm(12, backend="counting"), torch.randn(4, 12)
    expected = (
        'layer_norm: backend="counting" was asked for and cannot run this input.\n'
        "  x (4, 12) torch.float32 on cpu\n"
        "  counting: rows of 12 are too odd; it is Monday\n"
        "  other: no such device\n"
        "  torch: would run it\n"
        "  reference: it is the oracle and runs only when asked for by name"
    )
    for ask in (lambda: layer(x), lambda: nk.explain(layer, x)):
        with pytest.raises(RuntimeError) as refused:
            ask()
        assert str(refused.value) == expected
    layer.backend = None
    with nk.backend("counting"), pytest.raises(RuntimeError, match="cannot run this input"):
        layer(x)
    assert odd.calls == other.calls == []


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_backend_runs_what_it_is_asked_for_or_says_why_not(form, name):
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    if why := refusal(name, layer, x):
        for ask in (lambda: layer(x), lambda: nk.explain(layer, x)):
            with (
                nk.backend(name),
                pytest.raises(RuntimeError, match="was asked for and cannot run this input") as refused,
            ):
                ask()
            assert f"\n  {name}: {why}\n" in str(refused.value)
            assert all(f"\n  {other}: " in str(refused.value) for other in BACKENDS)
        return
    with nk.backend(name):
        explanation = nk.explain(layer, x)
        assert layer(x).shape == x.shape
    assert explanation.backend == name
    assert set(explanation.reasons) == set(BACKENDS) - {name}
    assert all(explanation.reasons.values())


# which backend runs


def runs(layer: nn.Module) -> str:
    return nk.explain(layer, torch.randn(4, 12)).backend


def test_the_layer_goes_before_the_surrounding_with_and_that_before_the_order(monkeypatch):
    kernel = Counting()
    plug(monkeypatch, kernel.backend)
    free, bound = nk.LayerNorm(12), nk.LayerNorm(12, backend="reference")
    assert (runs(free), runs(bound)) == ("counting", "reference")
    with nk.backend("torch"):
        assert (runs(free), runs(bound)) == ("torch", "reference")
        with nk.backend("auto"):
            assert (runs(free), runs(bound)) == ("counting", "reference")
        assert runs(free) == "torch"
    assert runs(free) == "counting"


def test_the_with_ends_also_when_something_is_raised_in_it():
    before = runs(nk.LayerNorm(12))
    with pytest.raises(KeyError), nk.backend("reference"):
        raise KeyError
    assert runs(nk.LayerNorm(12)) == before


def test_the_functions_take_a_backend_too(monkeypatch):
    kernel = Counting()
    plug(monkeypatch, kernel.backend)
    x = torch.randn(4, 12)
    nk.functional.layer_norm(x, (12,), backend="torch")
    assert kernel.calls == []
    nk.functional.layer_norm(x, (12,), backend="counting")
    assert len(kernel.calls) == 1


def test_the_reference_never_runs_unasked():
    for form in FORMS:
        layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
        assert nk.explain(layer, x).backend != "reference"


# what explain says, and what it leaves alone


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_explain_leaves_buffers_counters_hooks_and_the_random_state_alone(form, mode, momentum):
    layer, x = form.layer(ORDINARY), ORDINARY.input(form, torch.float32)
    if hasattr(layer, "momentum"):
        layer.momentum = momentum
    layer.train(mode == "train")
    layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state = {name: value.clone() for name, value in [*layer.named_buffers(), *layer.named_parameters()]}
    random, attributes = torch.get_rng_state(), dict(vars(layer))
    nk.explain(layer, x, residual=x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in [*layer.named_buffers(), *layer.named_parameters()])
    assert vars(layer) == attributes
    assert layer.training == (mode == "train")


def test_explain_says_nothing_about_the_input_that_only_a_forward_pass_should_say():
    """The warning of a group norm with one value per group comes once; explain must not use it up."""
    layer, x = nk.GroupNorm(4, 4), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nk.explain(layer, x)
    with pytest.warns(UserWarning, match="every group holds a single value"):
        layer(x)


def test_explain_leaves_the_layers_of_other_threads_alone():
    x, seen = torch.randn(4, 12), []

    class Meanwhile(nk.LayerNorm):
        """While it is being explained, another thread uses another layer."""

        def forward(self, input):
            other = threading.Thread(target=lambda: seen.append(nk.RMSNorm(12)(x)))
            other.start()
            other.join()
            return super().forward(input)

    assert nk.explain(Meanwhile(12), x).norm == "layer_norm"
    assert [y.shape for y in seen] == [x.shape]


def test_explain_speaks_of_the_problem_and_of_every_backend():
    layer = nk.BatchNorm2d(6, activation="silu").eval().bfloat16()
    x = torch.randn(4, 6, 5, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with nk.backend("torch"):
        explanation = nk.explain(layer, x, residual=x)
    problem = explanation.problem
    assert (problem.kind, problem.shape, problem.strides) == ("channels", (4, 6, 5, 3), (90, 1, 18, 6))
    assert (problem.view, problem.pooled, problem.weighted) == ((4, 6, 5, 3), (0, 2, 3), (1,))
    assert (problem.dtype, problem.device, problem.center, problem.training) == ("bfloat16", "cpu", True, False)
    assert (problem.activation, problem.residual, problem.grad) == ("silu", True, True)
    assert (problem.elements, problem.values, problem.statistics) == (360, 60, 6)
    assert problem.bytes_moved == 360 * 2 * 3
    assert str(explanation).splitlines()[:3] == [
        "batch_norm: the torch backend runs.",
        "  input 4 x 6 x 5 x 3 bfloat16 on cpu; 6 statistics over 60 values each",
        "  least memory traffic of the forward pass: 0.00 MB",
    ]
    assert set(explanation.reasons) == set(BACKENDS) - {"torch"}
    assert json.loads(json.dumps(explanation.to_json()))["problem"]["view"] == [4, 6, 5, 3]


def test_explain_counts_in_the_view_of_the_pattern():
    problem = nk.explain(nk.GroupNorm(2, 6), torch.randn(4, 6, 5)).problem
    assert (problem.kind, problem.view, problem.pooled, problem.values) == ("rows", (4, 2, 3, 5), (2, 3), 15)
    assert nk.explain(nk.DyT(6), torch.randn(4, 6)).problem is None


def test_after_an_explanation_that_failed_layers_work_again():
    layer = nk.BatchNorm2d(6)
    with pytest.raises(ValueError, match="expected 4D input"):
        nk.explain(layer, torch.randn(4, 6))
    assert layer(torch.randn(4, 6, 2, 2)).shape == (4, 6, 2, 2)


# the words of refusals: what was asked, why not, what to do


def backends() -> str:
    return ", ".join(("auto", *BACKENDS))


IMAGE = (8, 48, 14, 14)
REFUSALS = {
    "groups": (
        lambda: nk.GroupNorm(32, 48),
        ValueError,
        "group_norm: num_channels (48) must be divisible by num_groups (32)\n"
        '  pattern "n (g [c]) [s...]"\n'
        "  choose num_groups from the divisors of 48: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48",
    ),
    "channels": (
        lambda: nk.BatchNorm2d(64, backend="torch")(torch.randn(IMAGE)),
        RuntimeError,
        "batch_norm: running_mean should contain 48 elements not 64\n"
        '  input (8, 48, 14, 14) torch.float32, pattern "[n] c [s...]", weight (64,) torch.float32\n'
        "  made for 64 channels, the input has 48 on axis 1: make it for 48, or move the axes",
    ),
    "features": (
        lambda: nk.LayerNorm(64, backend="torch")(torch.randn(8, 48)),
        RuntimeError,
        "layer_norm: Given normalized_shape=[64], expected input with shape [*, 64], but got input of size[8, 48]\n"
        '  input (8, 48) torch.float32, pattern "n... [c...]", weight (64,) torch.float32',
    ),
    "axes": (
        lambda: nk.BatchNorm2d(48)(torch.randn(48, 14, 14)),
        ValueError,
        "BatchNorm2d: expected 4D input (got 3D input)\n"
        "  input (48, 14, 14); choose the class by the number of spatial axes: 1d for (n, c) and (n, c, l), "
        "2d for (n, c, h, w), 3d for (n, c, d, h, w)",
    ),
    "one value": (
        lambda: nk.BatchNorm1d(3, backend="torch")(torch.randn(1, 3)),
        ValueError,
        "batch_norm: Expected more than 1 value per channel when training, got input size torch.Size([1, 3])\n"
        '  input (1, 3) torch.float32, pattern "[n] c [s...]", weight (3,) torch.float32',
    ),
    "residual": (
        lambda: nk.BatchNorm2d(48)(torch.randn(IMAGE), residual=torch.randn(1, 48, 14, 14)),
        ValueError,
        "batch_norm: the residual has the shape (1, 48, 14, 14), the input (8, 48, 14, 14).\n"
        "  the residual is added element by element after the affine step: give it the shape of the input",
    ),
    "activation": (
        lambda: nk.BatchNorm2d(48, activation="rellu"),
        ValueError,
        "there is no activation named 'rellu'.\n"
        "  did you mean 'relu'?\n"
        "  choose from: relu, leaky_relu, silu, gelu, None, or give a torch.nn.Module",
    ),
    "not a layer": (
        lambda: nk.explain(nn.LayerNorm(3), torch.randn(2, 3)),
        TypeError,
        "explain: torch.nn.modules.normalization.LayerNorm is not a normkit layer.\n"
        "  make one with nk.create(...), or use the class of the same name in normkit",
    ),
    "several axes, channels first": (
        lambda: nk.RMSNorm((3, 4), channels_first=True),
        ValueError,
        "rms_norm: channels_first=True normalises over one axis, the channels of (n, c, s...);\n"
        "  normalized_shape is (3, 4); give the number of channels",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_says_what_was_asked_why_not_and_what_to_do(what):
    ask, kind, words = REFUSALS[what]
    with pytest.raises(kind) as refused:
        ask()
    assert type(refused.value) is kind
    assert str(refused.value) == words


@pytest.mark.parametrize(
    "ask",
    [
        lambda: nk.LayerNorm(3, backend="refrence"),
        lambda: nk.backend("refrence").__enter__(),
        lambda: nk.functional.layer_norm(torch.randn(2, 3), (3,), backend="refrence"),
    ],
    ids=["layer", "with", "function"],
)
def test_an_unknown_backend_is_refused_with_the_nearest(ask):
    with pytest.raises(ValueError) as refused:
        ask()
    words = f"there is no backend named 'refrence'.\n  did you mean 'reference'?\n  choose from: {backends()}"
    assert str(refused.value).removeprefix("layer_norm: ").partition("\n  input")[0] == words


def test_an_error_that_is_not_about_the_arguments_passes_as_it_is(monkeypatch):
    """Out of memory and the like keep their type, which callers catch."""

    class OutOfMemory(RuntimeError):
        pass

    def run(call):
        raise OutOfMemory("2 GiB")

    plug(monkeypatch, Backend("full", lambda call: [], run))
    with pytest.raises(OutOfMemory, match=r"^2 GiB$"):
        nk.LayerNorm(3)(torch.randn(2, 3))


def test_explain_passes_on_whatever_else_a_layer_takes():
    per_step = nk.BatchNorm1d(4, statistics=nk.statistics.PerStep(3))
    assert nk.explain(per_step, torch.randn(8, 4), step=2).norm == "batch_norm"
    with_mask = nk.explain(nk.LayerNorm(4), torch.randn(2, 3, 4), mask=torch.tensor([[True, True, False], [True] * 3]))
    assert with_mask.norm == "layer_norm"
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        nk.explain(per_step, torch.randn(8, 4), steps=2)
