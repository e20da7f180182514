"""The functions of the norms, as torch.nn.functional has them."""

from normkit.norms.batch_norm import batch_norm
from normkit.norms.derf import derf
from normkit.norms.dyt import dyt
from normkit.norms.evonorm_b0 import evonorm_b0
from normkit.norms.evonorm_s0 import evonorm_s0
from normkit.norms.filter_response_norm import filter_response_norm
from normkit.norms.global_response_norm import global_response_norm
from normkit.norms.group_norm import group_norm
from normkit.norms.identity import identity
from normkit.norms.instance_norm import instance_norm
from normkit.norms.layer_norm import layer_norm
from normkit.norms.power_norm import power_norm
from normkit.norms.rms_norm import rms_norm
from normkit.norms.switchable_norm import switchable_norm

__all__ = [
    "batch_norm",
    "derf",
    "dyt",
    "evonorm_b0",
    "evonorm_s0",
    "filter_response_norm",
    "global_response_norm",
    "group_norm",
    "identity",
    "instance_norm",
    "layer_norm",
    "power_norm",
    "rms_norm",
    "switchable_norm",
]
