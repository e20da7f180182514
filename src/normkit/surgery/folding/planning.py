"""What a fold is going to do to a model, by name, so that it can be done to any copy of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from normkit.norm import Norm
from normkit.surgery import observe, preserve, recast
from normkit.surgery.folding import edits, flow, sites
from normkit.surgery.folding.choose import Fold, choose
from normkit.surgery.operate import Plan
from normkit.surgery.trace import Refused
from normkit.vocabulary.prescription import Prescription

Filter = Callable[[nn.Module, str], bool]
_LEFT = {
    "identity": "",
    "plain": "; the norm stays, without weight and bias",
    "neutral": "; {kind} stays as it is, with a weight of ones and no shift",
    "rewrite": "; {kind} has a forward without it",
}


@dataclass
class Found:
    """The norms of a model, and what becomes of each."""

    folds: list[tuple[Fold, edits.Way]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    """With what the forwards were called that are going to be written anew."""


def look(model: nn.Module, example_inputs: Any, filter_fn: Filter | None) -> Found:
    """Find the norms of a model, and what each can go into. Nothing is changed."""
    found = Found()
    flows, without = flow.observe(model, example_inputs)
    called, others = observe.calls(model, example_inputs), observe.read_by_others(model, example_inputs)
    wanted: list[sites.Site] = []
    seen: set[str] = set()
    for site in (_at_home(model, site, called) for one in flows for site in sites.find(one)):
        seen.add(site.owner)
        if isinstance(site, sites.NoSite):
            (found.skipped if site.nothing_to_do else found.refused)[site.owner] = site.reason
            continue
        seen.add(site.home(model))
        if filter_fn is not None and not filter_fn(model.get_submodule(site.owner), site.owner):
            found.skipped[site.owner] = "filter_fn left it out"
        else:
            wanted.append(site)
    folds, against = choose(model, wanted)
    for site, reason in against.items():
        part = site.flow.prefix.rstrip(".")
        found.refused[site.owner] = reason if not part else f"{reason} ({_only(part, without)})"
    for one in folds:
        owner = model.get_submodule(one.site.owner)
        try:
            found.folds.append((one, edits.way(model, one, called, others)))
            found.calls[one.site.owner] = called.get(owner, {})
        except Refused as refused:
            found.refused[one.site.owner] = f"it {refused}"
    for name, module in model.named_modules():
        if name in seen or not _looks_like_a_norm(module, name):
            continue
        if module in called:
            found.refused[name] = _why_unseen(name, without)
        else:
            found.skipped[name] = "it was not called on example_inputs"
    return found


def _at_home(model: nn.Module, site: sites.Site | sites.NoSite, called: observe.Given) -> sites.Site | sites.NoSite:
    """A site in the layer whose parameters it reads, where torch.export has not kept in which module it was."""
    if isinstance(site, sites.NoSite) or site.skip is not None:
        return site
    home = site.home(model)
    module = model.get_submodule(home)
    return replace(site, owner=home) if module in called and edits.is_a_plain_norm(module) else site


def plan(model: nn.Module, found: Found) -> Plan:
    """The edits of what was found, for this copy of the model."""
    intended = Plan("fold", model)
    for name, reason in found.skipped.items():
        intended.skip(name, reason)
    for name, reason in found.refused.items():
        intended.refuse(name, reason)
    called = {model.get_submodule(name): call for name, call in found.calls.items()}
    for one, way in found.folds:
        kind = type(model.get_submodule(one.site.owner)).__name__
        what = kind if one.site.input is not None else f"affine of {kind}"
        place = "the layer before it" if one.side == "before" else "what is behind it"
        detail = f"into {one.layers}{_LEFT[way].format(kind=kind)}"
        reason = "the same numbers with less to do"
        prescription = Prescription(f"{what} folded into {place}", one.site.owner, reason, "eval_identical", detail)
        intended.add(prescription, edits.Absorb(model, one, way, called))
        intended.changes |= _changes(model, one, way)
    return intended


def _looks_like_a_norm(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.Identity) or "parametrizations" in name.split("."):
        return False
    has_some = next(module.parameters(recurse=False), next(module.buffers(recurse=False), None)) is not None
    named_so = "norm" in type(module).__name__.lower() and has_some
    return named_so or recast.looks_like_a_norm(module) or isinstance(module, Norm)


def _only(part: str, without: dict[str, str]) -> str:
    around = max((other for other in without if not other or part.startswith(f"{other}.")), key=len)
    return f"what is around {part} cannot be seen: torch.export refuses {around or 'the model'}: {without[around]}"


def _why_unseen(name: str, without: dict[str, str]) -> str:
    if name in without:
        return f"what it does cannot be seen: torch.export refuses it: {without[name]}"
    return "no output depends on a scale and a shift of it that stand fixed"


def _changes(model: nn.Module, one: Fold, way: edits.Way) -> set[str]:
    """The facts that a fold is meant to change."""
    facts = {preserve.key(f"{used.owner}.bias".lstrip(".")) for used, _ in one.uses if used.bias is None}
    if way == "neutral":
        return facts
    tensors, home, owner = (
        edits.named(model),
        model.get_submodule(one.site.home(model)),
        model.get_submodule(one.site.owner),
    )
    gone = {id(tensors[name]) for name in one.site.constants.names()}
    left: set[nn.Module] = set()
    if one.site.input is not None:  # all of the norm goes: the counters of batches, and what a policy keeps
        gone |= {id(counter) for name, counter in home.named_buffers(recurse=False) if name.startswith("num_")}
        left = set(home.modules()) if home is not owner else set(home.modules()) - {home} if way == "identity" else left
    for module in left:
        gone |= {id(tensor) for tensor in [*module._parameters.values(), *module._buffers.values()]}
    for name, module in model.named_modules(remove_duplicate=False):
        facts |= {*preserve.of_module(name)} if module in left else set()
    for name, tensor in tensors.items():
        if id(tensor) in gone:
            facts |= {fact(name) for fact in (preserve.parameter, preserve.trains, preserve.buffer, preserve.key)}
    return facts
