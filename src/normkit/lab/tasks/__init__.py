"""The menu of built-in tasks: one line each; a task is a function that returns an `Experiment`."""

from __future__ import annotations

TASKS = {
    "digits": "normkit.lab.tasks.digits:digits",
    "digits-relu": "normkit.lab.tasks.digits:digits_relu",
    "digits-cnn": "normkit.lab.tasks.digits_cnn:digits_cnn",
    "digits-sequence": "normkit.lab.tasks.digits_sequence:digits_sequence",
    "text": "normkit.lab.tasks.text:text",
    "digits-vit": "normkit.lab.tasks.digits_vit:digits_vit",
    "tabular": "normkit.lab.tasks.tabular:tabular",
    "digits-deep": "normkit.lab.tasks.digits_deep:digits_deep",
    "variants": "normkit.lab.tasks.variants:variants",
    "data-size": "normkit.lab.tasks.data_size:data_size",
    "gan": "normkit.lab.tasks.gan:gan",
}
DEFAULT = "digits"
