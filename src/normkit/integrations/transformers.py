"""Hugging Face's Trainer: callbacks that watch a training and change its norms. ``Trainer(..., callbacks=[...])``.

transformers is imported with this module and nowhere else.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from normkit.loop import Attached, attach, refuse_resumed
from normkit.watching import Watch, watch
from normkit.watching.listening import torch_optimizer


class NormCallback(TrainerCallback):
    """Watches the training with :func:`normkit.watch`, from its first step to its end.

    A model that gets labels returns its loss, so the three evaluations (in training, by running statistics, by batch
    statistics) have losses too. Trackers of the Trainer (``report_to=``) get nothing by themselves: give ``trackers=``.

    Args:
        options: as :func:`normkit.watch` takes them: ``every``, ``out``, ``filter_fn``, ``trackers``, ``budget`` ...
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.watch: Watch | None = None
        """The watch, once the training has begun."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        options = dict(self.options)
        if args.world_size > 1:
            import torch.distributed as dist

            options.setdefault("process_group", dist.group.WORLD)
        self.watch = watch(model, optimizer, step=state.global_step, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.watch is not None and logs and "loss" in logs:
            self.watch.log(loss=float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.watch is not None:
            self.watch.close()


class NormSchedule(TrainerCallback):
    """Changes normalization while the training goes on, as :func:`normkit.strategies.attach` does in any loop.

    The total number of steps and the scheduler are the Trainer's.

    Args:
        strategy: as :func:`normkit.strategies.attach` takes it: ``"layer -> rms@50%"``.
        options: further options of ``attach``.

    A run that is resumed is refused: the Trainer's checkpoints do not hold where a strategy is.

    >>> from normkit.integrations.transformers import NormSchedule       # doctest: +SKIP
    >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[NormSchedule("layer -> rms@50%")])
    ... # doctest: +SKIP
    """

    def __init__(self, strategy: Any, **options: Any) -> None:
        self.strategy, self.options = strategy, options
        self.attached: Attached | None = None
        """What was done, once the training has begun."""

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        refuse_resumed(state.global_step)
        options = {"total_steps": state.max_steps, "scheduler": lr_scheduler, **self.options}
        self.attached = attach(model, torch_optimizer(optimizer), self.strategy, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.attached is not None and logs and "loss" in logs:
            self.attached.log(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.attached is not None:
            self.attached.close()
