"""Whether a call of ``optimizer.step()`` is a step: what everything that listens to an optimizer asks."""

from __future__ import annotations

from typing import Any


def takes_its_step(optimizer: Any) -> bool:
    """False: ``torch.amp.GradScaler`` found gradients that are not finite, and the call changes nothing.

    With other optimizers the scaler does not call at all. One with ``fused=True`` is called and decides on its device;
    its hooks see what it was told, and looking at that waits for the device, as the scaler does for the others.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is None or not bool(found)
