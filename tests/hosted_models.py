"""Architectures of Hugging Face transformers at tiny sizes, with random weights and statistics that are not trivial."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: `make test-all` installs it")
Inputs = dict[str, Tensor]


def images(size: int = 64) -> Inputs:
    return {"pixel_values": torch.randn(3, 3, size, size) * 1.5 + 0.3}


def sound() -> Inputs:
    return {"input_values": torch.randn(2, 800)}


def words() -> Inputs:
    return {"input_ids": torch.randint(0, 90, (2, 9))}


def config(name: str, **options: object) -> object:
    return getattr(transformers, f"{name}Config")(**options)


def resnet() -> nn.Module:
    settings = config("ResNet", embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], num_labels=5)
    return transformers.ResNetForImageClassification(settings)


def mobilenet() -> nn.Module:
    settings = config("MobileNetV2", image_size=64, depth_multiplier=0.25, num_labels=5, classifier_dropout_prob=0.1)
    return transformers.MobileNetV2ForImageClassification(settings)


def efficientnet() -> nn.Module:
    settings = config(
        "EfficientNet",
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.2,
        hidden_dim=320,
        num_labels=5,
    )
    return transformers.EfficientNetForImageClassification(settings)


def regnet() -> nn.Module:
    settings = config(
        "RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=8, layer_type="y", num_labels=5
    )
    return transformers.RegNetForImageClassification(settings)


def convnext() -> nn.Module:
    settings = config("ConvNext", hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], num_labels=5)
    return transformers.ConvNextForImageClassification(settings)


def vit() -> nn.Module:
    settings = config(
        "ViT",
        image_size=64,
        patch_size=16,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(settings)


def swin() -> nn.Module:
    settings = config(
        "Swin", image_size=64, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return transformers.SwinForImageClassification(settings)


def wav2vec2(feat_extract_norm: str = "group", stable: bool = False) -> nn.Module:
    settings = config(
        "Wav2Vec2",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        conv_dim=[16, 16, 16],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 3],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=feat_extract_norm,
        do_stable_layer_norm=stable,
        vocab_size=11,
    )
    return transformers.Wav2Vec2ForCTC(settings)


def llama(tied: bool = False) -> nn.Module:
    settings = config(
        "Llama",
        vocab_size=96,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(settings)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "resnet": (resnet, images),
    "mobilenet_v2": (mobilenet, images),
    "efficientnet": (efficientnet, images),
    "regnet": (regnet, images),
    "convnext": (convnext, images),
    "vit": (vit, images),
    "swin": (swin, images),
    "wav2vec2": (wav2vec2, sound),
    "wav2vec2-stable": (lambda: wav2vec2("layer", True), sound),
    "llama": (llama, words),
    "llama-tied": (lambda: llama(True), words),
}


def make(name: str) -> tuple[nn.Module, Inputs]:
    """A model in evaluation whose norms have been trained, as far as the numbers can tell; and a batch."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, batch = build().train(), inputs()
    with torch.no_grad():
        for _ in range(3):
            model(**inputs())
        for module in model.modules():
            weight, bias = (getattr(module, part, None) for part in ("weight", "bias"))
            if isinstance(weight, Tensor) and weight.dim() == 1:
                weight.mul_(torch.rand_like(weight) + 0.5)
                if isinstance(bias, Tensor):
                    bias.add_(torch.randn_like(bias) * 0.3)
    return model.eval(), batch
