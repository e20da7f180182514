"""torch's own tests of its modules, on our classes: its module database, and the checks of its test_modules.py.

Every check runs on torch's class too, which shows that the check is right; what only torch's class does is a deviation
and stands on docs/deviations.md.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normkit as nk
from twins import TWINS, Twin

WIDE = (torch.float32, torch.float64)
ALL = (*WIDE, torch.bfloat16, torch.float16)
OF_TORCH = [twin for twin in TWINS if twin.spec.name != "identity"]  # which is not in the database
each_class = pytest.mark.parametrize("whose", ["ours", "torchs"])
each_twin = pytest.mark.parametrize("twin", OF_TORCH, ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(scope="module")
def database() -> Any:
    """torch's test support; it needs expecttest, and forbids everybody to set backend flags, which is taken back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_modules
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return common_modules


class Entry:
    """One class of the database, and the same entry with our class in it."""

    def __init__(self, database: Any, twin: Twin, whose: str) -> None:
        (info,) = [info for info in database.module_db if info.module_cls is twin.torchs]
        self.module_cls, self.database, self.torchs = getattr(twin, whose), database, info
        self.info = copy.copy(info)
        self.info.module_cls = self.module_cls

    def inputs(self, dtype: torch.dtype, training: bool = True) -> list[Any]:
        """Arguments for the constructor and for forward, as torch's own tests take them."""
        make = self.info.module_inputs_func
        return make(self.torchs, device="cpu", dtype=dtype, requires_grad=False, training=training)

    def modules(self, dtype: torch.dtype, training: bool = True) -> Iterator[tuple[nn.Module, Any, tuple[Tensor, ...]]]:
        """(module, where it comes from, arguments of forward)."""
        for given in self.inputs(dtype, training):
            yield self.build(given, dtype, training), given, given.forward_input.args

    def build(self, given: Any, dtype: torch.dtype, training: bool = True) -> nn.Module:
        arguments = given.constructor_input
        module = self.module_cls(*arguments.args, **arguments.kwargs).to(dtype).train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
        return module


@pytest.fixture
def entry(database, twin, whose) -> Entry:
    return Entry(database, twin, whose)


def test_the_database_has_every_twin(database):
    known = {info.module_cls for info in database.module_db}
    assert {twin.torchs for twin in OF_TORCH} <= known
    assert len(OF_TORCH) >= 9


@each_mode
@each_class
@each_twin
def test_forward(entry, training):
    compared = 0
    for dtype in WIDE:
        for module, given, arguments in entry.modules(dtype, training):
            output = module(*arguments)
            assert (output.dtype, output.shape) == (dtype, arguments[0].shape)
            if given.reference_fn is not None:
                wanted = given.reference_fn(copy.deepcopy(module), *arguments)
                torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)  # torch's own, in its test
                compared += 1
    assert compared or entry.info.name not in ("nn.RMSNorm", "nn.InstanceNorm2d")


@each_mode
@pytest.mark.parametrize("dtype", ALL, ids=str)
@each_twin
def test_forward_is_torchs_bit_for_bit_on_its_operators(database, twin, dtype, training):
    if dtype not in WIDE and issubclass(twin.torchs, nn.modules.batchnorm._NormBase):
        pytest.skip("a deviation: torch rounds the statistics of these to the narrow type; see test_dtypes.py")
    ours, torchs = Entry(database, twin, "ours"), Entry(database, twin, "torchs")
    for given in ours.inputs(dtype, training):
        mine, other = ours.build(given, dtype, training), torchs.build(given, dtype, training)
        with nk.backend("torch"):
            assert mine(*given.forward_input.args).equal(other(*given.forward_input.args))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@each_class
@each_twin
def test_factory_kwargs(entry, twin, dtype):
    for given in entry.inputs(dtype):
        arguments = given.constructor_input
        module = entry.module_cls(*arguments.args, **arguments.kwargs, device="cpu", dtype=dtype)
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device.type == "cpu"
            assert tensor.dtype in (dtype, torch.int64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_class
@each_twin
def test_factory_kwargs_leave_running_statistics_wide(entry, twin, whose, dtype):
    """A deviation, with torch's behaviour beside it."""
    for given in entry.inputs(torch.float32):
        arguments = given.constructor_input
        module = entry.module_cls(*arguments.args, **arguments.kwargs, dtype=dtype)
        assert all(parameter.dtype == dtype for parameter in module.parameters())
        for name, buffer in module.named_buffers():
            wanted = torch.float32 if whose == "ours" else dtype
            assert buffer.dtype == (torch.int64 if name.startswith("num_") else wanted)


@each_class
@each_twin
def test_made_under_a_device_context(entry):
    for given in entry.inputs(torch.float32):
        arguments = given.constructor_input
        with torch.device("meta"):
            module = entry.module_cls(*arguments.args, **arguments.kwargs)
        assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@each_class
@each_twin
def test_repr(entry):
    for module, _, _ in entry.modules(torch.float32):
        assert repr(module).startswith(type(module).__name__)
        assert str(module) == repr(module)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@each_mode
@each_class
@each_twin
def test_copies(entry, how, training):
    for module, _, arguments in entry.modules(torch.float32, training):
        clone = COPIES[how](module)
        assert clone(*arguments).equal(module(*arguments))


@each_mode
@each_class
@each_twin
def test_non_contiguous_tensors(entry, training):
    """Input and upstream gradient with gaps: every output and every gradient as from contiguous ones, to rounding."""
    for module, _, (x,) in entry.modules(torch.float64, training):
        if not x.numel():
            continue
        results = []
        upstream = torch.randn_like(x)
        for spread in (lambda t: t, gaps):
            clone, leaf = copy.deepcopy(module), spread(x).detach().requires_grad_()
            output = clone(leaf)
            found = torch.autograd.grad(output, [leaf, *clone.parameters()], spread(upstream))
            results.append([output, *found, *clone.buffers()])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=x.numel() * torch.finfo(x.dtype).eps * _size(wanted))


def _size(wanted: Tensor) -> float:
    return max(1.0, wanted.abs().max().item())


def gaps(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape, 2), torch.nan)
    wide[..., 1] = x
    return wide[..., 1]


@each_mode
@each_class
@each_twin
def test_grad_and_gradgrad(entry, training):
    """Without the running statistics, as in torch: a second forward would start from others."""
    for module, _, (x,) in entry.modules(torch.float64, training):
        names, values = zip(*module.named_parameters(), strict=True) if [*module.parameters()] else ((), ())
        state = {name: buffer.clone() for name, buffer in module.named_buffers()}

        def run(x, *values, module=module, names=names, state=state):
            fresh = {name: buffer.clone() for name, buffer in state.items()}
            return torch.func.functional_call(module, {**dict(zip(names, values, strict=True)), **fresh}, (x,))

        x = x[:2] if x.shape[0] > 16 else x  # a Jacobian of 150 samples says no more than one of two
        leaves = (x.detach().requires_grad_(), *(value.detach().requires_grad_() for value in values))
        assert gradcheck(run, leaves, fast_mode=True)
        assert gradgradcheck(run, leaves, fast_mode=True)


@each_mode
@each_class
@each_twin
def test_memory_format(entry, twin, whose, training):
    """The numbers do not depend on it, and channels-last in is channels-last out; torch's instance norm does not."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module, _, (x,) in entry.modules(torch.float32, training):
        if x.dim() not in formats or x.dim() != twin.dim + 2 or twin.trailing or not x.numel():
            continue
        layout = formats[x.dim()]
        plain, other = copy.deepcopy(module), copy.deepcopy(module).to(memory_format=layout)
        wanted, got = plain(x), other(x.contiguous(memory_format=layout))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # torch's own tolerance for group norm
        assert plain(x).is_contiguous()
        torchs_instance_norm = whose == "torchs" and isinstance(module, nn.modules.instancenorm._InstanceNorm)
        assert got.is_contiguous(memory_format=layout) != torchs_instance_norm


@each_class
@each_twin
def test_training_and_evaluation_differ_where_torch_says_so(entry):
    differ = []
    for module, _, arguments in entry.modules(torch.float32):
        if arguments[0].numel():
            module(*arguments)
            differ.append(not module.train()(*arguments).equal(module.eval()(*arguments)))
    assert any(differ) == entry.info.train_and_eval_differ


@each_class
@each_twin
def test_errors(entry, database):
    if entry.info.module_error_inputs_func is None:
        assert entry.info.name not in ("nn.BatchNorm2d", "nn.GroupNorm")
        return
    kinds = database.ModuleErrorEnum
    for error in entry.info.module_error_inputs_func(
        entry.torchs, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        given = error.module_error_input
        construct = given.constructor_input
        if error.error_on == kinds.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=re.compile(error.error_regex)):
                entry.module_cls(*construct.args, **construct.kwargs)
        else:
            module = entry.module_cls(*construct.args, **construct.kwargs)
            with pytest.raises(error.error_type, match=re.compile(error.error_regex)):
                module(*given.forward_input.args, **given.forward_input.kwargs)


@each_class
@each_twin
def test_to_and_to_empty(entry):
    for module, _, arguments in entry.modules(torch.float32):
        devices = copy.deepcopy(module).to("meta")
        assert all(tensor.is_meta for tensor in (*devices.parameters(), *devices.buffers()))
        assert devices.eval()(*(x.to("meta") for x in arguments)).is_meta
        devices.train()
        filled = devices.to_empty(device="cpu")
        filled.load_state_dict(module.state_dict())
        torch.testing.assert_close(filled(*arguments), module(*arguments), rtol=0, atol=0)
