"""``nk.freeze_``: batch norms that normalise by their running statistics in training too, and do not learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn, optim
from torch.nn.utils import parametrize

from normkit.blocks.modulation import Modulated
from normkit.norms.batch_norm import SyncBatchNorm
from normkit.statistics.buffers import RunningStatistics
from normkit.surgery import preserve, recast
from normkit.surgery.operate import Plan, operate
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription, Safety

Filter = Callable[[nn.Module, str], bool]


def freeze_(
    model: nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Freeze the layers that keep running statistics. In place; ``model.train()`` and pickling leave them frozen.

    With ``statistics`` a layer normalises by its running statistics in training as in evaluation, and they stay; with
    ``affine`` its weight and bias stop training, and so does what makes scale and shift of a condition around it
    (:class:`normkit.ConditionalBatchNorm2d`, :class:`normkit.SPADE`). A layer of torch becomes normkit's of the same
    name (the same object, ``isinstance`` as before); the class of a normkit layer stays. Layers without running
    statistics are left alone.

    Args:
        model: any module. A DistributedDataParallel wrapper is looked through, for ``affine=False``.
        statistics: freeze the running statistics, and normalise by them.
        affine: freeze weight and bias: ``requires_grad`` becomes False, and a gradient that waits is dropped.
        filter_fn: ``(module, name) -> bool``: which layers; default all.
        example_inputs: the model runs on it before and after, and the greatest error in evaluation is certified.
        optimizer: may be given as to every operation; there is nothing to do for it, since torch's optimizers pass a
            parameter without a gradient by, weight decay and momentum included.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was frozen and what was left, with reasons. ``certificate.undo()`` takes it back; so does
        :func:`unfreeze_`, which leaves torch's layers normkit's.

    Raises:
        TypeError: a layer with running statistics cannot be frozen, or a wrapper stands in the way; the message says
            which and what to do. Nothing was changed.
        ValueError: neither statistics nor affine.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> certificate = nk.freeze_(model)
    >>> y = model.train()(torch.randn(4, 3, 8, 8))
    >>> model[1].running_mean.abs().max().item(), model[1].weight.requires_grad
    (0.0, False)

    When not to use it: the data differ from what the running statistics come from; then nothing normalises them any
    more. For single forward passes: :func:`normkit.statistics_frozen`.
    """
    intended = plan(model, statistics=statistics, affine=affine, filter_fn=filter_fn)
    return operate(intended, example_inputs=example_inputs, dry_run=dry_run)


def unfreeze_(
    model: nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Take :func:`freeze_` back: batches normalise and move the statistics again, and what trained before trains again.

    A weight or bias that did not train before :func:`freeze_` does not train afterwards either. The arguments are those
    of :func:`freeze_` and choose what is taken back.

    >>> import torch, normkit as nk
    >>> bn = nk.BatchNorm1d(2)
    >>> bn.bias.requires_grad = False
    >>> certificate = nk.freeze_(bn), nk.unfreeze_(bn)
    >>> bn.weight.requires_grad, bn.bias.requires_grad, bn.frozen
    (True, False, False)
    """
    intended = plan(model, statistics=statistics, affine=affine, filter_fn=filter_fn, freeze=False)
    return operate(intended, example_inputs=example_inputs, dry_run=dry_run)


def plan(
    model: nn.Module,
    *,
    statistics: bool = True,
    affine: bool = True,
    filter_fn: Filter | None = None,
    freeze: bool = True,
) -> Plan:
    """What :func:`freeze_` would do, or :func:`unfreeze_` (``freeze=False``). Nothing is changed."""
    operation = "freeze_" if freeze else "unfreeze_"
    if not statistics and not affine:
        raise ValueError(f"{operation}: statistics=False and affine=False leave nothing to do; choose at least one")
    inner = unwrap(model, operation)
    intended = Plan(operation, inner)
    changed: set[int] = set()
    table = {**recast.twins(), nn.SyncBatchNorm: SyncBatchNorm}
    for name, module in inner.named_modules():
        if isinstance(module, Modulated) and affine and _is_meant(module, name, filter_fn):
            switch = Switch(module, None, _held(module, freeze))
            if words := switch.words():
                action = f"what scales {type(module.norm).__name__} {'frozen' if freeze else 'unfrozen'}"
                intended.add(Prescription(action, name, "as was asked", "identical", ", ".join(words)), switch)
                changed |= {id(parameter) for parameter in switch.switched()}
        if not isinstance(module, RunningStatistics) and not recast.looks_like_a_norm(module):
            continue
        if reason := _reason_to_skip(module, name, filter_fn, freeze):
            intended.skip(name, reason)
            continue
        ours = isinstance(module, RunningStatistics)
        reasons = _reasons_against(module) if ours else recast.reasons_against(module, table)
        if reasons:
            intended.refuse(name, "; ".join(reasons))
            continue
        edit = _edit(module, statistics, affine, freeze)
        words = edit.words()
        if not words:
            intended.skip(name, f"is {'frozen' if freeze else 'not frozen'} already")
            continue
        if not ours:
            kind = type(module)
            prescription = Prescription(f"{kind.__name__} becomes normkit's", name, "it can be frozen")
            intended.add(prescription, recast.Recast(module, table[kind]))
        moves = edit.frozen != getattr(module, "frozen", False)
        action = f"{type(module).__name__} {'frozen' if freeze else 'unfrozen'}"
        safety: Safety = "eval_identical" if moves else "identical"
        intended.add(Prescription(action, name, "as was asked", safety, ", ".join(words)), edit)
        changed |= {id(parameter) for parameter in edit.switched()}
    _complain(intended)
    if changed and inner is not model:
        raise TypeError(
            f"{operation}: the model is wrapped in DistributedDataParallel, which decided when it was built whose "
            "gradients it averages; nothing was changed.\n"
            f"  call {operation} before the model is wrapped, or with affine=False"
        )
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if id(parameter) in changed:
            intended.changes.add(preserve.trains(name))
    return intended


def _is_meant(module: Modulated, name: str, filter_fn: Filter | None) -> bool:
    """It goes with the norm inside."""
    inside = f"{name}.norm".lstrip(".")
    return bool(getattr(module.norm, "track_running_stats", False)) and (
        not filter_fn or filter_fn(module.norm, inside)
    )


def _reason_to_skip(module: Any, name: str, filter_fn: Filter | None, freeze: bool) -> str | None:
    if not getattr(module, "track_running_stats", False):
        return "keeps no running statistics; module.requires_grad_(False) freezes what it learns"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn left it out"
    if not freeze and not isinstance(module, RunningStatistics):
        return "is not frozen already"
    return None


def _reasons_against(module: nn.Module) -> list[str]:
    if parametrize.is_parametrized(module):
        return ["it has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations first"]
    return []


def _complain(intended: Plan) -> None:
    """A layer that goes on moving while its user believes it frozen spoils a training run in silence."""
    if intended.refused:
        rows = [f"  {row.module or '(the model)'}: {row.reason}" for row in intended.refused]
        first = f"{intended.operation}: {len(rows)} layers cannot be frozen; nothing was changed."
        raise TypeError("\n".join([first, *rows, "  leave them out with filter_fn= to freeze the others"]))


def _edit(module: Any, statistics: bool, affine: bool, freeze: bool) -> Switch:
    frozen, held = getattr(module, "frozen", False), getattr(module, "frozen_parameters", ())
    return Switch(module, freeze if statistics else frozen, _held(module, freeze) if affine else held)


def _held(module: Any, freeze: bool) -> tuple[str, ...]:
    """The parameters that are stopped: those that train, and those that were stopped before."""
    before = getattr(module, "frozen_parameters", ())
    return tuple(n for n, p in _learned(module).items() if n in before or p.requires_grad) if freeze else ()


def _learned(module: Any) -> dict[str, Any]:
    """By name, what a layer learns."""
    if isinstance(module, Modulated):
        return dict(module.learned())
    return {name: p for name in ("weight", "bias") if (p := module._parameters.get(name)) is not None}


@dataclass
class Switch:
    """Set what of a layer is frozen. An edit of :mod:`normkit.surgery.operate`.

    Which parameters it has stopped stands in the layer, so that they can be told from those that never trained.
    """

    layer: Any
    frozen: bool | None
    """Whether it goes by its running statistics; ``None``: it has none of its own."""
    held: tuple[str, ...]
    before: dict[str, Any] = field(init=False, default_factory=dict)
    gradients: dict[str, tuple[bool, Tensor | None]] = field(init=False, default_factory=dict)

    def switched(self) -> list[Tensor]:
        """The parameters that start or stop training."""
        return [parameter for parameter, trains in self._target().values() if parameter.requires_grad != trains]

    def words(self) -> list[str]:
        """What changes, by name."""
        now = getattr(self.layer, "frozen", False)
        moves = ["statistics"] if self.frozen is not None and self.frozen != now else []
        return moves + [
            name for name, (parameter, trains) in self._target().items() if parameter.requires_grad != trains
        ]

    def _target(self) -> dict[str, tuple[Tensor, bool]]:
        released = [name for name in getattr(self.layer, "frozen_parameters", ()) if name not in self.held]
        return {
            name: (parameter, name in released)
            for name, parameter in _learned(self.layer).items()
            if name in self.held or name in released
        }

    def apply(self) -> None:
        after = {"frozen": self.frozen, "frozen_parameters": self.held}
        if self.frozen is None:
            del after["frozen"]
        self.before = {name: getattr(self.layer, name) for name in after}
        for name, (parameter, trains) in self._target().items():
            self.gradients[name] = parameter.requires_grad, parameter.grad
            parameter.requires_grad = trains
            if not trains:
                parameter.grad = None  # an optimizer would still move it by this, and by weight decay
        vars(self.layer).update(after)

    def objections(self) -> list[str]:
        now = getattr(self.layer, "frozen", None), getattr(self.layer, "frozen_parameters", None)
        return [] if now == (self.frozen, self.held) else ["it has been frozen or unfrozen since"]

    def revert(self) -> None:
        for name, (trains, gradient) in self.gradients.items():
            parameter = _learned(self.layer)[name]
            parameter.requires_grad = trains
            parameter.grad = gradient
        vars(self.layer).update(self.before)
        self.gradients = {}
