"""``nk.sync_`` and ``nk.unsync_``: the batch norms of a model pool the batches of all processes, or no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn, optim

from normkit.norms.batch_norm import SyncBatchNorm, _BatchNorm
from normkit.statistics.batch import Batch
from normkit.statistics.policy import Policy
from normkit.statistics.synchronized import Synchronized
from normkit.surgery import preserve, recast
from normkit.surgery.operate import Plan, operate
from normkit.surgery.set_statistics import SetPolicy
from normkit.surgery.wrappers import unwrap
from normkit.vocabulary.certificate import Certificate
from normkit.vocabulary.prescription import Prescription

Filter = Callable[[nn.Module, str], bool]
_TORCHS = nn.modules.batchnorm._BatchNorm
REASON = "small batches on many processes are one large batch"


def sync_(
    model: nn.Module,
    process_group: Any = None,
    *,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Let the batch norms of a model normalise by the batches of all processes together. In place.

    normkit's layers keep their class and get ``statistics=Synchronized(process_group)``; torch's batch norms become
    normkit's and stay the same objects. Names, parameters, buffers, hooks, modes and the ``state_dict`` stay. Every
    process calls it; nothing is communicated before the first training step.

    Args:
        model: any module, before or after it is wrapped in DistributedDataParallel; before it is sharded by FSDP.
        process_group: of ``torch.distributed``; ``None``: all processes. Layers that are synchronised in another group
            change over to this one.
        filter_fn: ``(module, name) -> bool``: which layers; default all batch norms.
        example_inputs: a batch; outputs in evaluation are compared before and after.
        optimizer: may be given as to every operation; there is nothing to do for it, since all parameters stay.
        dry_run: change nothing, and return what would be done.

    Returns:
        What was changed, skipped and refused, each with its reason. ``certificate.undo()`` takes it back at once,
        :func:`unsync_` at any time, in another process too.

    Raises:
        TypeError: a wrapper that cannot be looked through.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> print(nk.sync_(model).verdict)
    sync_: 1 x BatchNorm2d synchronised.

    Differs from ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which makes new layers: without the hooks and the
    forward of a subclass, and two where one layer had two parents.

    When not to use it: layers with statistics of their own kind (``Ghost`` ...) are refused, because somebody chose
    these; instance norm has nothing to share.
    """
    return operate(plan(model, process_group, filter_fn=filter_fn), example_inputs=example_inputs, dry_run=dry_run)


def unsync_(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    example_inputs: Any = None,
    optimizer: optim.Optimizer | None = None,
    dry_run: bool = False,
) -> Certificate:
    """Take :func:`sync_` back: every layer is of the class and has the statistics that it had before.

    Works on a model that was stored and loaded in between, and where no process group exists. Layers that were built
    synchronised stay so.

    >>> import torch, normkit as nk
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), nk.BatchNorm2d(8))
    >>> certificates = nk.sync_(model), nk.unsync_(model)
    >>> [f"{type(layer).__module__.split('.')[0]}: {'statistics=' in repr(layer)}" for layer in model]
    ['torch: False', 'normkit: False']
    """
    return operate(unsync_plan(model, filter_fn=filter_fn), example_inputs=example_inputs, dry_run=dry_run)


def plan(model: nn.Module, process_group: Any = None, *, filter_fn: Filter | None = None) -> Plan:
    """What :func:`sync_` would do. Nothing is changed."""
    intended = Plan("sync_", unwrap(model, "sync_"))
    table = {**recast.twins(), nn.SyncBatchNorm: SyncBatchNorm}
    for name, module in intended.model.named_modules():
        if not isinstance(module, _TORCHS):
            continue
        action = f"{type(module).__name__} synchronised"
        prescription = Prescription(action, name, REASON, "eval_identical")
        if filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
        elif not isinstance(module, _BatchNorm):
            if reasons := recast.reasons_against(module, table):
                intended.refuse(name, "; ".join(reasons))
                continue
            kind = type(module)
            policy = Synchronized(process_group, required=kind is not nn.SyncBatchNorm, replaces=kind)
            intended.add(prescription, Recast(module, policy, table[kind]))
        elif isinstance(module.statistics, Synchronized):
            old = module.statistics
            if old.process_group is process_group:
                intended.skip(name, "it is synchronised already")
            else:
                policy = Synchronized(process_group, old.required, old.replaces or old)
                intended.add(prescription, SetPolicy(module, policy))
        elif module.save == "output":
            intended.refuse(name, "save='output' is for the statistics of the mini-batch; build it with save='input'")
        elif isinstance(module.statistics, Batch):
            intended.add(prescription, SetPolicy(module, Synchronized(process_group, replaces=module.statistics)))
        else:
            intended.refuse(
                name,
                f"statistics={module.statistics!r} were chosen for it; set layer.statistics = "
                "normkit.statistics.Batch() first, or leave it out with filter_fn=",
            )
    return intended


def unsync_plan(model: nn.Module, *, filter_fn: Filter | None = None) -> Plan:
    """What :func:`unsync_` would do. Nothing is changed."""
    intended = Plan("unsync_", unwrap(model, "unsync_"))
    again: set[int] = set()
    for name, module in intended.model.named_modules():
        policy = getattr(module, "statistics", None)
        if not isinstance(module, _BatchNorm) or not isinstance(policy, Synchronized):
            continue
        action = f"{type(module).__name__} no longer synchronised"
        prescription = Prescription(action, name, "as was asked", "eval_identical")
        if filter_fn is not None and not filter_fn(module, name):
            intended.skip(name, "filter_fn left it out")
        elif policy.replaces is None:
            intended.skip(name, "it was built synchronised; layer.statistics = normkit.statistics.Batch() changes that")
        elif isinstance(policy.replaces, Policy):
            intended.add(prescription, SetPolicy(module, policy.replaces))
        elif module.frozen or module.frozen_parameters:
            intended.refuse(name, "it is frozen, which torch's layer cannot be; normkit.unfreeze_ it first")
        else:
            intended.add(prescription, recast.Uncast(module, policy.replaces))
            again.add(id(module))
    for name, module in intended.model.named_modules(remove_duplicate=False):
        if id(module) in again:
            counters = module._non_persistent_buffers_set
            intended.changes |= {preserve.buffer(f"{name}.{own}".lstrip(".")) for own in counters}
    return intended


class Recast(recast.Recast):
    """Give a torch layer normkit's class and a policy."""

    def __init__(self, module: Any, policy: Policy, after: type) -> None:
        super().__init__(module, after)
        self.policy = policy

    def apply(self) -> None:
        super().apply()
        layer: Any = self.module
        layer.statistics = self.policy

    def objections(self) -> list[str]:
        return super().objections() or SetPolicy(self.module, self.policy).objections()
