"""Lightning: callbacks that watch a training and change its norms. ``Trainer(callbacks=[NormMonitor(out="runs/a")])``.

Lightning is imported with this module and nowhere else, under either of its names.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from normkit.loop import Attached, attach, refuse_resumed
from normkit.watching import Watch, watch
from normkit.watching.listening import torch_optimizer


def _host() -> Any:
    """``lightning.pytorch`` or ``pytorch_lightning``: the one that is in use, because their callbacks are not one."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError(
        "normkit.integrations.lightning needs Lightning.\n  type: pip install lightning", name="lightning"
    )


_Callback: Any = _host().Callback


class NormMonitor(_Callback):
    """Watches the training with :func:`normkit.watch`, from its first step to its end.

    The loss that ``training_step`` returns is put beside the readings. Numbers and alarms go to Lightning's loggers,
    too, unless ``trackers`` says where.

    Args:
        module: the name of the submodule to watch. By default the only child of the LightningModule that has
            parameters (``self.model``), which ``training_step`` may call directly; otherwise the LightningModule.
        options: as :func:`normkit.watch` takes them: ``every``, ``out``, ``filter_fn``, ``budget`` ...
    """

    def __init__(self, module: str | None = None, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options
        self.watch: Watch | None = None
        """The watch, once the training has begun."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.optimizers:
            return
        options = dict(self.options)
        if "trackers" not in options:
            options["trackers"] = [Logged(logger) for logger in trainer.loggers]
        if trainer.world_size > 1:
            options.setdefault("process_group", _group())
        optimizer = trainer.optimizers[0]
        self.watch = watch(part(pl_module, self.module), optimizer, step=trainer.global_step, **options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.watch is not None and loss is not None:
            self.watch.log(loss=loss)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()


class NormSchedule(_Callback):
    """Changes normalization while the training goes on, as :func:`normkit.strategies.attach` does in any loop.

    The total number of steps, the steps of an epoch and the first scheduler are the Trainer's.

    Args:
        strategy: as :func:`normkit.strategies.attach` takes it: ``"batch -> frozen@50% lr/10"``.
        module: the name of the submodule, as for :class:`NormMonitor`.
        options: further options of ``attach``.

    A run that is resumed behind a switch is refused: Lightning loads the weights before it asks the callback, into a
    model that is not what it was. Use ``attach`` in a loop of your own there.

    >>> from normkit.integrations.lightning import NormSchedule       # doctest: +SKIP
    >>> trainer = L.Trainer(callbacks=[NormSchedule("batch -> frozen@50% lr/10")])       # doctest: +SKIP
    """

    def __init__(self, strategy: Any, module: str | None = None, **options: Any) -> None:
        super().__init__()
        self.strategy, self.module, self.options = strategy, module, options
        self.attached: Attached | None = None
        """What was done, once the training has begun."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_resumed(trainer.global_step)
        options = {"total_steps": int(trainer.estimated_stepping_batches), **self.options}
        options.setdefault("steps_per_epoch", -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        options.setdefault("scheduler", next(iter(schedulers), None))
        optimizer = torch_optimizer(trainer.optimizers[0])
        self.attached = attach(part(pl_module, self.module), optimizer, self.strategy, **options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self.attached is not None and loss is not None:
            self.attached.log(loss)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.attached is not None:
            self.attached.close()


class Logged:
    """A logger of Lightning's as a tracker."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def log(self, values: dict[str, float], step: int) -> None:
        self.logger.log_metrics(values, step=step)


def part(pl_module: nn.Module, name: str | None) -> nn.Module:
    """What of a LightningModule is watched."""
    if name is not None:
        return pl_module.get_submodule(name)
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    own = next(iter(pl_module.parameters(recurse=False)), None)
    return children[0] if len(children) == 1 and own is None else pl_module


def _group() -> Any:
    import torch.distributed as dist

    return dist.group.WORLD
