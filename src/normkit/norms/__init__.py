"""The menu: one line per norm. A new norm is a file in this folder and a line here."""

from normkit.norms import (
    batch_norm,
    dyt,
    group_norm,
    identity,
    instance_norm,
    layer_norm,
    rms_norm,
)

MENU = (batch_norm, layer_norm, rms_norm, group_norm, instance_norm, dyt, identity)
"""In the order of the tables."""
