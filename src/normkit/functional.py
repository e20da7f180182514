"""The functions of the norms, as torch.nn.functional has them."""

from normkit.norms.batch_norm import batch_norm
from normkit.norms.dyt import dyt
from normkit.norms.group_norm import group_norm
from normkit.norms.identity import identity
from normkit.norms.instance_norm import instance_norm
from normkit.norms.layer_norm import layer_norm
from normkit.norms.rms_norm import rms_norm

__all__ = ["batch_norm", "dyt", "group_norm", "identity", "instance_norm", "layer_norm", "rms_norm"]
