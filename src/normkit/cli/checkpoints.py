"""Checkpoints: read without running any code in them, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normkit.cli.errors import UserError, require

READ = (".safetensors", ".pt", ".pth", ".bin")
WRITTEN = (".safetensors", ".pt", ".pth")
_INSIDE = ("state_dict", "model", "model_state_dict", "module")
"""Under which of its keys a training checkpoint has the weights."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_FEW = 5


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The ``state_dict`` in a file, and what else is in it by name."""
    if path.suffix not in READ:
        raise UserError(f"--checkpoint {path}: a checkpoint ends in {', '.join(READ)}")
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: there is no such file")
    if path.suffix == ".safetensors":
        require("safetensors")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), []
        except (SafetensorError, OSError) as error:
            raise UserError(f"--checkpoint {path}: cannot be read as safetensors: {error}") from error
    return _weights(path, _unpickled(path))


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--checkpoint {path}: holds more than tensors and plain data, and reading that could run any code.\n"
            "  load it where you trust it, and save model.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"--checkpoint {path}: cannot be read: {str(error).splitlines()[0]}") from error


def _weights(path: Path, content: Any) -> tuple[dict[str, Any], list[str]]:
    aside: list[str] = []
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inside = next((key for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        if inside is not None:
            aside = [str(key) for key in content if key != inside]
            content = content[inside]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"--checkpoint {path}: holds no state_dict, nor one under {', '.join(map(repr, _INSIDE))}.\n"
            "  save model.state_dict()"
        )
    state = {str(name): value for name, value in content.items()}
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state, aside


def fill(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load a ``state_dict``, all of it, in the types that the checkpoint has."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        there = state.get(name)
        if isinstance(there, Tensor) and there.dtype != tensor.dtype and tensor.is_floating_point():
            tensor.data = tensor.data.to(there.dtype)  # the same object, so that what is tied stays tied
    try:
        missing, unexpected = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError("\n  ".join([f"--checkpoint {path}: does not fit the model.", *lines[:_FEW]])) from error
    if missing or unexpected:
        rows = [f"{word}: {_few(names)}" for word, names in (("missing", missing), ("unknown", unexpected)) if names]
        raise UserError("\n  ".join([f"--checkpoint {path}: has not the keys of the model.", *rows]))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def may_write(path: Path, force: bool) -> None:
    """Before any work: whether the result will find its place.

    Raises:
        UserError: it will not.
    """
    if path.suffix not in WRITTEN:
        raise UserError(f"-o {path}: the result ends in {', '.join(WRITTEN)}")
    if path.suffix == ".safetensors":
        require("safetensors")
    if not path.parent.is_dir():
        raise UserError(f"-o {path}: there is no directory {path.parent}")
    for file in (path, beside(path)):
        if file.exists() and not force:
            raise UserError(f"-o {path}: {file} exists already; --force overwrites it, or name another")


def beside(path: Path) -> Path:
    """Where the certificate of a result goes."""
    return path.with_suffix(".certificate.json")


def write(path: Path, state: Mapping[str, Any], certificate: Mapping[str, Any]) -> None:
    """Write weights and certificate; a file that is there is whole, or is the one of before."""
    text = json.dumps(certificate, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with _replacing(path) as save, _replacing(beside(path)) as note:
        save(lambda place: _save(place, path, state))
        note(lambda place: place.write_text(text))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Callable[[Callable[[Path], object]], object]]:
    place = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield lambda fill: fill(place)
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def _save(place: Path, path: Path, state: Mapping[str, Any]) -> None:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if path.suffix != ".safetensors":
        torch.save({**state, **{name: tensor.detach().cpu() for name, tensor in tensors.items()}}, place)
        return
    if others := [name for name in state if name not in tensors]:
        raise UserError(f"-o {path}: {_few(others)} is no tensor, and safetensors holds nothing else; give a .pt")
    from safetensors.torch import save_file

    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(separate, place, metadata={"format": "pt"})
