"""Every operation on architectures that others wrote: Hugging Face transformers, tiny, with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="transformers is not installed: `make test-all` installs it")

import normkit as nk
from hosted_models import MODELS, make
from normkit.norm import Norm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("default::FutureWarning"),
]
each_model = pytest.mark.parametrize("name", MODELS)
BATCH_NORMS = ("resnet", "mobilenet_v2", "efficientnet", "regnet")
FOLDED = {
    "resnet": 12,
    "mobilenet_v2": 52,
    "efficientnet": 22,
    "regnet": 12,
    "convnext": 9,
    "vit": 5,
    "swin": 10,
    "wav2vec2": 2,
    "wav2vec2-stable": 6,
    "llama": 5,
    "llama-tied": 4,
}
LEFT = {
    "convnext": {"convnext.embeddings.layernorm": "pads with zeros"},
    "swin": {"swin.embeddings.norm": "layer_norm in swin.encoder.layers.0.blocks.0.layernorm_before reads"},
    "wav2vec2": {
        "wav2vec2.feature_extractor.conv_layers.0.layer_norm": "gelu in ",
        "wav2vec2.encoder.layer_norm": "add in ",
        "wav2vec2.encoder.layers.0.layer_norm": "add in ",
        "wav2vec2.encoder.layers.0.final_layer_norm": "add in ",
        "wav2vec2.encoder.layers.1.layer_norm": "add in ",
    },
    "wav2vec2-stable": {f"wav2vec2.feature_extractor.conv_layers.{i}.layer_norm": "gelu in " for i in range(3)},
    "llama-tied": {"model.norm": "lm_head.weight is also used by embedding in model.embed_tokens"},
}
"""All that is not folded, and why: an activation, a residual, zeros or a tied weight stand in the way."""


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(**batch)) if isinstance(leaf, Tensor)]


def assert_near(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max()


def norms(model: nn.Module) -> set[str]:
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__.endswith("RMSNorm")
    }


@each_model
def test_fold_takes_in_all_that_can_be_and_says_why_not_of_the_rest(name):
    model, batch = make(name)
    before, wanted = norms(model), outputs(model, batch)
    folded = nk.fold(model, batch)
    assert_near(outputs(folded, batch), wanted, 1e-4)
    certificate = folded.certificate
    assert len(certificate.changed) == FOLDED[name]
    reasons = {row.module: row.reason for row in certificate.refused}
    assert reasons.keys() == LEFT.get(name, {}).keys()
    assert all(words in reasons[module] for module, words in LEFT.get(name, {}).items())
    assert {row.module for row in (*certificate.changed, *certificate.refused)} == before
    assert all(row.error < 1e-4 for row in certificate.agreement)
    if name in BATCH_NORMS:
        assert norms(folded) == set()
    assert_near(outputs(model, batch), wanted, 0)


@each_model
def test_a_folded_model_can_be_exported(name):
    model, batch = make(name)
    folded = nk.fold(model, batch)
    program = torch.export.export(folded, (), batch, strict=False)
    assert_near(outputs(program.module(), batch), outputs(model, batch), 1e-4)
    if name in BATCH_NORMS:
        assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


def converted(model: nn.Module, batch: dict[str, Tensor], name: str) -> nk.Certificate:
    to = "group:auto" if name in BATCH_NORMS else "dyt" if name.startswith("llama") else "rms"
    return nk.convert_(model, to=to, match=batch if name in BATCH_NORMS else None)


OPERATIONS = {
    "accelerate_": lambda model, batch, name: nk.accelerate_(model, example_inputs=batch),
    "calibrate_": lambda model, batch, name: nk.calibrate_(model, [batch] * 2),
    "convert_": converted,
    "freeze_": lambda model, batch, name: nk.freeze_(model, example_inputs=batch),
    "sync_": lambda model, batch, name: nk.sync_(model, example_inputs=batch),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@each_model
def test_taking_back_restores_the_model_bit_for_bit(name, operation):
    model, batch = make(name)
    wanted, classes = outputs(model, batch), [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    certificate = OPERATIONS[operation](model, batch, name)
    concerned = norms(model) if operation == "convert_" else set()
    told = {row.module for rows in (certificate.changed, certificate.skipped, certificate.refused) for row in rows}
    assert concerned <= told
    if certificate.changed:
        assert any(isinstance(module, Norm) for module in model.modules()) or operation == "calibrate_"
        certificate.undo()
    assert [type(module) for module in model.modules()] == classes
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_near(outputs(model, batch), wanted, 0)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_unsync_restores_the_model_bit_for_bit(name):
    model, _ = make(name)
    state, classes = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    assert nk.sync_(model).changed
    nk.unsync_(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
