"""``nk.convert_``: the norms of a model become norms of another kind."""

from __future__ import annotations

import inspect
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

from normkit.norms.rms_norm import RMSNorm
from normkit.statistics.batch import Batch
from normkit.statistics.ghost import Ghost
from normkit.statistics.synchronized import Synchronized
from normkit.surgery import batches, normalizer_free, probe, recast
from normkit.surgery.become import Become
from normkit.surgery.centre import Centred, centred, rewritten
from normkit.surgery.fit import Matched, Run, fit, two_runs
from normkit.surgery.merge import Overwrite
from normkit.surgery.operate import Plan, operate
from normkit.surgery.regroup import follow
from normkit.surgery.target import Kind, Misfit, build, is_frozen_batch, lost, place_of
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription, Safety
from normkit.vocabulary.reading import Reading

Filter = Callable[[nn.Module, str], bool]
_BATCH = nn.modules.batchnorm._BatchNorm
ERROR, UNIT = "match error", "standard deviations of the old layer's output"


def convert_(
    model: nn.Module,
    to: Kind = "group:32",
    match: Any = None,
    optimizer: optim.Optimizer | None = None,
    filter_fn: Filter | None = None,
    dry_run: bool = False,
    *,
    call: batches.Call | None = None,
) -> Certificate:
    """Turn the norms of a model into norms of another kind, with what they have learnt. In place.

    The layers stay the objects they are: names, parents, hooks, modes, and weight and bias wherever the new kind has
    them too. Without ``match`` weight and bias stay as they are; but a group norm does not give what a batch norm gave
    with the same weight and bias. With ``match`` scale and shift of each channel are fitted, layer after layer, so that
    the outputs in evaluation are as near as they can be to those of the old model (least squares).

    Args:
        model: any module, of torch's or normkit's norms.
        to: what :func:`normkit.create` takes (``"group:32"``, ``"layer"``, ``"rms"``, ``"dyt"``, ``"none"`` ...);
            ``"group:auto"``: groups of about 16 channels, as they divide; ``"frozen_batch"``: a batch norm that
            normalises by its running statistics for good; ``"normalizer-free"``: a residual network without norms,
            see docs/normalizer-free.md; or a callable ``number of channels -> layer``.
        match: data to fit on: a tensor, a tuple of positional or a dict of keyword arguments, one half of which is
            fitted on and the other measured on; or a DataLoader (any iterable of batches), the first batch of which is
            fitted on and the second measured on. Some hundred samples; they need no labels.
        optimizer: new parameters join the group of their layer, those that are gone leave it; the state of all others
            stays.
        filter_fn: ``(module, name) -> bool``: which layers; default all norms.
        dry_run: change nothing, and return what would be done.
        call: ``(model, batch)`` runs the model on what ``match`` gives; default as :func:`normkit.calibrate_`.

    Returns:
        What was changed, skipped and refused, with reasons; how the keys of the ``state_dict`` have changed; with
        ``match``, by layer, the error on data that were not fitted (fitted, and with weight and bias as they were), in
        standard deviations of the old layer's output. ``undo()`` takes it back.

    Raises:
        ValueError: no norm of that name; ``match`` with less than two samples.
        TypeError: a wrapper that cannot be looked through.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
    >>> print(nk.convert_(model, to="group:auto", match=torch.randn(16, 3, 8, 8)).verdict)
    convert_: 1 x BatchNorm2d becomes GroupNorm.
    >>> model[1]
    GroupNorm(2, 32, eps=1e-05, affine=True, bias=True)

    When not to use it: to get rid of batch norms in a model that is only evaluated (``nk.fold`` does that exactly);
    without fine-tuning afterwards (docs/convert.md shows what is lost).

    A layer norm becomes an RMS norm exactly where its input comes from one linear or convolutional layer, which takes
    the mean out, and its bias is 0 or goes into linear layers that alone read it; elsewhere the certificate says why
    not.

    Source: Wu & He 2018, arXiv:1803.08494, on groups; Jiang et al. 2023, arXiv:2305.14858, on layer and RMS norm.
    """
    intended = plan(model, to, match, optimizer, filter_fn, call=call)
    probed = match if call is None and isinstance(match, Tensor | tuple | Mapping) else None
    return operate(intended, example_inputs=probed, dry_run=dry_run)


def plan(
    model: nn.Module,
    to: Kind = "group:32",
    match: Any = None,
    optimizer: optim.Optimizer | None = None,
    filter_fn: Filter | None = None,
    *,
    call: batches.Call | None = None,
) -> Plan:
    """What :func:`convert_` would do. With ``match`` the model runs, and is put back."""
    inner = unwrap(model, "convert_")
    if inner is not model:
        raise TypeError(
            "convert_: the model is wrapped in DistributedDataParallel, which holds on to the parameters there are.\n"
            "  convert the model before it is wrapped"
        )
    if normalizer_free.is_meant(to):
        intended = normalizer_free.plan(inner, match, call)
        follow(intended, optimizer)
        return intended
    intended = Plan("convert_", inner)
    runs = None if match is None else two_runs(match, call)
    fresh = _fresh(intended, to, filter_fn, None if runs is None else _dims(inner, runs[0]))
    exact = _exact(inner, fresh)
    changing = {old: new for old, new in fresh.items() if _safety(old, new) == "retrain"}
    other = {old: new for old, new in changing.items() if not isinstance(exact.get(old), Centred)}
    found = Matched()
    if runs is not None and other:
        found = fit(inner, other, _shared(inner, other), runs)
    _add_steps(intended, fresh, found, exact)
    follow(intended, optimizer)
    if found.layers:
        intended.notes += _words(found)
        name_of = {module: name for name, module in inner.named_modules()}
        intended.readings += [Reading(ERROR, m.fitted, name_of[old], unit=UNIT) for old, m in found.layers.items()]
        intended.readings.append(Reading(ERROR, found.fitted, unit="standard deviations of the model's output"))
    elif not fresh and not intended.skipped and not intended.refused:
        intended.notes.append("there is no norm of torch's or normkit's in the model")
    elif fresh and runs is None:
        intended.notes.append("outputs were not compared; give match=, a batch, to fit scale and shift and to measure")
    return intended


def _fresh(
    intended: Plan, to: Kind, filter_fn: Filter | None, dims: dict[nn.Module, int] | None
) -> dict[nn.Module, nn.Module]:
    """Old layer -> new layer, for all that can be converted; the others are skipped or refused."""
    fresh: dict[nn.Module, nn.Module] = {}
    for name, module in intended.model.named_modules():
        if recast.is_called_a_norm(module):
            kind = type(module)
            intended.skip(name, f"{kind.__module__}.{kind.__qualname__} is no norm of torch's or normkit's")
        if isinstance(module, nn.Identity) or not recast.is_norm(module):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
            continue
        try:
            place = place_of(module)
            new = build(to, module, place, learn=dims is not None, dim=(dims or {}).get(module), among=intended.model)
        except Misfit as misfit:
            intended.refuse(name, str(misfit))
            continue
        if type(new) is type(module) and new.extra_repr() == module.extra_repr():
            intended.skip(name, f"it is {type(new).__name__}({new.extra_repr()}) already")
        elif is_frozen_batch(to) and dims is None and getattr(module, "running_mean", None) is None:
            intended.refuse(name, "it has no running statistics to be frozen; give match=, a batch, and it gets those")
        else:
            fresh[module] = new
    return fresh


def _dims(model: nn.Module, run: Run) -> dict[nn.Module, int]:
    """How many axes of space each norm is given, where it is called."""
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[module] = max((args[0] if args else kwargs["input"]).dim() - 2, 1)

    norms = [module for module in model.modules() if recast.is_norm(module)]
    handles = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    try:
        with probe.restored(model), torch.no_grad():
            run(model.eval())
    except Exception as error:
        raise ValueError(
            f"convert_: the model raises {type(error).__name__} on match=: {error}\n"
            "  give a tensor, a tuple of the positional or a dict of the keyword arguments, a DataLoader, or call="
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _safety(old: Any, new: Any) -> Safety:
    if recast.twins().get(type(old)) is type(new) and not getattr(new, "frozen", False):
        names = [n for n in inspect.signature(type(old)).parameters if n not in ("device", "dtype", "bias")]
        if all(getattr(old, n, None) == getattr(new, n, None) for n in names):
            return "identical"
    policy = getattr(old, "statistics", None)
    batch = (
        isinstance(old, _BATCH) and isinstance(new, _BATCH) and isinstance(policy, Batch | Ghost | Synchronized | None)
    )
    kept = batch and old.running_mean is not None and old.eps == new.eps and not lost(old, new)
    return "eval_identical" if kept else "retrain"


def _shared(model: nn.Module, layers: Iterable[nn.Module]) -> set[nn.Module]:
    """The layers whose weight or bias another module has as well."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {layer for layer in layers if any(owners[id(p)] > 1 for p in layer.parameters(recurse=False))}


def _exact(model: nn.Module, fresh: dict[nn.Module, nn.Module]) -> dict[nn.Module, Centred | str]:
    """By layer norm that becomes an RMS norm, how it does so exactly, or why it does not."""
    named = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and isinstance(new := fresh.get(module), RMSNorm) and new.eps == module.eps
    }
    return {named[name]: found for name, found in centred(model, named).items()}


def _add_steps(
    intended: Plan, fresh: dict[nn.Module, nn.Module], found: Matched, exact: dict[nn.Module, Centred | str]
) -> None:
    edits = {old: Become(old, new) for old, new in fresh.items()}
    for name, module in intended.model.named_modules():
        if module not in edits:
            continue
        new, safety = fresh[module], _safety(module, fresh[module])
        action = f"{type(module).__name__} becomes {type(new).__name__}"
        words = []
        way = exact.get(module)
        if isinstance(way, Centred):
            safety = "identical"
            words.append(way.words())
        elif way is not None:
            words.append(f"not exactly: {way}")
        if not isinstance(way, Centred) and (gone := lost(module, new)):
            words.append(f"loses its {' and '.join(gone)}")
        if match := found.layers.get(module):
            words.append(f"error {match.fitted:.2g}, unfitted {match.carried:.2g}")
        reason = "another kind was asked for"
        intended.add(Prescription(action, name, reason, safety, "; ".join(words)), edits[module])
    names = {module: name for name, module in intended.model.named_modules()}
    helpers = {names[norm]: way for norm, way in exact.items() if isinstance(way, Centred)}
    for name, pairs in rewritten(intended.model, helpers).items():
        reason = "so that layer norms may be RMS norms"
        intended.add(Prescription("weights adjusted", name, reason, "identical"), Overwrite(pairs))
    for name, module in intended.model.named_modules(remove_duplicate=False):
        if module in edits:
            intended.changes |= edits[module].changes(name)


def _words(found: Matched) -> list[str]:
    fitted, carried = ([getattr(m, kind) for m in found.layers.values()] for kind in ("fitted", "carried"))
    told = [f"{statistics.median(e):.2g} of a layer, {max(e):.2g} at most" for e in (fitted, carried)]
    return [
        f"error in standard deviations, on data not fitted: median {told[0]}; of the model {found.fitted:.2g}",
        f"with weight and bias as they were: median {told[1]}; of the model {found.carried:.2g}",
    ]
