"""An exported program is torch's operators and nothing else: it runs where normkit is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import normkit as nk
from cases import CASES, FORMS, Form
from twins import assert_same, off_scale

ORDINARY = CASES[0]
PLANAR = [form for form in FORMS if form.dim == 2]
MAIN = [form for form in PLANAR if form.label in ("", "-channels_first")]
TORCHS = ("aten.", "<built-in function ")
"""Operators, and arithmetic of sizes."""
SAMPLES = (ORDINARY.samples, ORDINARY.samples + 3)


class Block(nn.Module):
    """A product, then the norm with every option that it has."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        x = ORDINARY.input(form, torch.float32)
        self.product = nn.Linear(x.shape[-1], x.shape[-1])
        self.norm = form.layer(ORDINARY, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.product(x), residual=x)


def exported(form: Form, training: bool, **options: object) -> tuple[Block, torch.export.ExportedProgram]:
    block = Block(form).train(training)
    dynamic = ({0: torch.export.Dim("n", min=2, max=64)},)
    return block, torch.export.export(block, (ORDINARY.input(form, torch.float32),), dynamic_shapes=dynamic, **options)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """What computes; not ``promote_types``, a constant that export leaves where it is not strict."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return {str(node.target) for node in calls if not str(node.target).startswith("aten.promote_types")}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", PLANAR, ids=str)
def test_a_program_is_made_of_torchs_operators(form, training):
    """Whatever backend eager calls would take."""
    block, program = exported(form, training)
    assert "aten.linear.default" in operators(program)
    assert all(name.startswith(TORCHS) for name in operators(program))
    assert {*program.state_dict} == {*block.state_dict()}


AROUND = {"wrap_with_set_grad_enabled", "<built-in function getitem>"}
"""What strict export puts around operators that no gradient passes."""


@pytest.mark.slow
@pytest.mark.parametrize("form", PLANAR, ids=str)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, as the next
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_strict_export_and_decompositions_agree(form):
    for training in (True, False):
        _, program = exported(form, training)
        strict = operators(exported(form, training, strict=True)[1])
        assert strict - AROUND == operators(program) - AROUND
        decomposed = operators(program.run_decompositions())
        assert all(name.startswith(TORCHS) for name in decomposed)


STRANGER = """
import sys, torch
sys.modules["normkit"] = None
try:
    import normkit
except ImportError:
    pass
else:
    raise AssertionError("normkit can be imported")
torch.set_num_threads(1)
folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    module = torch.export.load(f"{folder}/{name}.pt2").module()
    inputs = torch.load(f"{folder}/{name}.inputs", weights_only=True)
    outputs = [module(x).detach() for x in inputs]
    torch.save({"outputs": outputs, "state": dict(module.named_buffers())}, f"{folder}/{name}.outputs")
assert not any(name.startswith("normkit.") for name in sys.modules)
"""


@pytest.mark.slow
def test_saved_programs_run_where_normkit_is_not_installed(tmp_path):
    blocks = {}
    for form in MAIN:
        modes = (True, False) if [*form.layer(ORDINARY).buffers()] else (False,)
        for training in modes:
            name = f"{form}-{training}"
            blocks[name], program = exported(form, training)
            torch.export.save(program, tmp_path / f"{name}.pt2")
            inputs = [torch.cat([ORDINARY.input(form, torch.float32)] * 2)[:n] for n in SAMPLES]
            torch.save(inputs, tmp_path / f"{name}.inputs")
    assert len(blocks) >= 2 + len(MAIN)
    subprocess.run([sys.executable, "-c", STRANGER, str(tmp_path), *blocks], check=True)
    for name, block in blocks.items():
        inputs = torch.load(tmp_path / f"{name}.inputs", weights_only=True)
        seen = torch.load(tmp_path / f"{name}.outputs", weights_only=True)
        for x, got in zip(inputs, seen["outputs"], strict=True):
            with nk.backend("torch"):
                assert_same({name: got}, {name: block(x).detach()})
        if block.training and getattr(block.norm, "track_running_stats", False):
            assert not block.norm.running_mean.equal(torch.zeros_like(block.norm.running_mean))
        wanted = {key: value for key, value in block.state_dict().items() if key in seen["state"]}
        assert_same({key: seen["state"][key] for key in wanted}, wanted)
        assert len(wanted) == sum(key not in dict(block.named_parameters()) for key in block.state_dict())


def test_functional_forms_export_too():
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nk.functional.group_norm(x, 3, activation="relu")
            x = nk.functional.layer_norm(x, (6,), channels_first=True, residual=x)
            return nk.functional.batch_norm(x, None, None, training=True)

    x = off_scale((5, 6, 4), 1)
    program = torch.export.export(Functional(), (x,))
    assert all(name.startswith("aten.") for name in operators(program))
    with nk.backend("torch"):
        assert program.module()(x).equal(Functional()(x))
