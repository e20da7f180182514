"""Rules of diagnosis: one file each, pure functions from readings to findings. This is the menu.

The order is that in which equally severe findings are told: causes before their symptoms.
"""

from __future__ import annotations

from importlib import import_module

from normkit.rules.rule import Rule

MENU = (
    "first_nan",
    "non_finite_parameters",
    "non_finite_gradients",
    "non_finite_statistics",
    "activation_lost",
    "channels_on_wrong_axis",
    "groups_of_one",
    "few_values_per_channel",
    "optimizer_misses_parameters",
    "frozen_but_training",
    "exported_in_training",
    "momentum_reversed",
    "half_precision_statistics",
    "imprecise_arithmetic",
    "statistics_hold_their_start",
    "synchronization_cannot_work",
    "ranks_differ",
    "forward_twice_before_backward",
    "accumulation_splits_batches",
    "statistics_move_twice",
    "padding_in_statistics",
    "shared_norm",
    "dropout_before_norm",
    "no_running_statistics",
    "norm_after_activation",
    "dead_activations",
    "saturated_activations",
    "attention_logits",
    "signal_lost_with_depth",
    "gradients_explode",
    "constant_channels",
    "pruned_channels",
    "stale_statistics",
    "train_eval_gap",
    "update_size",
    "loss_spikes",
    "norm_parameters_decay",
    "bias_before_norm",
    "residual_branches_start_open",
    "unfolded_norms",
)

RULES: dict[str, Rule] = {name: import_module(f"normkit.rules.{name}").RULE for name in MENU}
"""By name."""
