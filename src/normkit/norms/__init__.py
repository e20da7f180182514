"""The menu: one line per norm. A new norm is a file in this folder and a line here."""

from normkit.norms import (
    batch_norm,
    derf,
    dyt,
    evonorm_b0,
    evonorm_s0,
    filter_response_norm,
    global_response_norm,
    group_norm,
    identity,
    instance_norm,
    layer_norm,
    power_norm,
    rms_norm,
    switchable_norm,
)

MENU = (
    batch_norm,
    layer_norm,
    rms_norm,
    group_norm,
    instance_norm,
    switchable_norm,
    power_norm,
    filter_response_norm,
    evonorm_b0,
    evonorm_s0,
    global_response_norm,
    dyt,
    derf,
    identity,
)
"""In the order of the tables."""
