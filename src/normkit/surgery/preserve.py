"""What an operation leaves as it was: names, objects, modes, types, trainability, the keys of the state_dict."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from normkit.vocabulary.certificate import Keys


@dataclass(frozen=True)
class Snapshot:
    """The parts of a model that other code holds on to: an optimizer, a checkpoint, a hook, a second name."""

    facts: dict[str, Any]
    """Sentence -> value."""
    keys: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls(dict(_facts(model)), tuple(model.state_dict()))

    def losses(self, model: nn.Module, meant: Collection[str] = ()) -> list[str]:
        """A sentence for everything that is not as it was and was not meant to change; what is new is no loss."""
        now = Snapshot.of(model)
        lost = [
            f"{what} is not what it was"
            for what, value in self.facts.items()
            if what not in meant and now.facts.get(what) != value
        ]
        before, after = ([name for name in keys if key(name) not in meant] for keys in (self.keys, now.keys))
        return lost if before == after else [*lost, "the keys of the state_dict have changed"]

    def moved_keys(self, model: nn.Module) -> Keys:
        """Which keys the ``state_dict`` has no longer, and which it has now."""
        now = tuple(model.state_dict())
        gone, come = set(self.keys) - set(now), set(now) - set(self.keys)
        return Keys(tuple(k for k in self.keys if k in gone), tuple(k for k in now if k in come))


def of_module(name: str) -> tuple[str, str, str]:
    """The facts that a module is the object it is, in its mode, with its hooks."""
    return f"module {name!r}", f"the mode of {name!r}", f"the hooks of {name!r}"


def trains(name: str) -> str:
    """The fact that a parameter trains or does not."""
    return f"requires_grad of parameter {name!r}"


def buffer(name: str) -> str:
    """The fact that a buffer is the object it is."""
    return f"buffer {name!r}"


def parameter(name: str) -> str:
    """The fact that a parameter is the object it is."""
    return f"parameter {name!r}"


def key(name: str) -> str:
    """The fact that the ``state_dict`` has this key, or has it not."""
    return f"the key {name!r} of the state_dict"


def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    # Every name, and not every object once: both names of a module that is registered twice have to survive.
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        told = id(module), module.training, [[id(hook) for hook in kind.values()] for kind in hooks]
        yield from zip(of_module(name), told, strict=True)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        yield parameter(name), (id(tensor), tensor.dtype, tensor.device)
        yield trains(name), tensor.requires_grad
    for name, held in model.named_buffers(remove_duplicate=False):
        yield buffer(name), (id(held), held.dtype, held.device)
