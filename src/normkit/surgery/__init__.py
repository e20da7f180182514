"""Changes to a model that already exists: plan first, commit second, verify, certify."""

from normkit.surgery.accelerate import accelerate_
from normkit.surgery.calibrate import calibrate_
from normkit.surgery.convert import convert_
from normkit.surgery.folding.fold import fold
from normkit.surgery.folding.fold_in import fold_
from normkit.surgery.freeze import freeze_, unfreeze_
from normkit.surgery.merge import merge_statistics_
from normkit.surgery.operate import Plan, Step, operate, plan
from normkit.surgery.param_groups import param_groups
from normkit.surgery.progressive import progressive_, settle_
from normkit.surgery.set_statistics import set_statistics_
from normkit.surgery.synchronize import sync_, unsync_

__all__ = [
    "Plan",
    "Step",
    "accelerate_",
    "calibrate_",
    "convert_",
    "fold",
    "fold_",
    "freeze_",
    "merge_statistics_",
    "operate",
    "param_groups",
    "plan",
    "progressive_",
    "set_statistics_",
    "settle_",
    "sync_",
    "unfreeze_",
    "unsync_",
]
