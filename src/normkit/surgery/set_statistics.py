"""``nk.set_statistics_``: the batch norms of a model get other statistics, in the middle of training if need be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn, optim

from normkit.norms.batch_norm import SyncBatchNorm, _BatchNorm
from normkit.statistics.before import Before
from normkit.statistics.naming import named
from normkit.statistics.policy import PREFIX, Policy, State
from normkit.statistics.synchronized import Synchronized
from normkit.surgery import preserve, recast
from normkit.surgery.operate import Plan, operate
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

Filter = Callable[[nn.Module, str], bool]


def set_statistics_(
    model: nn.Module,
    statistics: Policy | str,
    *,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Let the batch norms of a model normalise by other statistics from now on. In place.

    normkit's layers keep their class; torch's become normkit's and stay the same objects. Parameters, running
    statistics, names, hooks, modes and the ``state_dict`` stay.

    Args:
        model: any module. A DistributedDataParallel wrapper is looked through.
        statistics: a policy of :mod:`normkit.statistics`, or its name: ``"ghost:16"``, ``"taper:0.5"``, ``"batch"``.
        filter_fn: ``(module, name) -> bool``: which layers; default all batch norms.
        example_inputs: the model runs on it before and after, and the greatest error in evaluation is certified.
        optimizer: may be given as to every operation; there is nothing to do for it.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was changed, and what was left because the policy cannot serve it. ``undo()`` takes it back.

    Raises:
        ValueError: no policy of that name.
        TypeError: a wrapper that cannot be looked through.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> certificate = nk.set_statistics_(model, "ghost:16")
    >>> model[1].statistics
    Ghost(size=16)

    When not to use it: for policies that keep more than running statistics (``PerStep``, ``PerDomain``,
    ``MovingAverage``): a layer is built with those. Over several processes: :func:`normkit.sync_`.
    """
    policy = named(statistics) if isinstance(statistics, str) else statistics
    return operate(plan(model, policy, filter_fn=filter_fn), example_inputs=example_inputs, dry_run=dry_run)


def plan(model: nn.Module, policy: Policy, *, filter_fn: Filter | None = None) -> Plan:
    """What :func:`set_statistics_` would do. Nothing is changed."""
    if not isinstance(policy, Policy):
        raise TypeError(
            f"set_statistics_: {policy!r} is no policy.\n  give one of normkit.statistics, or its name, as 'ghost:16'"
        )
    intended = Plan("set_statistics_", unwrap(model, "set_statistics_"))
    table = {**recast.twins(), nn.SyncBatchNorm: SyncBatchNorm}
    for name, module in intended.model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
        elif getattr(module, "statistics", None) == policy:
            intended.skip(name, f"it has {policy!r} already")
        elif reasons := _reasons_against(module, policy, table):
            intended.refuse(name, "; ".join(reasons))
        else:
            if not isinstance(module, _BatchNorm):
                words = f"{type(module).__name__} becomes normkit's"
                intended.add(
                    Prescription(words, name, "so that it has a policy"), recast.Recast(module, table[type(module)])
                )
            action = f"statistics become {policy!r}"
            intended.add(Prescription(action, name, "as was asked", "eval_identical"), SetPolicy(module, policy))
    for name, module in intended.model.named_modules(remove_duplicate=False):
        if any(step.edit.module is module for step in intended.steps if isinstance(step.edit, SetPolicy)):
            place = f"{name}.{PREFIX}".lstrip(".")
            intended.changes |= {preserve.buffer(f"{place}.{own}") for own in ("mean", "var", "batches")}
            intended.changes |= set(preserve.of_module(place))
    return intended


def _reasons_against(module: Any, policy: Policy, table: dict) -> list[str]:
    try:
        policy.check(module)
    except ValueError as error:
        return [str(error)]
    if not isinstance(module, _BatchNorm):
        return recast.reasons_against(module, table)
    if isinstance(module.statistics, Synchronized) and module.statistics.replaces is not None:
        return ["it is synchronised; normkit.unsync_ takes that back"]
    if module.save == "output":
        return ["save='output' is for the statistics of the mini-batch; build it with save='input'"]
    now = module._modules.get(PREFIX)
    if now is not None and not isinstance(now, Before):
        return [f"{module.statistics!r} keeps more than running statistics, which would be lost"]
    if isinstance(fresh := policy.state(module), State) and not isinstance(fresh, Before):
        return [f"{policy!r} keeps more than running statistics; build the layer with statistics={policy!r}"]
    return []


@dataclass
class SetPolicy:
    """Give a normkit layer another policy. An edit of :mod:`normkit.surgery.operate`."""

    module: Any
    policy: Policy
    before: tuple[Policy, nn.Module | None] = field(init=False)

    def apply(self) -> None:
        self.before = self.module.statistics, self.module._modules.get(PREFIX)
        self.module.statistics = self.policy
        self._keep(self.policy.state(self.module))

    def _keep(self, state: nn.Module | None) -> None:
        if state is not None:
            self.module.add_module(PREFIX, state)
        else:
            self.module._modules.pop(PREFIX, None)

    def objections(self) -> list[str]:
        return [] if self.module.statistics is self.policy else ["its statistics have been changed since"]

    def revert(self) -> None:
        self.module.statistics, state = self.before
        self._keep(state)
