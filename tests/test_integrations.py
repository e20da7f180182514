"""The hosts as they are: each trains a few steps with and without a watch, and must not notice it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normkit.watching import report_of_run

pytestmark = pytest.mark.slow
STEPS = 6


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


@pytest.mark.parametrize("forward", ["through the module", "through self.model"])
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, forward):
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    from normkit.integrations.lightning import NormMonitor

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, index):
            x, y = batch
            return F.cross_entropy(self(x) if forward == "through the module" else self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    def train(callbacks):
        net = Net()
        torch.manual_seed(2)
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, gradient_clip_val=0.5, callbacks=callbacks, **options
        )
        trainer.fit(net, DataLoader(data(), batch_size=8))
        return net.state_dict()

    alone = train([])
    beside = train([NormMonitor(every=2, out=tmp_path / "a", budget=None)])
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    diagnosis = report_of_run(tmp_path / "a")
    assert (diagnosis.run["steps"], diagnosis.run["samples"], diagnosis.run["closed"]) == (STEPS, 3, True)
    quantities = {reading.quantity for reading in diagnosis.readings}
    assert {"loss", "mean_drift", "gradient_norm", "update_to_weight", "train_eval_gap"} <= quantities
    assert diagnosis.run["notes"] == []
    # Clipped to 0.5 before the step, which is what the optimizer sees.
    norms = [r.value for r in diagnosis.readings if r.quantity == "gradient_norm" and r.step == 1]
    assert sum(norm**2 for norm in norms) <= 0.25 * 1.0001


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    from normkit.integrations.transformers import NormCallback

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    generator = torch.Generator().manual_seed(3)
    rows = [
        {"input_ids": torch.randint(32, (10,), generator=generator), "labels": torch.tensor(index % 3)}
        for index in range(48)
    ]

    def train(callbacks):
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=5,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
        return model.state_dict()

    alone = train([])
    beside = train([NormCallback(every=2, out=tmp_path / "a", budget=None)])
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    diagnosis = report_of_run(tmp_path / "a")
    assert (diagnosis.run["steps"], diagnosis.run["samples"], diagnosis.run["closed"]) == (STEPS, 3, True)
    assert diagnosis.run["notes"] == []
    passes = [r.value for r in diagnosis.readings if r.quantity == "forward_passes"]
    assert passes == [2.0] * 3
    assert {"loss", "loss_training", "loss_running"} <= {reading.quantity for reading in diagnosis.readings}


@pytest.mark.filterwarnings("ignore")
def test_a_strategy_in_lightning():
    pl = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    from normkit.integrations.lightning import NormSchedule

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    schedule, net = NormSchedule("batch -> frozen@50% lr/10"), Net()
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=STEPS, accelerator="cpu", logger=False, callbacks=[schedule], **options)
    trainer.fit(net, DataLoader(data(), batch_size=8))
    assert [line["step"] for line in schedule.attached.record] == [STEPS // 2]
    assert net.model[1].frozen
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.filterwarnings("ignore")
def test_a_strategy_in_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    import normkit as nk
    from normkit.integrations.transformers import NormSchedule

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    rows = [{"input_ids": torch.randint(32, (10,)), "labels": torch.tensor(index % 3)} for index in range(48)]
    schedule = NormSchedule("layer -> rms@50%")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = BertForSequenceClassification(config)
    Trainer(model, arguments, train_dataset=rows, callbacks=[schedule]).train()
    assert [(line["step"], "failed" in line) for line in schedule.attached.record] == [(STEPS // 2, False)]
    assert isinstance(model.bert.embeddings.LayerNorm, nk.RMSNorm)


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from watched_runs import RUNS, train, watched

    with warnings.catch_warnings(), SummaryWriter(str(tmp_path)) as writer:
        train(RUNS["dropout and batch norm"], lambda *given: watched(*given, trackers=[writer]))[1].close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("norm/mean_drift/1")] == [1, 3, 5]
    assert events.Scalars("norm/values_per_channel/1")[0].value == 16
