"""The laws that every policy of the menu keeps: see ``policies.py`` for what each is by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normkit as nk
from normkit.fusion.rewrite import apply_module
from normkit.kernels import loading
from policies import EPS, MENU, SETTINGS, L1Hand, RangeHand, S, Setting

each_policy = pytest.mark.parametrize("setting", SETTINGS, ids=str)
CHANNELS = 3
IGNORED = {"statistics_state.batches", "statistics_state.mean", "statistics_state.var"}
"""Of :class:`Before`: what the last forward pass found, which is no result."""


def an_input(dim: int = 2, samples: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Off-centre, off-scale, a different scale in every channel, one outlier."""
    x = torch.randn((samples, CHANNELS, *(4, 3, 2)[:dim]), dtype=torch.float64)
    x = x * torch.tensor([0.5, 2.0, 5.0]).double().reshape(1, -1, *[1] * dim) + 3
    if samples:
        x[-1, 1] += 20
    return x.to(dtype)


def a_mask(x: Tensor) -> Tensor:
    """Per element; the first sample is masked as a whole, in every third the last position."""
    mask = torch.rand(x.shape) > 0.3
    mask[1:3] = True
    mask[0] = False
    return mask


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    table = layer._modules.get("statistics_state")
    before = type(table).__name__ in ("Before", "Windows")
    return {name: buffer for name, buffer in state.items() if not (before and name in IGNORED)}


def step(setting: Setting, layer: nn.Module, x: Tensor, upstream: Tensor, **keywords: object) -> dict[str, Tensor]:
    """One training step without an optimizer: output, gradients, buffers."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = setting(layer, x, **keywords)
    y.backward(upstream)
    grads = {f"gradient of {name}": parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"output": y.detach(), "gradient of input": x.grad, **grads, **buffers(layer)}


def assert_close(seen: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert seen.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = 1 + value.double().abs().max().item() if value.numel() else 1
        worst = (seen[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert worst <= tolerance * scale, f"{name}: off by {worst}, of {scale}"


def assert_equal(seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for name, value in wanted.items():
        assert seen[name].dtype == value.dtype, name
        assert seen[name].equal(value), f"{name}: off by {(seen[name] - value).abs().max()}"


def running(setting: Setting, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Where the statistics of the setting's row are, or the layer's."""
    if setting.row is None:
        return layer.running_mean, layer.running_var
    return layer.statistics_state.mean[setting.row], layer.statistics_state.var[setting.row]


def test_the_menu_is_covered_and_no_policy_twice():
    names = [str(setting) for setting in SETTINGS]
    assert sorted(names) == sorted(cls.__name__ for cls in MENU)
    assert len({*names}) == len(names) >= 11


def test_the_page_has_a_row_for_every_policy():
    page = (Path(__file__).parent.parent / "docs" / "statistics.md").read_text()
    rows = re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)
    assert sorted(rows) == sorted(cls.__name__ for cls in MENU)


WAYS = [(way, dim) for way in ("whole", "masked") for dim in (0, 1, 2, 3)] + [("composite", 1)]


@pytest.mark.parametrize(("way", "dim"), WAYS)
@each_policy
def test_it_is_what_it_is_by_hand(setting, way, dim):
    """Four updates and an evaluation: output, all gradients, running statistics.

    ``composite``: in torch's operators under torch's autograd, which compilers and transforms see.
    """
    masked, backend = way == "masked", "reference" if way == "composite" else None
    layer = setting.layer(CHANNELS, dim, backend=backend).double()
    hand = setting.by_hand(CHANNELS, an_input(dim))
    spread = lambda t: t.reshape(1, -1, *[1] * dim)
    for update in range(5):
        layer.train(update < 4), layer.zero_grad()
        x = an_input(dim).requires_grad_()
        keep = a_mask(x) if masked else torch.ones_like(x, dtype=torch.bool)
        keywords = {"mask": keep} if masked else {}
        y = setting(layer, x, **keywords)
        upstream = torch.randn_like(y)
        grads = torch.autograd.grad(y, [x, layer.weight, layer.bias], upstream)

        z = hand.train(x, keep) if update < 4 else hand.evaluate(x, keep)
        wanted = torch.where(keep, z * spread(layer.weight) + spread(layer.bias), 0)
        true = torch.autograd.grad(wanted, [x, layer.weight, layer.bias], upstream)

        names = ["output", "input", "weight", "bias", "mean", "var"]
        seen = dict(zip(names, [y, *grads, *running(setting, layer)], strict=True))
        wanted = dict(zip(names, [wanted, *true, hand.mean, hand.var], strict=True))
        # The constant of Range is an integral, which both sides sum up in their own way.
        assert_close(seen, wanted, 2e-5 if isinstance(setting.policy, S.Range) else 1e-10)
    assert layer.num_batches_tracked.item() == 4


@each_policy
def test_gradients_are_derivatives_where_the_paper_stops_none(setting):
    layer = setting.layer(CHANNELS, 1, activation="silu").double()
    x, residual = an_input(1, samples=3).requires_grad_(), an_input(1, samples=3).requires_grad_()

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with nk.statistics_frozen(layer):
            parameters = {"weight": weight, "bias": bias}
            with setting.around(layer, x):
                reference = setting.reference(x)
                added = residual if reference is None else torch.cat([reference, residual])
                return torch.func.functional_call(layer, parameters, (x,), {"residual": added, **setting.keywords})

    leaves = (x, residual, layer.weight, layer.bias)
    layer.eval() if setting.stops else layer.train()
    assert torch.autograd.gradcheck(function, leaves)
    layer.eval()
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dim", [2, 3])
@each_policy
def test_channels_last_in_is_channels_last_out_with_the_same_numbers(setting, dim):
    layer = setting.layer(CHANNELS, dim).double()
    plain = copy.deepcopy(layer)
    form = torch.channels_last if dim == 2 else torch.channels_last_3d
    for training in (True, True, False):
        layer.train(training), plain.train(training)
        x, upstream = an_input(dim), torch.randn_like(an_input(dim))
        last = x.contiguous(memory_format=form)
        seen = step(setting, layer, last, upstream)
        assert seen["output"].is_contiguous(memory_format=form)
        assert_close(seen, step(setting, plain, x, upstream), 1e-12)


@each_policy
def test_activation_and_residual_are_the_three_steps_by_hand(setting):
    layer = setting.layer(CHANNELS, activation="relu").double()
    plain = copy.deepcopy(layer)
    plain.activation = None
    for training in (True, True, False):
        layer.train(training), plain.train(training)
        x, residual = an_input().requires_grad_(), an_input().requires_grad_()
        seen, upstream = setting(layer, x, residual=residual), torch.randn(x.shape).double()
        wanted = torch.relu(setting(plain, x) + residual)
        own, others = ([x, residual, one.weight, one.bias] for one in (layer, plain))
        pairs = zip(
            [seen, *torch.autograd.grad(seen, own, upstream)],
            [wanted, *torch.autograd.grad(wanted, others, upstream)],
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@each_policy
def test_padding_influences_nothing(setting):
    """The same padding in every sample: masked, it is as if it had been cut out."""
    if isinstance(setting.policy, S.Virtual):
        pytest.skip("a reference of another width is another reference; by hand, above, it has its masks")
    layer = setting.layer(CHANNELS, 1).double()
    short = copy.deepcopy(layer)
    for training in (True, True, True, False):
        layer.train(training), short.train(training)
        x, upstream = an_input(1), torch.randn(7, CHANNELS, 4).double()
        padded = torch.cat([x, torch.full((7, CHANNELS, 2), torch.nan).double()], 2)
        mask = torch.arange(6).expand(7, 6) < 4
        seen = step(setting, layer, padded, torch.cat([upstream, torch.ones(7, CHANNELS, 2)], 2), mask=mask)
        wanted = step(setting, short, x, upstream)
        for name in ("output", "gradient of input"):
            assert not seen[name][..., 4:].any()
            seen[name] = seen[name][..., :4]
        assert_close(seen, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_policy
def test_a_narrow_layer_gives_narrow_output_and_keeps_wide_statistics(setting, dtype):
    layer = setting.layer(CHANNELS, activation="relu")
    narrow = copy.deepcopy(layer).to(dtype)
    layer.load_state_dict(narrow.state_dict())
    for training in (True, True, False):
        layer.train(training), narrow.train(training)
        x, upstream = an_input(dtype=dtype), torch.randn(an_input().shape).to(dtype)
        seen = step(setting, narrow, x, upstream)
        wanted = step(setting, layer, x.float(), upstream.float())
        assert seen["output"].dtype == dtype
        assert all(b.dtype != dtype for b in narrow.buffers())
        # One rounding of the result; a ReLU may open for one and stay shut for the other, where the value is rounding.
        assert_close({"y": seen["output"]}, {"y": wanted["output"]}, 4 * torch.finfo(dtype).eps)
        names = buffers(layer).keys() - {"statistics_state.products"}
        assert_close({n: seen[n] for n in names}, {n: wanted[n] for n in names}, 4 * torch.finfo(dtype).eps)


@each_policy
def test_a_cast_rounds_nothing_that_the_policy_keeps(setting):
    layer = setting.layer(CHANNELS)
    setting(layer, an_input(dtype=torch.float32))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.bfloat16().float()
    assert_equal(dict(layer.named_buffers()), before)


@each_policy
def test_it_runs_under_autocast(setting):
    layer, x = setting.layer(CHANNELS), an_input(dtype=torch.float32)
    plain = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = setting(layer, x.bfloat16())
    wanted = setting(plain, x.bfloat16().float())
    assert_close({"y": y}, {"y": wanted}, 4 * torch.finfo(torch.bfloat16).eps)


@each_policy
def test_a_plain_checkpoint_loads_strictly_and_the_other_way_round(setting):
    torchs = nn.BatchNorm2d(CHANNELS, eps=EPS).double()
    for _ in range(3):
        torchs(an_input() + 2)
    layer, x = setting.layer(CHANNELS).double(), an_input()
    layer.load_state_dict(torchs.state_dict(), strict=True)
    layer.eval(), torchs.eval()
    if setting.plain:
        torch.testing.assert_close(setting(layer, x), torchs(x), rtol=1e-12, atol=1e-12)
    layer.train()
    for _ in range(3):  # the run goes on from there
        assert step(setting, layer, an_input(), torch.randn_like(x))["output"].isfinite().all()
    assert layer.num_batches_tracked.item() == 6
    torchs.load_state_dict(nk.plain_state_dict(layer), strict=True)
    layer.eval()
    if setting.plain and setting.row is None:
        torch.testing.assert_close(setting(layer, x), torchs(x), rtol=1e-12, atol=1e-12)


def through_a_file(layer: nn.Module, setting: Setting) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = setting.layer(CHANNELS, activation="relu")
    other.load_state_dict(torch.load(file))
    return other


COPIES = {
    "deepcopy": lambda layer, setting: copy.deepcopy(layer),
    "pickle": lambda layer, setting: pickle.loads(pickle.dumps(layer)),
    "state_dict": through_a_file,
}


@pytest.mark.parametrize("way", COPIES)
@each_policy
def test_a_copy_in_the_middle_of_training_goes_on_bit_for_bit(setting, way):
    layer = setting.layer(CHANNELS, activation="relu")
    upstream = torch.randn(an_input().shape)
    for _ in range(4):
        step(setting, layer, an_input(dtype=torch.float32), upstream)
    other = COPIES[way](layer, setting)
    for training in (True, True, True, False):
        layer.train(training), other.train(training)
        x = an_input(dtype=torch.float32)
        seen, wanted = step(setting, other, x, upstream), step(setting, layer, x, upstream)
        if way == "state_dict":  # which has no counters that only momentum=None reads
            seen, wanted = ({k: v for k, v in one.items() if "values" not in k} for one in (seen, wanted))
        assert_equal(seen, wanted)


@each_policy
def test_its_repr_makes_it_again_and_stands_in_the_layers(setting):
    assert eval(repr(setting.policy), vars(S)) == setting.policy
    shown = repr(setting.layer(CHANNELS))
    assert (f"statistics={setting.policy!r}" in shown) == (setting.policy != S.Batch())
    assert hash(setting.policy) == hash(copy.deepcopy(setting.policy))


@each_policy
def test_a_lazy_layer_is_the_layer_built_for_that_size(setting):
    x, upstream = an_input(dtype=torch.float32), torch.randn(an_input().shape)
    options = {"eps": EPS, "momentum": 0.3, "statistics": setting.policy}
    lazy = setting.ready(nk.LazyBatchNorm2d(**options))
    sized = setting.ready(nk.BatchNorm2d(CHANNELS, **options))
    with setting.around(lazy, x):  # torch sets the parameters at the first call
        lazy(x, **setting.keywords)
    with setting.around(sized, x):
        sized(x, **setting.keywords)
    assert_equal(step(setting, lazy, x, upstream), step(setting, sized, x, upstream))
    assert lazy.state_dict().keys() == sized.state_dict().keys()


slow_but_for_some = [
    pytest.param(setting, marks=[] if str(setting) in ("MovingAverage", "PerDomain", "Virtual") else pytest.mark.slow)
    for setting in SETTINGS
]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, in dynamo
@pytest.mark.parametrize("checkpointed", [False, True], ids=["alone", "in a checkpoint"])
@pytest.mark.parametrize("setting", slow_but_for_some, ids=str)
def test_it_compiles_as_a_whole_and_gives_the_same(setting, checkpointed):
    """Inside an eager checkpoint, the same compiled code runs outside and inside the backward pass."""
    layer = setting.layer(CHANNELS, activation="relu").double()
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    call = lambda x: compiled(x, **setting.keywords)
    for _ in range(4):
        x, upstream = an_input(), torch.randn_like(an_input())
        wanted = step(setting, layer, x, upstream)
        other.zero_grad()
        x.requires_grad_()
        with setting.around(other, x):
            y = checkpoint(call, x, use_reentrant=False) if checkpointed else call(x)
            y.backward(upstream)
        grads = {f"gradient of {name}": parameter.grad for name, parameter in other.named_parameters()}
        assert_close({"output": y, "gradient of input": x.grad, **grads, **buffers(other)}, wanted, 1e-12)


@each_policy
def test_an_empty_batch_passes_and_moves_nothing(setting):
    layer = setting.layer(CHANNELS)
    step(setting, layer, an_input(dtype=torch.float32), torch.randn(an_input().shape))
    before = buffers(layer)
    x = an_input(samples=0, dtype=torch.float32)
    seen = step(setting, layer, x, torch.empty_like(x))
    assert seen["output"].shape == x.shape
    assert not seen["gradient of weight"].any()
    assert not seen["gradient of bias"].any()
    after = buffers(layer)
    if isinstance(setting.policy, S.Virtual):
        return  # the reference batch is not empty, and enters as ever
    for name in before.keys() - {"num_batches_skipped", "num_batches_tracked"}:  # torch counts it
        assert after[name].equal(before[name]), name


@each_policy
def test_a_batch_with_nan_leaves_everything_it_keeps_as_it_was(setting):
    layer = setting.layer(CHANNELS)
    upstream = torch.randn(an_input().shape)
    for _ in range(3):
        step(setting, layer, an_input(dtype=torch.float32), upstream)
    before = buffers(layer)
    x = an_input(dtype=torch.float32)
    x[2, 1, 0, 0] = torch.nan
    with setting.around(layer, x):
        x.requires_grad_()
        y = layer(x, **setting.keywords)
        y.backward(upstream)
    if isinstance(setting.policy, S.Virtual):
        assert y[:2].isfinite().all()  # samples do not influence each other
        return
    after = buffers(layer)
    for name in before.keys() - {"num_batches_skipped"}:
        assert after[name].equal(before[name]), name
    assert after["num_batches_skipped"] == before["num_batches_skipped"] + 1


@each_policy
def test_nothing_it_keeps_moves_where_the_statistics_are_held(setting):
    layer = setting.layer(CHANNELS)
    upstream = torch.randn(an_input().shape)
    for _ in range(3):
        step(setting, layer, an_input(dtype=torch.float32), upstream)
    before = buffers(layer)
    with nk.statistics_frozen(layer):
        step(setting, layer, an_input(dtype=torch.float32), upstream)
    assert_equal(buffers(layer), before)


@each_policy
def test_at_an_offset_of_ten_thousand_deviations_float32_has_the_digits_it_can_have(setting):
    layer = setting.layer(CHANNELS)
    exact = copy.deepcopy(layer).double()
    if isinstance(setting.policy, S.MovingAverage):
        pytest.skip("it divides by the root mean square, of which the deviation is a ten thousandth")
    for training in (True, True, False):
        layer.train(training), exact.train(training)
        x = torch.randn(32, CHANNELS, 5, 5) + 1e4
        with setting.around(layer, x):
            y = layer(x, **setting.keywords)
        reference = setting.reference(x)
        around = setting.around(exact, x) if reference is None else nk.reference_batch(exact, reference.double())
        with around:
            wanted = exact(x.double(), **setting.keywords)
        # The mean alone is rounded to 1e4 * eps; by the running statistics, values are up to 1e4 deviations.
        scale = wanted.abs().max().item() + 1e4
        slack = 8.0
        if isinstance(setting.policy, S.L1):  # a shift by this rounding moves the mean deviation by its 1/sqrt(n)th
            slack += 1e4 / (32 * 25) ** 0.5
        assert (y - wanted).abs().max().item() <= slack * torch.finfo(torch.float32).eps * scale
    for name in ("running_mean", "running_var"):
        one, other = getattr(layer, name).double(), getattr(exact, name)
        assert ((one - other).abs() / other.abs()).max().item() < 1e-4


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@each_policy
def test_checkpointed_is_bit_for_bit_not_checkpointed(setting, reentrant):
    layer = setting.layer(CHANNELS, activation="relu")
    plain = copy.deepcopy(layer)
    call = lambda layer, x: layer(x, **setting.keywords)
    for _ in range(4):
        x, upstream = an_input(dtype=torch.float32).requires_grad_(), torch.randn(an_input().shape)
        wanted = step(setting, plain, x, upstream)
        layer.zero_grad()
        with setting.around(layer, x):
            y = checkpoint(call, layer, x, use_reentrant=reentrant)
            y.backward(upstream)
        grads = {f"gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
        assert_equal({"output": y.detach(), "gradient of input": x.grad, **grads, **buffers(layer)}, wanted)


@each_policy
def test_explain_moves_nothing_and_asking_for_the_kernels_runs_them_or_says_why_not(setting):
    layer, x = setting.layer(CHANNELS), an_input(dtype=torch.float32)
    before = buffers(layer)
    if not setting.keywords:
        with setting.around(layer, x):
            explained = nk.explain(layer, x)
        assert explained.norm == "batch_norm"
        assert_equal(buffers(layer), before)
    other = copy.deepcopy(layer)
    with nk.backend("torch"):
        wanted = setting(other, x)
    by_operators = isinstance(setting.policy, S.L1 | S.Range | S.Taper | S.Virtual) or loading.module is None
    expected = pytest.raises(RuntimeError, match='backend="native" was asked for')
    with expected if by_operators else contextlib.nullcontext(), nk.backend("native"):
        assert_close({"y": setting(layer, x)}, {"y": wanted}, 1e-5)


@each_policy
def test_it_is_an_option_of_create(setting):
    layer = setting.ready(nk.create("batch", CHANNELS, statistics=setting.policy))
    assert layer.statistics == setting.policy
    assert setting(layer, an_input(dtype=torch.float32)).shape == an_input().shape


@each_policy
def test_a_residual_of_another_shape_is_refused(setting):
    layer, x = setting.layer(CHANNELS), an_input(dtype=torch.float32)
    with pytest.raises(ValueError, match="the residual has the shape"):
        setting(layer, x, residual=torch.zeros(7, CHANNELS, 1, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@each_policy
def test_an_input_that_does_not_fit_is_refused_and_never_broadcast_or_rounded(setting, affine, training):
    layer, x = setting.layer(CHANNELS, affine=affine).train(training), an_input(dtype=torch.float32)
    before = buffers(layer)
    for wrong in (x[:, :1], torch.cat([x, x], 1), x.int(), x.double(), x * 1j):
        with pytest.raises(RuntimeError, match=r"channels|elements|type|not implemented|complex|Complex"):
            setting(layer, wrong)
    with pytest.raises(ValueError, match="expected 4D input"):
        setting(layer, x[:, :, 0])
    assert_equal(buffers(layer), before)


@each_policy
def test_reset_makes_everything_as_new(setting):
    layer = setting.layer(CHANNELS)
    fresh = buffers(copy.deepcopy(layer))
    for _ in range(3):
        step(setting, layer, an_input(dtype=torch.float32), torch.randn(an_input().shape))
    layer.reset_running_stats()
    assert_equal(buffers(layer), fresh)


@each_policy
def test_without_running_statistics_it_works_or_says_why_not(setting):
    options = {"track_running_stats": False, "statistics": setting.policy}
    if not isinstance(setting.policy, S.Batch | S.Ghost | S.L1 | S.Range | S.Synchronized | S.Virtual):
        with pytest.raises(ValueError, match="leave track_running_stats=True"):
            nk.BatchNorm2d(CHANNELS, **options)
        return
    layer = nk.BatchNorm2d(CHANNELS, **options)
    tracking = nk.BatchNorm2d(CHANNELS, statistics=setting.policy)
    x = an_input(dtype=torch.float32)
    torch.testing.assert_close(setting(layer, x), setting(tracking, x))
    torch.testing.assert_close(setting(layer.eval(), x), setting(tracking, x))


@each_policy
def test_momentum_none_is_the_average_over_all_values(setting):
    if isinstance(setting.policy, S.MovingAverage | S.L1 | S.Range | S.Virtual | S.Renorm):
        pytest.skip("what enters is no plain moment of the batch, or its average is no better defined")
    layer = setting.layer(CHANNELS, momentum=None).double()
    batches = [an_input(samples=n) for n in (3, 7, 4)]
    for x in batches:
        setting(layer, x)
    mean, _ = running(setting, layer)
    wanted = torch.cat(batches).mean((0, 2, 3))
    torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=1e-12)


@each_policy
def test_micro_batches_of_one_step_are_one_update(setting):
    """Where the batch's moments enter, they are those of all micro-batches together."""
    layer = setting.layer(CHANNELS).double()
    batches = [an_input(samples=n) for n in (3, 7, 4)]
    with nk.accumulate_statistics(layer):
        for x in batches:
            setting(layer, x)
            assert not layer.num_batches_tracked
    assert layer.num_batches_tracked.item() == 1
    if isinstance(setting.policy, S.MovingAverage | S.L1 | S.Range | S.Virtual):
        return  # what enters is no moment of the batch
    plain = nn.BatchNorm2d(CHANNELS, eps=EPS, momentum=0.3).double()
    plain(torch.cat(batches))
    for seen in ((layer.running_mean, layer.running_var), running(setting, layer)):
        torch.testing.assert_close(seen, (plain.running_mean, plain.running_var), rtol=1e-12, atol=1e-12)


@each_policy
def test_fused_into_a_graph_it_keeps_what_it_keeps(setting):
    """The fused call works on a copy of the layer that lives for one call: nothing may be kept in that."""
    if setting.keywords or isinstance(setting.policy, S.Virtual):
        pytest.skip("the graph would have to pass the step on; the reference enters at the model, not at the layer")
    layer = setting.layer(CHANNELS)
    plain = copy.deepcopy(layer)
    for training in (True, True, True, False):
        layer.train(training), plain.train(training)
        x, residual = an_input(dtype=torch.float32), an_input(dtype=torch.float32)
        with setting.around(layer, x):
            y = apply_module(layer, x, residual, "relu", False)
        assert_close({"y": y}, {"y": torch.relu(setting(plain, x) + residual)}, 1e-6)
        assert_close(buffers(layer), buffers(plain), 1e-6)


# What is particular to one policy.


@pytest.mark.parametrize("hand", [L1Hand, RangeHand], ids=lambda hand: hand.__name__)
def test_the_constant_makes_the_average_variance_of_normal_values_right(hand):
    """Over 20,000 batches: four standard errors of the average."""
    from normkit.statistics import l1
    from normkit.statistics import range as ranges

    for n in (2, 3, 4, 8, 32, 100, 1000):
        x = torch.randn(max(20_000 // n, 400) if n > 32 else 20_000, n).double()
        spread = torch.stack([hand.spread(None, row) for row in x[:4]])
        all_spreads = (x - x.mean(1, keepdim=True)).abs().mean(1) if hand is L1Hand else x.amax(1) - x.amin(1)
        torch.testing.assert_close(all_spreads[:4], spread)
        module = l1 if hand is L1Hand else ranges
        var = all_spreads.square() * module.factor(torch.tensor(float(n), dtype=torch.float64)) * n / (n - 1)
        assert abs(var.mean().item() - 1) < 4 * var.std().item() / len(x) ** 0.5
        known = (1 - 1 / n) / hand.expected_square(n)
        assert module.factor(torch.tensor(float(n), dtype=torch.float64)).item() == pytest.approx(known, rel=2e-5)


def test_the_expected_range_is_what_is_known_of_it():
    from normkit.statistics.range import expected_square, factor

    # Of two and of three, as known; of many, the square of the limit law's mean, 2 a + 2 * 0.5772 / a with its a.
    assert expected_square(torch.tensor(2.0)).item() == pytest.approx(2, rel=1e-6)
    assert expected_square(torch.tensor(3.0)).item() == pytest.approx(2 + 3 * 3**0.5 / torch.pi, rel=1e-5)
    many = torch.tensor([1e3, 1e6, 1e9, 1e12], dtype=torch.float64)
    a = -torch.special.ndtri(1 / many)
    limit = (2 * a + 2 * 0.577216 / a).square()
    assert ((expected_square(many) / limit - 1).abs() < 0.3 / many.log()).all()
    assert (factor(many)[1:] < factor(many)[:-1]).all()


def test_evaluation_agrees_with_training_on_normal_data_whatever_measures_the_spread():
    x = torch.randn(4096, 4).double() * 3 + 1
    for policy in (S.Batch(), S.L1(), S.Range()):
        bn = nk.BatchNorm1d(4, momentum=None, statistics=policy).double()
        for batch in x.split(16):
            bn(batch)
        var = bn.running_var / 9
        assert (var - 1).abs().max() < 0.1, policy


def test_of_two_values_range_and_l1_are_plain_batch_norm():
    x = torch.randn(2, 5).double()
    wanted = nk.BatchNorm1d(5).double()(x)
    for policy in (S.L1(), S.Range()):
        torch.testing.assert_close(nk.BatchNorm1d(5, statistics=policy).double()(x), wanted, rtol=1e-6, atol=1e-6)


def test_a_blend_of_nothing_is_plain_and_of_everything_is_instance_norm():
    x = an_input()
    bn = nk.BatchNorm2d(CHANNELS, statistics=S.Blend(0.0)).double()
    bn(x)
    plain = nn.BatchNorm2d(CHANNELS).double()
    plain.load_state_dict(bn.state_dict())
    torch.testing.assert_close(bn.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
    whole = nk.BatchNorm2d(CHANNELS, statistics=S.Blend(1.0)).double().eval()
    torch.testing.assert_close(whole(x), nn.InstanceNorm2d(CHANNELS)(x), rtol=1e-12, atol=1e-12)


class TestPerStep:
    def test_every_step_has_its_own_and_the_last_serves_all_beyond(self):
        bn = nk.BatchNorm1d(2, momentum=0.5, statistics=S.PerStep(3)).double()
        alone = [nk.BatchNorm1d(2, momentum=0.5).double() for _ in range(3)]
        together = nk.BatchNorm1d(2, momentum=0.5).double()
        for t in range(6):
            x = torch.randn(4, 2).double() * (t + 1) + t
            assert bn(x, step=t).equal(alone[min(t, 2)](x))
            together(x)
        state = bn.statistics_state
        torch.testing.assert_close(state.mean, torch.stack([one.running_mean for one in alone]))
        torch.testing.assert_close(state.var, torch.stack([one.running_var for one in alone]))
        torch.testing.assert_close(bn.running_mean, together.running_mean)
        torch.testing.assert_close(bn.running_var, together.running_var)
        bn.eval(), [one.eval() for one in alone]
        for t in range(5):
            x = torch.randn(4, 2).double()
            torch.testing.assert_close(bn(x, step=t), alone[min(t, 2)](x))

    def test_a_step_that_no_batch_reached_is_served_by_all_together(self):
        bn = nk.BatchNorm1d(2, statistics=S.PerStep(5)).double()
        x = torch.randn(8, 2).double() * 3 + 2
        bn(x, step=0)
        plain = nn.BatchNorm1d(2).double()
        plain(x)
        torch.testing.assert_close(bn.eval()(x, step=3), plain.eval()(x))

    @pytest.mark.parametrize("masked", [False, True], ids=["one row", "one valid row"])
    def test_fewer_than_two_rows_use_the_running_statistics_and_leave_them(self, masked):
        bn = nk.BatchNorm1d(2, statistics=S.PerStep(2)).double()
        bn(torch.randn(8, 2).double() * 3 + 2, step=1)
        before = {name: b.clone() for name, b in bn.named_buffers() if "skipped" not in name}
        x, upstream = torch.randn(3 if masked else 1, 2).double().requires_grad_(), torch.randn(1, 2).double()
        y = bn(x, step=1, **({"mask": torch.tensor([False, True, False])} if masked else {}))
        row = 1 if masked else 0
        state, scale = bn.statistics_state, 1 / (bn.statistics_state.var[1] + bn.eps).sqrt()
        torch.testing.assert_close(y[row], (x[row] - state.mean[1]) * scale)
        y[row].backward(upstream[0])
        torch.testing.assert_close(x.grad[row], upstream[0] * scale)  # constants for the gradient
        for name, value in before.items():
            assert bn.get_buffer(name).equal(value), name

    def test_a_sequence_of_varying_length_is_that_of_its_valid_rows(self):
        bn = nk.BatchNorm1d(2, statistics=S.PerStep(4)).double()
        short = copy.deepcopy(bn)
        x, lengths = torch.randn(5, 4, 2).double(), torch.tensor([4, 3, 3, 2, 1])
        for t in range(4):
            valid = lengths > t
            y = bn(x[:, t], step=t, mask=valid)
            torch.testing.assert_close(y[valid], short(x[valid, t], step=t))
        for name in ("mean", "var", "batches"):
            torch.testing.assert_close(getattr(bn.statistics_state, name), getattr(short.statistics_state, name))

    def test_the_step_is_asked_for_by_those_that_know_steps_alone(self):
        x, bn = torch.randn(4, 2), nk.BatchNorm1d(2, statistics=S.PerStep(3))
        with pytest.raises(ValueError, match="needs to know the time step"):
            bn(x)
        with pytest.raises(ValueError, match="step=-1"):
            bn(x, step=-1)
        with pytest.raises(TypeError, match=r"step=1\.0"):
            bn(x, step=1.0)
        for other in (S.Batch(), S.Ghost(2), S.PerDomain(2)):
            with pytest.raises(ValueError, match="keeps one set for all steps"):
                nk.BatchNorm1d(2, statistics=other)(x, step=0)
        with pytest.raises(ValueError, match="max_length=0"):
            S.PerStep(0)


class TestPerDomain:
    def test_every_domain_is_a_layer_of_its_own_and_all_together_are_the_plain_one(self):
        bn = nk.BatchNorm1d(2, momentum=0.5, statistics=S.PerDomain(2)).double()
        alone = [nk.BatchNorm1d(2, momentum=0.5).double() for _ in range(2)]
        together = nk.BatchNorm1d(2, momentum=0.5).double()
        for index in (0, 1, 1, 0, 1):
            x = torch.randn(4, 2).double() * (index + 1) + 10 * index
            with nk.domain(index):
                assert bn(x).equal(alone[index](x))
            together(x)
        bn.eval()
        for index, one in enumerate(alone):
            with nk.domain(index):
                torch.testing.assert_close(bn(x), one.eval()(x))
        plain = nn.BatchNorm1d(2).double()
        plain.load_state_dict(nk.plain_state_dict(bn))
        torch.testing.assert_close(plain.eval()(x), together.eval()(x))

    def test_the_innermost_context_counts_and_an_error_ends_it(self):
        bn = nk.BatchNorm1d(2, statistics=S.PerDomain(3))
        with nk.domain(0):
            with contextlib.suppress(KeyError), nk.domain(2):
                bn(torch.randn(4, 2))
                raise KeyError
            bn(torch.randn(4, 2))
        assert bn.statistics_state.batches.tolist() == [1, 0, 1]
        with pytest.raises(ValueError, match="nobody said which domain"):
            bn(torch.randn(4, 2))

    def test_bad_domains_are_one_clear_error_each(self):
        bn = nk.BatchNorm1d(2, statistics=S.PerDomain(2))
        for layer in (bn, copy.deepcopy(bn).eval()):
            with pytest.raises(ValueError, match=r"domain 2 of 2(.|\n)*from 0 to 1"), nk.domain(2):
                layer(torch.randn(4, 2))
        with pytest.raises(ValueError, match="the index is -1"), nk.domain(-1):
            pass
        with pytest.raises(TypeError, match="no integer"), nk.domain("real"):
            pass
        with pytest.raises(ValueError, match="num_domains=0"):
            S.PerDomain(0)

    def test_a_checkpoint_takes_the_context_inside_and_says_so_where_it_is_outside(self):
        bn = nk.BatchNorm1d(2, statistics=S.PerDomain(2))
        plain, x, upstream = copy.deepcopy(bn), torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)

        def inside(x: Tensor) -> Tensor:
            with nk.domain(1):
                return bn(x)

        checkpoint(inside, x, use_reentrant=False).backward(upstream)
        with nk.domain(1):
            (wanted,) = torch.autograd.grad(plain(x), x, upstream)
        assert x.grad.equal(wanted)
        assert_equal(buffers(bn), buffers(plain))
        with nk.domain(0):
            y = checkpoint(bn, x, use_reentrant=False)
        with pytest.raises(ValueError, match="inside the function that is checkpointed"):
            y.backward(upstream)


class TestVirtual:
    def net(self) -> nn.Sequential:
        norm = lambda: nk.BatchNorm1d(6, eps=EPS, statistics=S.Virtual(), activation="silu")
        return nn.Sequential(nn.Linear(4, 6), norm(), nn.Linear(6, 6), norm(), nn.Linear(6, 2)).double()

    def by_hand(self, net: nn.Sequential, x_ref: Tensor, x: Tensor) -> Tensor:
        for layer in net:
            if not isinstance(layer, nk.BatchNorm1d):
                x_ref, x = layer(x_ref), layer(x)
                continue
            rows = []
            for row in x:
                both = torch.cat([x_ref, row[None]])
                rows.append((row - both.mean(0)) / (both.var(0, correction=0) + EPS).sqrt())
            x = nn.functional.silu(torch.stack(rows))
            x_ref = nn.functional.silu((x_ref - x_ref.mean(0)) / (x_ref.var(0, correction=0) + EPS).sqrt())
        return x

    @pytest.mark.parametrize("training", [True, False])
    def test_a_network_is_what_it_is_by_hand_with_its_gradients(self, training):
        net = self.net().train(training)
        x_ref, x = torch.randn(5, 4).double().requires_grad_(), torch.randn(3, 4).double().requires_grad_()
        with nk.reference_batch(net, x_ref):
            y = net(x)
        wanted = self.by_hand(net, x_ref, x)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        leaves, upstream = [x, x_ref, *(p for m in net for p in m.parameters() if m is not net)], torch.randn_like(y)
        leaves = [leaf for leaf in leaves if leaf.shape != (6,) or leaf is net[0].bias]
        pairs = zip(
            torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)

    def test_samples_do_not_influence_each_other(self):
        net = self.net()
        x_ref, x = torch.randn(5, 4).double(), torch.randn(3, 4).double()
        with nk.reference_batch(net, x_ref):
            together, alone = net(x), net(x[:1])
        torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)

    def test_everything_that_a_model_returns_is_cut(self):
        class Two(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor, scale: Tensor) -> dict:
                y = self.net(x) * scale
                return {"y": y, "parts": (y[:, :1], [y[:, 1:]]), "name": "two"}

        model, refs = Two(self.net()), (torch.randn(5, 4).double(), torch.randn(5, 1).double())
        with nk.reference_batch(model, refs):
            out = model(torch.randn(3, 4).double(), torch.randn(3, 1).double())
        assert out["y"].shape == (3, 2)
        assert out["parts"][0].shape == out["parts"][1][0].shape == (3, 1)
        assert out["name"] == "two"

    def test_outside_of_the_context_everything_is_as_before(self):
        net, x = self.net(), torch.randn(3, 4).double()
        with pytest.raises(ValueError, match="there is no reference batch"):
            net(x)
        with contextlib.suppress(KeyError), nk.reference_batch(net, torch.randn(5, 4).double()):
            net(x)
            raise KeyError
        assert not net._forward_hooks
        assert not net._forward_pre_hooks
        with pytest.raises(ValueError, match="there is no reference batch"):
            net(x)
        assert net.eval()(x).shape == (3, 2)  # by the running statistics

    def test_bad_references_are_one_clear_error_each(self):
        net, x = self.net(), torch.randn(3, 4).double()
        with pytest.raises(ValueError, match="no layer that would use it"), nk.reference_batch(nn.Linear(2, 2), x):
            pass
        with pytest.raises(ValueError, match="give one sample at least"), nk.reference_batch(net, x[:0]):
            pass
        for wrong in (x.float(), torch.randn(3, 5).double()):
            with pytest.raises(ValueError, match="number of samples alone"), nk.reference_batch(net, wrong):
                net(x)
        with pytest.raises(ValueError, match="1 value per channel"), nk.reference_batch(net, x[:1]):
            net(x)
        summed = nn.Sequential(net, nn.Flatten(0))
        with pytest.raises(ValueError, match="one row per sample"), nk.reference_batch(summed, x):
            summed(x)
        with pytest.raises(ValueError, match="1 references, and the model was given 0"), nk.reference_batch(net, x):
            net(input=x)


class TestMovingAverage:
    def test_unbound_it_refuses_to_train_and_evaluates(self):
        bn = nk.BatchNorm2d(8, statistics=S.MovingAverage())
        with pytest.raises(ValueError, match=r"normkit\.statistics\.bind"):
            bn(torch.randn(2, 8, 3, 3))
        assert bn.eval()(torch.randn(2, 8, 3, 3)).isfinite().all()

    @pytest.mark.parametrize(
        ("make", "shape", "norm"),
        [
            (lambda: nn.Linear(4, 8), (5, 4), nk.BatchNorm1d),
            (lambda: nn.Conv1d(4, 8, 3), (5, 4, 6), nk.BatchNorm1d),
            (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="reflect"), (5, 4, 6, 6), nk.BatchNorm2d),
            (lambda: nn.Conv3d(4, 8, 2, bias=False), (5, 4, 3, 3, 3), nk.BatchNorm3d),
        ],
        ids=["linear", "conv1d", "conv2d", "conv3d"],
    )
    def test_a_bound_layer_computes_with_centred_weights_and_stays_what_it_was(self, make, shape, norm):
        layer, x = make().double(), torch.randn(shape).double()
        plain, bn = copy.deepcopy(layer), norm(8, statistics=S.MovingAverage()).double()
        weight, keys = layer.weight, [*layer.state_dict()]
        S.bind(bn, layer)
        S.bind(bn, layer)  # twice is once
        assert isinstance(layer, type(plain))
        assert layer.weight is weight
        assert [*layer.state_dict()] == keys
        flat = plain.weight.detach().flatten(1)
        centred = (flat - flat.mean(1, keepdim=True)).reshape(weight.shape).requires_grad_()
        wanted = torch.func.functional_call(plain, {"weight": centred}, (x,))
        y, upstream = layer(x), torch.randn_like(wanted)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        (true,) = torch.autograd.grad(wanted, centred, upstream)
        (seen,) = torch.autograd.grad(y, layer.weight, upstream)
        true = true.flatten(1) - true.flatten(1).mean(1, keepdim=True)
        torch.testing.assert_close(seen.flatten(1), true, rtol=1e-10, atol=1e-10)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other(x).equal(y)

    def test_a_plain_network_with_the_plain_state_computes_the_same(self):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nk.BatchNorm2d(8, momentum=0.02, statistics=S.MovingAverage(window=2))
        )
        S.bind(net[1], net[0])
        for _ in range(4):
            net(torch.randn(2, 3, 6, 6) + 1)
        plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        plain.load_state_dict(nk.plain_state_dict(net), strict=True)
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(net.eval()(x), plain.eval()(x))
        assert net.state_dict()["0.weight"].equal(net[0].weight)  # our own checkpoint has them as they are

    def test_r_corrects_within_its_bounds_after_a_thousand_updates(self):
        bn = nk.BatchNorm1d(1, eps=0.0001, affine=False, statistics=S.MovingAverage(window=1, r_max=2.0)).double()
        S.bind(bn, nn.Linear(3, 1))
        x = torch.tensor([[1.0], [-1.0]]).double() * 10
        for updates, factor in ((0, 1.0), (1000, 2.0)):  # by the running variance it would be 10 times
            bn.reset_running_stats()
            bn.num_batches_tracked.fill_(updates)
            torch.testing.assert_close(bn(x), x / 100.0001**0.5 * factor, rtol=1e-6, atol=0)
        bn.running_var.fill_(64.0)
        torch.testing.assert_close(bn(x), x / 64.0001**0.5, rtol=1e-6, atol=0)

    def test_one_value_per_channel_is_enough(self):
        bn = nk.BatchNorm1d(4, affine=False, statistics=S.MovingAverage())
        S.bind(bn, nn.Linear(3, 4))
        x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
        torch.testing.assert_close(bn(x), x.sign(), rtol=1e-4, atol=0)
        torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * x[0].square())

    def test_gradients_that_are_not_finite_stay_out_of_the_window(self):
        setting = next(s for s in SETTINGS if isinstance(s.policy, S.MovingAverage))
        layer, x = setting.layer(CHANNELS), an_input(dtype=torch.float32)
        step(setting, layer, x, torch.randn_like(x))
        before = layer.statistics_state.products.clone()
        step(setting, layer, x, torch.full_like(x, torch.inf))
        assert layer.statistics_state.products.equal(before)

    def test_its_gradient_has_no_derivative(self):
        bn = nk.BatchNorm1d(4, statistics=S.MovingAverage())
        S.bind(bn, nn.Linear(3, 4))
        x = torch.randn(4, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match="no derivative"):
            torch.autograd.grad(bn(x).square().sum(), x, create_graph=True)

    def test_what_cannot_be_bound_is_one_clear_error_each(self):
        bn = nk.BatchNorm2d(8, statistics=S.MovingAverage())
        with pytest.raises(TypeError, match="no other policy needs"):
            S.bind(nk.BatchNorm2d(8), nn.Conv2d(3, 8, 3))
        with pytest.raises(TypeError, match="no layer whose weights can be centred"):
            S.bind(bn, nn.ConvTranspose2d(3, 8, 3))
        with pytest.raises(ValueError, match="4 outputs, and the norm 8 channels"):
            S.bind(bn, nn.Conv2d(3, 4, 3))
        for wrong in ({"window": 0}, {"r_max": 0.5}, {"warmup": -1}):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
                S.MovingAverage(**wrong)


def test_more_bad_input_is_one_clear_error_each():
    x = torch.randn(4, 2)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha="):
            S.Blend(wrong)
    with pytest.raises(ValueError, match="parts of one value per channel"):
        nk.BatchNorm1d(2, statistics=S.Ghost(1))(x)
    with pytest.raises(ValueError, match="size=0"):
        S.Ghost(0)
    for policy in (S.Batch(), S.L1(), S.Range()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            nk.BatchNorm1d(2, statistics=policy)(x[:1])
    with pytest.raises(ValueError, match=r"r_max=0\.5"):
        S.Renorm(r_max=0.5)
    with pytest.raises(ValueError, match="on_single='other'"):
        S.Batch(on_single="other")
    with pytest.raises(TypeError, match="no policy"):
        nk.BatchNorm1d(2, statistics=32)


def test_one_value_per_channel_is_what_the_caller_said():
    x = torch.full((1, 2), 5.0)
    running, skip = (nk.BatchNorm1d(2, statistics=S.Batch(on_single=word)) for word in ("running", "skip"))
    for bn in (running, skip):
        bn(torch.randn(8, 2))
    before = [buffers(bn) for bn in (running, skip)]
    plain = copy.deepcopy(running).eval()
    torch.testing.assert_close(running(x), plain(x))
    assert skip(x, residual=x).equal(x + x)
    for bn, was in zip((running, skip), before, strict=True):
        assert_equal(buffers(bn), was)
