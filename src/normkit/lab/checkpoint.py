"""Checkpoint: what a killed run needs to go on as if nothing had happened. Tensors and plain types only."""

from __future__ import annotations

import io
import logging
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normkit.vocabulary.record import write_atomically

log = logging.getLogger(__name__)
NAME = "checkpoint.pt"


def save(directory: Path, content: dict[str, Any]) -> None:
    """Replaces DIR/checkpoint.pt in one step."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(directory / NAME, buffer.getvalue())


def load(directory: Path) -> dict[str, Any] | None:
    """The content of DIR/checkpoint.pt, or None when there is none that can be read: then the run starts again."""
    path = directory / NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # whatever torch raises for a damaged file: a fresh start is always right
        log.warning("%s cannot be read (%s); the run starts from the beginning", path, error)
        return None


def remove(directory: Path) -> None:
    """Deletes the checkpoint of a run that has ended, and what a kill in the middle of a save left."""
    for path in (directory / NAME, *directory.glob(f".{NAME}.*.tmp")):
        path.unlink(missing_ok=True)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers, the non-persistent ones too: `state_dict` alone would forget those."""
    return {"state": model.state_dict(), "buffers": dict(model.named_buffers())}


@torch.no_grad()
def restore_model(model: nn.Module, saved: dict[str, Any]) -> None:
    """The inverse of `model_state`."""
    model.load_state_dict(saved["state"])
    for name, buffer in model.named_buffers():
        if name in saved["buffers"]:
            buffer.copy_(saved["buffers"][name])


def random_state() -> dict[str, Any]:
    """State of the global generators of torch, Python and (when something imported it) numpy."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def restore_random(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((kind, keys, *rest))
