"""normkit: normalization for neural-network training in PyTorch.

>>> import torch, normkit as nk
>>> bn = nk.BatchNorm2d(64, activation="relu")
>>> y = bn(torch.randn(8, 64, 14, 14), residual=torch.randn(8, 64, 14, 14))
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

import torch as _torch  # first: the compiled kernels share its OpenMP pool

from normkit import functional, laws, statistics
from normkit.advise import advise
from normkit.allocator import tune_allocator
from normkit.create import create, factory, list_norms
from normkit.dispatch import backend
from normkit.explanation import Explanation, explain
from normkit.moments import Moments
from normkit.norms.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from normkit.norms.derf import Derf
from normkit.norms.dyt import DyT
from normkit.norms.evonorm_b0 import EvoNormB0
from normkit.norms.evonorm_s0 import EvoNormS0
from normkit.norms.filter_response_norm import FilterResponseNorm, ThresholdedLinearUnit
from normkit.norms.global_response_norm import GlobalResponseNorm
from normkit.norms.group_norm import GroupNorm
from normkit.norms.identity import Identity
from normkit.norms.instance_norm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normkit.norms.layer_norm import LayerNorm
from normkit.norms.power_norm import PowerNorm
from normkit.norms.rms_norm import RMSNorm
from normkit.norms.switchable_norm import SwitchableNorm
from normkit.statistics.contexts import accumulate_statistics, statistics_frozen
from normkit.statistics.per_domain import domain
from normkit.statistics.policy import plain_state_dict
from normkit.statistics.virtual import reference_batch
from normkit.vocabulary.spec import Spec

if _TYPE_CHECKING:
    from normkit import blocks, lab, measure, strategies
    from normkit.blocks import (
        GRU,
        LSTM,
        RNN,
        SPADE,
        AdaptiveInstanceNorm,
        AdaptiveLayerNorm,
        ConditionalBatchNorm1d,
        ConditionalBatchNorm2d,
        ConditionalInstanceNorm2d,
        ScaledWSConv2d,
        TransformerDecoderLayer,
        TransformerEncoderLayer,
        WSConv1d,
        WSConv2d,
        WSConv3d,
    )
    from normkit.clipping import clip_adaptively_before_steps, clip_grad_adaptive_
    from normkit.diagnosis import Diagnosis, diagnose
    from normkit.surgery import (
        accelerate_,
        calibrate_,
        convert_,
        fold,
        fold_,
        freeze_,
        merge_statistics_,
        param_groups,
        plan,
        progressive_,
        set_statistics_,
        settle_,
        sync_,
        unfreeze_,
        unsync_,
    )
    from normkit.vocabulary.certificate import Certificate
    from normkit.watching import watch

__version__ = "0.1.0.dev0"

__all__ = [  # noqa: RUF022 (plainly sorted, capitals or not)
    "AdaptiveInstanceNorm",
    "AdaptiveLayerNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Certificate",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalInstanceNorm2d",
    "Derf",
    "Diagnosis",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "Explanation",
    "FilterResponseNorm",
    "GRU",
    "GlobalResponseNorm",
    "GroupNorm",
    "Identity",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTM",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "Moments",
    "PowerNorm",
    "RMSNorm",
    "RNN",
    "SPADE",
    "ScaledWSConv2d",
    "Spec",
    "SwitchableNorm",
    "SyncBatchNorm",
    "ThresholdedLinearUnit",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "__version__",
    "accelerate_",
    "accumulate_statistics",
    "advise",
    "backend",
    "blocks",
    "calibrate_",
    "clip_adaptively_before_steps",
    "clip_grad_adaptive_",
    "convert_",
    "create",
    "diagnose",
    "domain",
    "explain",
    "factory",
    "fold",
    "fold_",
    "freeze_",
    "functional",
    "lab",
    "laws",
    "list_norms",
    "measure",
    "merge_statistics_",
    "param_groups",
    "plain_state_dict",
    "plan",
    "progressive_",
    "reference_batch",
    "set_statistics_",
    "settle_",
    "statistics",
    "statistics_frozen",
    "strategies",
    "sync_",
    "tune_allocator",
    "unfreeze_",
    "unsync_",
    "watch",
]

del _torch


_LATER = {
    "blocks": "normkit.blocks",
    "GRU": "normkit.blocks",
    "LSTM": "normkit.blocks",
    "RNN": "normkit.blocks",
    "SPADE": "normkit.blocks",
    "AdaptiveInstanceNorm": "normkit.blocks",
    "AdaptiveLayerNorm": "normkit.blocks",
    "ConditionalBatchNorm1d": "normkit.blocks",
    "ConditionalBatchNorm2d": "normkit.blocks",
    "ConditionalInstanceNorm2d": "normkit.blocks",
    "ScaledWSConv2d": "normkit.blocks",
    "TransformerDecoderLayer": "normkit.blocks",
    "TransformerEncoderLayer": "normkit.blocks",
    "WSConv1d": "normkit.blocks",
    "WSConv2d": "normkit.blocks",
    "WSConv3d": "normkit.blocks",
    "clip_adaptively_before_steps": "normkit.clipping",
    "clip_grad_adaptive_": "normkit.clipping",
    "Diagnosis": "normkit.diagnosis",
    "diagnose": "normkit.diagnosis",
    "lab": "normkit.lab",  # experiments need the extra packages of normkit[lab]
    "measure": "normkit.measure",
    "accelerate_": "normkit.surgery",
    "calibrate_": "normkit.surgery",
    "convert_": "normkit.surgery",
    "fold": "normkit.surgery",
    "fold_": "normkit.surgery",
    "freeze_": "normkit.surgery",
    "merge_statistics_": "normkit.surgery",
    "param_groups": "normkit.surgery",
    "plan": "normkit.surgery",
    "progressive_": "normkit.surgery",
    "set_statistics_": "normkit.surgery",
    "settle_": "normkit.surgery",
    "strategies": "normkit.strategies",
    "sync_": "normkit.surgery",
    "unfreeze_": "normkit.surgery",
    "unsync_": "normkit.surgery",
    "Certificate": "normkit.vocabulary.certificate",
    "watch": "normkit.watching",
}
"""What a model with these layers can do without: loaded on first use, so that importing normkit stays cheap."""


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module 'normkit' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LATER[name])
    found = globals()[name] = module if _LATER[name] == f"normkit.{name}" else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
