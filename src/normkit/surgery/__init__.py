"""Changes to a model that already exists: plan first, commit second, verify, certify."""

from normkit.surgery.accelerate import accelerate_
from normkit.surgery.freeze import freeze_, unfreeze_
from normkit.surgery.operate import Plan, Step, operate

__all__ = ["Plan", "Step", "accelerate_", "freeze_", "operate", "unfreeze_"]
