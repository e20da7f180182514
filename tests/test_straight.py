"""Plain batch norm that goes straight to torch's operator, or to a kernel, does what the long way does, and leaves the
rest to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import normkit as nk
from normkit import dispatch
from normkit.kernels import loading, triton
from normkit.norms import batch_norm
from normkit.statistics.batch import PLAIN

STATE = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")


def layer(**options: object) -> nk.BatchNorm2d:
    torch.manual_seed(0)
    made = nk.BatchNorm2d(6, backend=BACKEND, **options)
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made


def batch(*shape: int, scale: float = 3.0) -> Tensor:
    return (torch.randn(*(shape or (5, 6, 3, 4))) * scale + 1).requires_grad_()


BACKEND = "torch"
ALIKE: dict[str, dict[str, float]] = {"torch": {"rtol": 0, "atol": 0}, "native": {}}
"""How nearly the numbers are those of torch's layer."""
WAYS = ("compiled", "in torch's operators", *(["launched"] if triton.INTERPRETED else []))
"""The last is for GPUs: tests/test_triton.py runs it in Triton's interpreter."""


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies the running statistics and lets them in; and who runs."""
    if request.param == "kernels":
        monkeypatch.setitem(globals(), "BACKEND", "native")
    if request.param == "launched":
        monkeypatch.setattr(dispatch, "proposal", launched)
    elif request.param == "in torch's operators":
        monkeypatch.setattr(loading, "module", None)
    elif loading.module is None:
        pytest.skip(loading.absence)


def launched(*statistics: Tensor | None) -> triton.Launched | None:
    return triton.Launched(*statistics) if triton.launchable(*statistics) else None


also_by_kernels = pytest.mark.parametrize("way", [*WAYS, "kernels"], indirect=True)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[bool]]:
    """For each training call of a layer since, whether it went straight."""
    seen: list[bool] = []
    real = batch_norm.straight

    def counted(*arguments: object) -> Tensor | None:
        y = real(*arguments)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(batch_norm, "straight", counted)
    return lambda: seen


def long_way(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A copy whose calls never go straight."""
    twin = copy.deepcopy(norm)
    monkeypatch.setattr(batch_norm, "straight", lambda norm, *rest: None if norm is twin else straight(norm, *rest))
    return twin


straight = batch_norm.straight


@also_by_kernels
@pytest.mark.parametrize("shape", [(5, 6, 3, 4), (1, 6, 3, 4), (7, 6, 1, 1), (4, 6, 5, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_output_gradients_and_statistics_are_bit_for_bit_those_of_the_long_way(
    shape, channels_last, activation, residual, monkeypatch
):
    norm = layer(activation=activation)
    twin = long_way(norm, monkeypatch)
    found = []
    for each in (norm, twin):
        torch.manual_seed(1)
        x, added = batch(*shape), batch(*shape) if residual else None
        form = torch.channels_last if channels_last else torch.contiguous_format
        for _ in range(3):
            y = each(x.contiguous(memory_format=form), residual=added)
            y.backward(torch.randn_like(y))
        gradients = [t.grad for t in (x, added, *each.parameters()) if t is not None]
        found.append([y, *gradients, *(getattr(each, name) for name in STATE)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert norm.num_batches_tracked == 3


def test_it_goes_straight_where_torchs_operator_runs_anyway(ways):
    for made in (layer(), layer(activation="relu"), copy.deepcopy(layer()), pickle.loads(pickle.dumps(layer()))):
        made(batch())
    nk.BatchNorm2d(6)(batch())  # small: nobody asked for torch, and it is faster
    with nk.backend("torch"):
        nk.BatchNorm2d(6)(batch(64, 6, 32, 32))
    assert ways() == [True] * 6
    assert copy.deepcopy(PLAIN) is PLAIN


def held(norm: nk.BatchNorm2d, x: Tensor) -> None:
    with nk.statistics_frozen(norm):
        norm(x)


def forward_mode(norm: nk.BatchNorm2d, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        norm(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))


def functorch(norm: nk.BatchNorm2d, x: Tensor) -> None:
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    torch.func.grad(lambda x, buffers: torch.func.functional_call(norm, buffers, (x,)).sum())(x.detach(), buffers)


def checkpointed(norm: nk.BatchNorm2d, x: Tensor) -> None:
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False).sum().backward()


ELSEWHERE: dict[str, tuple[dict, Callable[[nk.BatchNorm2d, Tensor], object], list[bool]]] = {
    "reference": ({"backend": "reference"}, lambda norm, x: norm(x), [False]),
    "average of all": ({"momentum": None}, lambda norm, x: norm(x), [False]),
    "no statistics": ({"track_running_stats": False}, lambda norm, x: norm(x), [False]),
    "half": ({}, lambda norm, x: norm.bfloat16()(x.bfloat16()), [False]),  # the weight is cast for the call
    "another policy": ({"statistics": nk.statistics.Ghost(2)}, lambda norm, x: norm(x), []),
    "evaluation": ({}, lambda norm, x: norm.eval()(x), []),
    "frozen": ({}, lambda norm, x: nk.freeze_(norm) and norm(x), []),
    "mask": ({}, lambda norm, x: norm(x, mask=torch.ones(5, 3, 4, dtype=torch.bool)), []),
    "held": ({}, held, [False]),
    "forward mode": ({}, forward_mode, [False]),
    "functorch": ({}, functorch, [False]),
    "checkpoint": ({}, checkpointed, [True, False]),  # the second forward pass moves nothing
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("why", ELSEWHERE)
def test_all_else_goes_the_long_way(why, ways):
    options, call, expected = ELSEWHERE[why]
    call(nk.BatchNorm2d(6, **{"backend": "torch", **options}), batch())
    assert ways() == expected


@also_by_kernels
def test_a_checkpoint_around_it_counts_the_batch_once_and_has_the_same_gradient():
    norm, plain, x = layer(activation="relu"), layer(activation="relu"), batch()
    y = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)
    y.square().sum().backward()
    there, x.grad = x.grad, None
    plain(x).square().sum().backward()
    assert torch.equal(there, x.grad)
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, plain.running_mean)


@also_by_kernels
def test_two_forward_passes_before_the_backward_passes():
    """The copies of the first call are written over by the second."""
    norm, alone = layer(), [layer(), layer()]
    inputs = [batch(), batch(scale=0.1)]
    outputs = [norm(x) for x in inputs]
    for y in outputs:
        y.square().sum().backward()
    shared = [x.grad.clone() for x in inputs]
    for x, each, expected in zip(inputs, alone, shared, strict=True):
        x.grad = None
        each(x).square().sum().backward()
        assert torch.equal(x.grad, expected)
    assert norm.num_batches_tracked == 2


def test_second_derivatives():
    norm = nk.BatchNorm2d(2, backend="torch", dtype=torch.float64)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm, (x,))


@also_by_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_moves_nothing_and_is_counted(value, ways):
    norm, before = layer(), copy.deepcopy(layer().state_dict())
    x = batch().detach()
    x[0, 0, 0, 0] = value
    norm(x)
    assert ways() == [True]
    assert norm.num_batches_skipped == 1
    for name, number in norm.state_dict().items():
        assert torch.equal(number, before[name]), name


@also_by_kernels
def test_called_first_under_inference_mode_then_trained(ways):
    norm = layer()
    with torch.inference_mode():
        norm(batch().detach())
    norm(batch()).sum().backward()
    assert ways() == [True, True]
    assert norm.num_batches_tracked == 2


def to_double(norm: nk.BatchNorm2d) -> None:
    norm.double()


def put_elsewhere(norm: nk.BatchNorm2d) -> None:
    norm.share_memory()


def replace_data(norm: nk.BatchNorm2d) -> None:
    norm.running_mean.data = torch.zeros(6)
    norm.running_var.data = torch.ones(6)


def replace_buffers(norm: nk.BatchNorm2d) -> None:
    norm.running_mean, norm.running_var = torch.zeros(6), torch.ones(6)


def load(norm: nk.BatchNorm2d) -> None:
    norm.load_state_dict(layer().state_dict(), assign=True)


@also_by_kernels
@pytest.mark.parametrize("change", [to_double, put_elsewhere, replace_data, replace_buffers, load])
def test_it_moves_the_running_statistics_that_the_layer_has_now(change, ways):
    norm = layer()
    x = batch()
    norm(x)
    change(norm)
    x = x.to(norm.running_mean.dtype)
    expected = nn.BatchNorm2d(6).to(x.dtype)
    expected.load_state_dict(norm.state_dict())
    norm(x)
    expected(x)
    assert ways() == [True, True]
    torch.testing.assert_close(norm.running_mean, expected.running_mean, **ALIKE[BACKEND])
    torch.testing.assert_close(norm.running_var, expected.running_var, **ALIKE[BACKEND])


@pytest.mark.parametrize(
    ("shape", "error", "says"),
    [
        ((5, 7, 3, 4), RuntimeError, "made for 6 channels, the input has 7"),
        ((1, 6, 1, 1), ValueError, "Expected more than 1 value per channel"),
    ],
)
def test_errors_are_those_of_the_long_way(shape, error, says):
    norm = layer()
    with pytest.raises(error, match=says):
        norm(batch(*shape))
    assert norm.num_batches_tracked == 0


@also_by_kernels
def test_a_residual_that_does_not_fit_is_refused_before_anything_moves():
    norm = layer()
    with pytest.raises(ValueError, match="the residual has the shape"):
        norm(batch(), residual=batch(1, 6, 1, 1))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(6))


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "layer": (
        lambda: nk.LayerNorm(4, backend="torch"),
        lambda norm, x, **rest: nk.functional.layer_norm(x, (4,), norm.weight, norm.bias, **rest),
    ),
    "rms": (
        lambda: nk.RMSNorm(4, backend="torch"),
        lambda norm, x, **rest: nk.functional.rms_norm(x, (4,), norm.weight, **rest),
    ),
    "group": (
        lambda: nk.GroupNorm(3, 6, backend="torch"),
        lambda norm, x, **rest: nk.functional.group_norm(x, 3, norm.weight, norm.bias, **rest),
    ),
    "instance": (
        lambda: nk.InstanceNorm2d(6, affine=True, backend="torch"),
        lambda norm, x, **rest: nk.functional.instance_norm(x, weight=norm.weight, bias=norm.bias, **rest),
    ),
}
"""A layer, and the public function, which always goes the long way."""


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_other_norms_go_straight_with_the_same_bits(norm, channels_last, activation, residual, monkeypatch):
    make, function = OTHERS[norm]
    ours = make()
    ours.activation = None if activation is None else nk.epilogue.activation_module(activation)
    form = torch.channels_last if channels_last else torch.contiguous_format
    found = []
    for by_layer in (True, False):
        torch.manual_seed(1)
        x, added = batch(), batch() if residual else None
        laid_out = x.contiguous(memory_format=form)
        if by_layer:
            with monkeypatch.context() as only:
                only.setattr(f"normkit.norms.{norm}_norm.normalize", None)  # where the long way would go
                y = ours(laid_out, residual=added)
        else:
            y = function(ours, laid_out, activation=activation, residual=added, backend="torch")
        ours.zero_grad()
        y.backward(torch.randn_like(y))
        found.append([y, *(t.grad for t in (x, added, *ours.parameters()) if t is not None)])
    for straightly, by_function in zip(*found, strict=True):
        assert torch.equal(straightly, by_function)
        assert straightly.stride() == by_function.stride()


@pytest.mark.parametrize("way", ["kernels"], indirect=True)
@pytest.mark.parametrize("norm", [*OTHERS, "layer over channels", "rms over channels"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
def test_other_norms_go_straight_to_the_kernels_with_the_same_bits(
    norm, channels_last, activation, residual, monkeypatch
):
    kind, _, channels_first = norm.partition(" over ")
    made = {"layer": nk.LayerNorm, "rms": nk.RMSNorm}
    ours = made[kind](6, channels_first=True) if channels_first else OTHERS[kind][0]()
    ours.backend, ours.activation = "native", None if activation is None else nk.epilogue.activation_module(activation)
    if channels_last and norm in ("layer", "rms"):
        pytest.skip("rows that do not lie together are left to torch")
    form = torch.channels_last if channels_last else torch.contiguous_format
    found = []
    for straightly in (True, False):
        torch.manual_seed(1)
        x, added = batch(), batch() if residual else None
        with monkeypatch.context() as only:
            if straightly:
                only.setattr(f"normkit.norms.{kind}_norm.normalize", None)  # where the long way would go
            else:
                only.setattr(type(ours), "_by_kernels", lambda *_, **__: None)
            y = ours(x.contiguous(memory_format=form), residual=added)
        ours.zero_grad()
        y.backward(torch.randn_like(y))
        found.append([y, *(t.grad for t in (x, added, *ours.parameters()) if t is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("norm", OTHERS)
def test_errors_of_other_norms_are_those_of_the_long_way(norm):
    with pytest.raises((RuntimeError, ValueError)) as straightly:
        OTHERS[norm][0]()(batch(5, 7, 3, 5))
    assert f"{norm}_norm: " in str(straightly.value) or "num_features" in str(straightly.value)
    with pytest.raises(ValueError, match="the residual has the shape"):
        OTHERS[norm][0]()(batch(), residual=batch(1, 6, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_without_gradients_goes_straight_with_the_same_bits(dtype, activation, frozen, monkeypatch):
    norm = layer(activation=activation)
    norm(batch())
    if frozen:
        nk.freeze_(norm)
    norm.train(frozen).to(dtype)
    x = batch().detach().to(dtype)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    with torch.no_grad():
        expected = nk.functional.batch_norm(
            x, mean, var, norm.weight, norm.bias, activation=activation, backend="torch"
        )
        with monkeypatch.context() as only:
            only.setattr("normkit.statistics.application.normalize", None)  # where the long way would go
            y = norm(x)
    assert torch.equal(y, expected)
    assert torch.equal(norm.running_mean, mean)
    long = norm(x.clone().requires_grad_())
    assert long.requires_grad
    assert torch.equal(long.detach(), expected)


@pytest.mark.parametrize("make", [layer, *(make for make, _ in OTHERS.values())])
def test_who_stands_in_for_the_call_of_all_modules_sees_these_too(make, monkeypatch):
    """As tracers and profilers do."""
    norm, seen, real = make(), [], nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *given, **named: seen.append(self) or real(self, *given, **named)
    )
    norm(batch(), residual=batch())
    assert seen == [norm]


def pruned(norm: nn.Module) -> None:
    prune.l1_unstructured(norm, "weight", amount=2)


def parametrized(norm: nn.Module) -> None:
    parametrize.register_parametrization(norm, "weight", nn.Softplus())


def of_buffers(norm: nn.Module) -> None:
    weight = norm.weight.detach()
    del norm.weight
    norm.register_buffer("weight", weight)


def without_bias(norm: nn.Module) -> None:
    del norm.bias
    norm.bias = None


@also_by_kernels
@pytest.mark.parametrize("change", [pruned, parametrized, of_buffers, without_bias])
def test_a_weight_that_is_no_parameter(change):
    ours, torchs = layer(), nn.BatchNorm2d(6)
    torchs.load_state_dict(ours.state_dict())
    change(ours)
    change(torchs)
    x = batch()
    torch.testing.assert_close(ours(x), torchs(x), **ALIKE[BACKEND])
    torch.testing.assert_close(ours.running_var, torchs.running_var, **ALIKE[BACKEND])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("change", [pruned, parametrized, of_buffers])
def test_a_weight_of_another_norm_that_is_no_parameter(norm, change):
    make, function = OTHERS[norm]
    ours, x = make(), batch()
    change(ours)
    assert torch.equal(ours(x), function(ours, x, backend="torch"))


def narrower(mean: Tensor, var: Tensor, room: Tensor) -> None:
    mean.data, var.data = room[:3].view(torch.float16), room[6:9].view(torch.float16)


def spread_out(mean: Tensor, var: Tensor, room: Tensor) -> None:
    mean.data = room[:12:2]


def one_for_all(mean: Tensor, var: Tensor, room: Tensor) -> None:
    mean.data = room[:1].expand(6)


def shorter(mean: Tensor, var: Tensor, room: Tensor) -> None:
    mean.data, var.data = room[:2], room[2:4]


@pytest.mark.parametrize("change", [narrower, spread_out, one_for_all, shorter])
@pytest.mark.parametrize("called_before", [False, True])
def test_no_memory_is_touched_but_that_of_the_running_statistics(change, called_before):
    norm, room = nk.BatchNorm2d(6, affine=False, backend="torch"), torch.zeros(64)
    x = batch()
    if called_before:
        norm(x)
    change(norm.running_mean, norm.running_var, room)
    if change is not spread_out:
        with pytest.raises(RuntimeError):
            norm(x)
        assert not room[:6].any()
        assert not room[12:].any()
        return
    expected = nn.BatchNorm2d(6, affine=False)
    expected.running_mean, expected.running_var = norm.running_mean.clone(), norm.running_var.clone()
    expected(x)
    norm(x)
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert not room[1::2].any()


@pytest.mark.parametrize(
    ("mean", "var"), [(torch.zeros(1), torch.ones(2**22)), (torch.zeros(6), torch.ones(6, device="meta"))]
)
def test_running_statistics_that_do_not_fit_each_other_are_refused(mean, var):
    norm = layer()
    norm.running_mean, norm.running_var = mean, var
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm(batch())


def test_a_counter_of_another_type_is_counted():
    norm, room = layer(), torch.full((4,), 7, dtype=torch.int32)
    norm(batch())
    norm.num_batches_tracked.data = room[0]
    norm(batch())
    assert room.tolist() == [8, 7, 7, 7]


class Failing(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        raise ValueError("no activation today")


@pytest.mark.parametrize("make", [nk.BatchNorm2d, lambda n, **o: nk.GroupNorm(3, n, **o), nk.InstanceNorm2d])
def test_an_error_behind_the_norm_is_told_in_context(make):
    norm = make(6, activation=Failing(), backend="torch")
    with pytest.raises(ValueError, match=r"_norm: no activation today\n  input \(5, 6, 3, 4\)"):
        norm(batch())
    assert not getattr(norm, "num_batches_tracked", None)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_what_runs_out_of_memory_is_not_tried_again(norm, monkeypatch):
    calls = []

    def operator(*arguments: object) -> Tensor:
        calls.append(norm)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch, norm, operator)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory left"):
        (layer() if norm == "batch_norm" else nk.LayerNorm(4, backend="torch"))(batch())
    assert len(calls) == 1


def test_a_mode_sees_the_function_that_it_would_see():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return "seen" if function is nn.functional.batch_norm else function(*args, **(kwargs or {}))

    norm = layer()
    with Mode(), pytest.raises(AttributeError, match="'str'"):  # what stands in its place is no tensor
        norm(batch())


def test_instance_norm_that_stops_tracking_moves_what_it_has_as_torch_does():
    ours, torchs = nk.InstanceNorm2d(6, track_running_stats=True), nn.InstanceNorm2d(6, track_running_stats=True)
    x = batch()
    for norm in (ours, torchs):
        norm.track_running_stats = False
        norm(x)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)


def test_an_activation_that_calls_the_layer_leaves_both_batches_in_it():
    class Twice(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            if not self.busy:
                self.busy = True
                self.norm[0](y.detach() * 2)
            return y

    activation = Twice()
    activation.busy = False
    norm = nk.BatchNorm2d(6, activation=activation, backend="torch")
    activation.norm = [norm]
    norm(batch())
    assert norm.num_batches_tracked == 2


def test_group_norm_traced_as_a_whole_model():
    norm = nk.GroupNorm(2, 6)
    traced = torch.fx.symbolic_trace(norm, concrete_args={"residual": None, "mask": None, "lengths": None})
    x = batch()
    assert torch.equal(traced(x), norm(x))


def test_the_first_forward_of_a_reentrant_checkpoint_takes_the_way_of_the_second():
    """They differ in whether gradients are wanted, which decides only for evaluation."""
    norm, x = nk.BatchNorm2d(32), torch.randn(16, 32, 32, 32)
    with torch.no_grad():
        first = norm(x)
    assert torch.equal(first, norm(x))


def test_a_subclass_that_says_what_is_kept_is_asked():
    class KeepsNothing(nk.BatchNorm2d):
        def kept(self) -> None:
            return None

    norm = KeepsNothing(6, backend="torch")
    norm(batch())
    assert norm.num_batches_tracked == 0
