"""Hugging Face's Trainer: a callback that watches a training. ``Trainer(..., callbacks=[NormCallback(out="runs/a")])``.

transformers is imported with this module and nowhere else.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from normkit.watching import Watch, watch


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
