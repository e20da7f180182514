"""Composed modules around norms, and in their place: standardised weights, residual blocks without normalization."""

from normkit.blocks.adaptive import AdaptiveInstanceNorm, AdaptiveLayerNorm
from normkit.blocks.conditional import ConditionalBatchNorm1d, ConditionalBatchNorm2d, ConditionalInstanceNorm2d
from normkit.blocks.dcgan import Discriminator, Generator, judge
from normkit.blocks.fixup import FixupResidual, fixup_
from normkit.blocks.gain import activation_gain
from normkit.blocks.recurrent import GRU, LSTM, RNN
from normkit.blocks.rep_batch_norm import ProgressiveRepBatchNorm, RepBatchNorm, settle_
from normkit.blocks.residual import LayerScale, NormalizerFreeResidual, ReZero, Scale, SkipInit, expected_deviations
from normkit.blocks.spade import SPADE
from normkit.blocks.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from normkit.blocks.weight_standardized import (
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSLinear,
    WSConv1d,
    WSConv2d,
    WSConv3d,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SPADE",
    "AdaptiveInstanceNorm",
    "AdaptiveLayerNorm",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "Discriminator",
    "FixupResidual",
    "Generator",
    "LayerScale",
    "NormalizerFreeResidual",
    "ProgressiveRepBatchNorm",
    "ReZero",
    "RepBatchNorm",
    "Scale",
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "ScaledWSLinear",
    "SkipInit",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "activation_gain",
    "expected_deviations",
    "fixup_",
    "judge",
    "settle_",
]
