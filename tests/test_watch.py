"""A watched run is bit for bit the unwatched one, leaves no trace, and says what it has seen."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import normkit as nk
from normkit.measure.quantities import QUANTITIES
from normkit.vocabulary.record import read_lines
from normkit.watching import report_of_run, sample
from normkit.watching.directory import thinned
from normkit.watching.listening import torch_optimizer
from normkit.watching.spacing import Spacing
from processes import spawn
from watched_runs import RUNS, Run, different, dropout_and_batch_norm, plain, train, watched


@pytest.mark.parametrize("name", RUNS)
def test_a_watched_run_is_bit_for_bit_the_unwatched_one(name):
    alone, _ = train(RUNS[name], None)
    beside, watching = train(RUNS[name], watched)
    assert different(alone, beside) == []
    assert watching.samples == 3
    assert watching.notes == []
    watching.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_with_the_real_compiler(how):
    def wrap(model: nn.Module) -> nn.Module:
        if how == "wrapped":
            return torch.compile(model)
        model.compile()
        return model

    run = Run(dropout_and_batch_norm, wrap=wrap)
    alone, _ = train(run, None)
    beside, watching = train(run, watched)
    assert different(alone, beside) == []
    assert watching.notes == []
    watching.close()


def test_compiled_in_place_is_listened_to_from_outside():
    def wrap(model: nn.Module) -> nn.Module:
        model.compile(backend="eager")
        return model

    beside, watching = train(Run(dropout_and_batch_norm, wrap=wrap), watched)
    assert watching.notes == []
    assert different(train(Run(dropout_and_batch_norm, wrap=wrap), None)[0], beside) == []
    compiled = watching.model._compiled_call_impl
    watching.close()
    assert watching.model._compiled_call_impl is not compiled


def test_nothing_is_compiled_anew():
    torch.compiler.reset()
    compiled = torch._dynamo.testing.CompileCounter()
    train(Run(dropout_and_batch_norm, wrap=lambda m: torch.compile(m, backend=compiled)), None)
    alone = compiled.frame_count
    torch.compiler.reset()
    compiled.clear()
    train(Run(dropout_and_batch_norm, wrap=lambda m: torch.compile(m, backend=compiled)), watched)[1].close()
    assert compiled.frame_count == alone


def test_without_its_protection_the_run_would_be_another(monkeypatch):
    """The comparison sees it when the forward pass beside the step is not on copies."""
    monkeypatch.setattr(sample, "untouched", lambda model: contextlib.nullcontext())
    beside, watching = train(RUNS["dropout and batch norm"], watched)
    watching.close()
    assert {"1.running_mean", "random state"} <= {*different(train(RUNS["dropout and batch norm"], None)[0], beside)}


def test_close_leaves_no_trace():
    model = dropout_and_batch_norm()
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    nk.watch(model, optimizer, out=None).close()
    for name, module in model.named_modules():
        assert {k: v for k, v in vars(module).items() if "hook" not in k} == {
            k: v for k, v in before[name].items() if "hook" not in k
        }
        assert not any(value for key, value in vars(module).items() if "hooks" in key)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_no_layer_has_a_hook_between_the_samples():
    model = dropout_and_batch_norm()
    with nk.watch(model, torch.optim.Adam(model.parameters()), out=None):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in list(model.modules())[1:])


def test_a_copy_of_a_watched_model_hears_nothing(tmp_path):
    model = dropout_and_batch_norm()
    optimizer = torch.optim.Adam(model.parameters())
    with watched(model, optimizer) as watching:
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        twin(torch.randn(4, 6)), read(torch.randn(4, 6))
        assert watching._passes == 0


class Numbers(dict):
    """A tracker of the ``.log`` kind that keeps what it gets."""

    def log(self, values, step):
        self.setdefault(step, {}).update(values)


class Scalars(list):
    """A tracker of TensorBoard's kind."""

    def add_scalar(self, name, value, step):
        self.append((name, value, step))

    def add_text(self, name, text, step):
        self.append((name, text, step))


def test_every_tracker_gets_the_same_numbers():
    numbers, scalars = Numbers(), Scalars()
    train(RUNS["dropout and batch norm"], lambda *given: watched(*given, trackers=(numbers, scalars)))[1].close()
    assert sorted(numbers) == [1, 3, 5]
    said = {name for values in numbers.values() for name in values if name.startswith("norm/findings/")}
    assert {(name, step) for name, value, step in scalars if isinstance(value, float)} == {
        (name, step) for step, values in numbers.items() for name in values if name not in said
    }
    assert said == {
        f"norm/findings/{text.split('**')[1].split(': ')[1]}" for _, text, _ in scalars if isinstance(text, str)
    }
    assert numbers[1]["norm/values_per_channel/1"] == 16
    assert not any("0.weight" in name for name in numbers[1])


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(caplog):
    class Broken:
        def log(self, values, step):
            raise OSError("the disk is full")

    numbers = Numbers()
    train(RUNS["plain"], lambda *given: watched(*given, trackers=(Broken(), numbers)))[1].close()
    assert sum("Broken failed" in record.message for record in caplog.records) == 1
    assert sorted(numbers) == [1, 3, 5]


def test_what_logs_neither_way_is_refused():
    model = plain()
    with pytest.raises(TypeError, match=r"neither \.log"):
        nk.watch(model, torch.optim.Adam(model.parameters()), out=None, trackers=[object()])


@pytest.mark.parametrize("name", ["dropout and batch norm", "checkpointing", "accumulation"])
def test_moves_of_running_statistics_are_counted_per_optimizer_step(name, tmp_path):
    run = RUNS[name]
    _, watching = train(run, lambda *given: watched(*given, out=tmp_path / "a"))
    watching.close()
    lines = read_lines(tmp_path / "a" / "readings.jsonl")
    layer = "block.1" if name == "checkpointing" else "1"
    assert [line["values"]["statistics_moves"][layer] for line in lines] == [run.moves_often] * 3
    assert [line["values"]["forward_passes"][""] for line in lines] == [run.accumulate] * 3
    assert [line["values"]["backward_passes"][""] for line in lines] == [run.accumulate] * 3


def test_the_numbers_of_a_sample_are_those_of_the_step(tmp_path):
    """Against the plain formulas, from a second run of the same seeds."""
    torch.manual_seed(0)
    model = dropout_and_batch_norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    watching = watched(model, optimizer, tmp_path / "a")
    x = torch.randn(16, 6)
    loss = F.cross_entropy(model(x), torch.randint(3, (16,)))
    loss.backward()
    watching.log(loss=loss)
    old, gradient = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    optimizer.step()
    watching.close()
    (line,) = read_lines(tmp_path / "a" / "readings.jsonl")
    values, new = line["values"], model[0].weight.detach()
    assert values["gradient_norm"]["0.weight"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert values["update_to_weight"]["0.weight"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
    cosine = F.cosine_similarity(new.double().flatten(), old.double().flatten(), dim=0)
    assert values["angle_per_step"]["0.weight"] == pytest.approx(math.acos(cosine), rel=1e-3)
    assert values["learning_rate"][""] == 0.5
    # The forward pass of the step has moved the running mean by a tenth of the way before it is looked at.
    inputs = F.linear(x, old, model[0].bias.detach() + 0.5 * model[0].bias.grad)
    mean, var = inputs.mean(0), inputs.var(0)
    drift = ((mean - 0.1 * mean).abs() / (0.9 + 0.1 * var + 1e-5).sqrt()).mean()
    assert values["mean_drift"]["1"] == pytest.approx(float(drift), rel=1e-3)


def test_logged_numbers_are_kept_by_the_step_they_belong_to(tmp_path):
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, tmp_path / "a") as watching:
        for step in range(5):
            model(torch.randn(4, 6)).sum().backward()
            optimizer.step()
            watching.log(loss=torch.tensor(float(step)), mood=2 * step)
    readings = report_of_run(tmp_path / "a").readings
    assert [(r.step, r.value) for r in readings if r.quantity == "loss"] == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    assert [r.value for r in readings if r.quantity == "mood"] == [0.0, 2.0, 4.0, 6.0]


def test_a_held_batch_gives_three_losses_over_the_run(tmp_path):
    held = (torch.randn(64, 6), torch.randint(3, (64,)))
    run = RUNS["dropout and batch norm"]
    options = {"batch": held, "loss_fn": F.cross_entropy}
    beside, watching = train(run, lambda *given: watched(*given, out=tmp_path / "a", **options))
    watching.close()
    assert different(train(run, None)[0], beside) == []
    readings = report_of_run(tmp_path / "a").readings
    for quantity in ("loss_training", "loss_running", "loss_batch_statistics"):
        assert [r.step for r in readings if r.quantity == quantity] == [1, 3, 5]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Loss on the sampled batches" in page


def test_the_filter_says_which_modules_are_told(tmp_path):
    keep = lambda module, name: name != "1"
    train(RUNS["dropout and batch norm"], lambda *given: watched(*given, out=tmp_path / "a", filter_fn=keep))[1].close()
    places = {
        name for line in read_lines(tmp_path / "a" / "readings.jsonl") for v in line["values"].values() for name in v
    }
    assert "0.weight" in places
    assert not {"1", "1.weight", "1.bias"} & places


def test_a_run_that_was_killed_can_be_read(tmp_path):
    _, watching = train(RUNS["dropout and batch norm"], lambda *given: watched(*given, out=tmp_path / "a"))
    with open(tmp_path / "a" / "readings.jsonl", "ab") as file:
        file.write(b'{"step": 7, "values": {"gra')
    diagnosis = report_of_run(tmp_path / "a")
    assert diagnosis.run["samples"] == 3
    assert not diagnosis.run["closed"]
    watching.close()
    assert report_of_run(tmp_path / "a").run["closed"]
    assert report_of_run(tmp_path / "a").run["steps"] == 6


def test_a_directory_that_holds_a_run_stays_as_it_is(tmp_path):
    for _ in range(3):
        train(RUNS["plain"], lambda *given: watched(*given, out=tmp_path / "a"))[1].close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a-2", "a-3"]
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, tmp_path / "a", step=6):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert [line["step"] for line in read_lines(tmp_path / "a" / "readings.jsonl")] == [1, 3, 5, 7]


def test_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="no run was watched there"):
        report_of_run(tmp_path)


def test_alarms_are_said_once_as_they_come_up(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    alerts = []

    class Alerting(Numbers):
        def alert(self, title, text):
            alerts.append(title)

    with (
        caplog.at_level(logging.INFO, "normkit.watch"),
        watched(model, optimizer, tmp_path / "a", trackers=[Alerting()]),
    ):
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,))).backward()
            optimizer.step()
    said = [line["rule"] for line in read_lines(tmp_path / "a" / "findings.jsonl")]
    assert "update_size" in said
    assert len(said) == len({*said})
    assert len(alerts) == len(said)
    assert all(any(f"({rule})" in record.message for record in caplog.records) for rule in said)


def nan_run(break_it, steps: int = 5, out=None, every: int = 100):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nk.watch(model, optimizer, every=every, out=out, budget=0.02 if every > 1 else None) as watching:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            x, loss_of = torch.randn(16, 6), F.cross_entropy
            x, loss_of = break_it(step, model, x, loss_of) or (x, loss_of)
            loss = loss_of(model(x), torch.randint(3, (16,)))
            loss.backward()
            optimizer.step()
            watching.log(loss=loss)
    return watching


def test_the_first_nan_is_traced_to_the_batch_at_its_step():
    def break_it(step, model, x, loss_of):
        return (x.index_fill(0, torch.tensor(3), math.nan), loss_of) if step == 4 else None

    first = nan_run(break_it).first_nan
    assert (first["step"], first["module"]) == (4, "")
    assert "The batch itself has the first values that are not finite, at step 4: 6 of them" in first["verdict"]


def test_the_first_nan_is_traced_to_the_layer_whose_output_it_is(tmp_path):
    def break_it(step, model, x, loss_of):
        if step == 3:
            model[2].forward = lambda x: (x - 100).log()

    watching = nan_run(break_it, out=tmp_path / "a")
    assert (watching.first_nan["step"], watching.first_nan["module"]) == (3, "2")
    assert [frame["module"] for frame in watching.first_nan["frames"]][-3:] == ["0", "1", "2"]
    diagnosis = report_of_run(tmp_path / "a")
    assert diagnosis.findings[0].rule == "first_nan"
    assert "Softplus" in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.parametrize("every", [1, 100])
def test_behind_the_first_nan_nothing_is_said_that_follows_from_it(tmp_path, caplog, every):
    def break_it(step, model, x, loss_of):
        return (x * math.nan, loss_of) if step == 8 else None

    with caplog.at_level(logging.INFO, "normkit.watch"):
        nan_run(break_it, steps=12, out=tmp_path / "a", every=every)
    errors = [f.rule for f in report_of_run(tmp_path / "a").findings if f.severity == "error"]
    assert errors[0] == "first_nan"
    assert set(errors) <= {"first_nan", "non_finite_parameters", "non_finite_gradients", "non_finite_statistics"}
    said = [line["rule"] for line in read_lines(tmp_path / "a" / "findings.jsonl") if line["severity"] == "error"]
    assert said[0] == "first_nan"
    assert said.count("first_nan") == 1
    assert set(said) <= set(errors)


def test_the_first_nan_is_traced_to_the_way_back():
    def break_it(step, model, x, loss_of):
        return (x, lambda y, t: (y - y).abs().sqrt().sum()) if step == 2 else None

    first = nan_run(break_it).first_nan
    assert first["step"] == 2
    assert "The forward pass is finite" in first["verdict"]


def test_a_spoilt_weight_is_named():
    def break_it(step, model, x, loss_of):
        if step == 2:
            model[1].weight.data[0] = math.inf

    first = nan_run(break_it).first_nan
    assert "already hold values that are not finite: 1.weight" in first["verdict"]


def test_a_healthy_run_has_no_first_nan():
    assert nan_run(lambda *_: None).first_nan is None


def test_samples_are_spaced_by_what_they_cost():
    spacing = Spacing(every=50, budget=0.02)
    for step in range(1, 1000):
        cost = 0.5 if spacing.due(step) and step == 1 else 0.2 if spacing.due(step) else 0.0
        if cost:
            spacing.sampled(step, cost)
        spacing.stepped(0.1, cost)
    assert spacing.interval == 100  # 0.2 / (0.02 * 0.1)
    assert spacing.told()["share"] == pytest.approx((0.5 + 0.2 * 10) / 99.9, rel=0.01)
    assert Spacing(every=50, budget=None).interval == 50


def test_cheap_samples_are_taken_as_often_as_asked():
    spacing, taken = Spacing(every=10, budget=0.02), []
    for step in range(1, 100):
        if spacing.due(step):
            spacing.sampled(step, 0.001)
            taken.append(step)
        spacing.stepped(0.1, 0.001)
    assert taken == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]


def test_a_long_run_is_thinned_out_with_its_ends():
    assert thinned(list(range(1000)), 5) == [0, 250, 500, 749, 999]
    assert thinned([1, 2], 5) == [1, 2]


def test_numbers_are_fetched_at_once_however_many_layers(monkeypatch):
    """One transfer per sample for all tensors that a step and its forward passes give."""
    fetched = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(self.numel()) or original(self))

    def transfers(depth: int) -> int:
        fetched.clear()
        model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = [n for n, q in QUANTITIES.items() if q.stage in ("batch", "run", "gradients")]
        names = [n for n in names if n not in ("stable_rank", "orthogonality_gap")]
        with watched(model, optimizer, quantities=names):
            model(torch.randn(16, 6)).sum().backward()
            optimizer.step()
        return len(fetched)

    assert transfers(2) == transfers(9) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"budget": 2.0}, "give 0.02 for 2 %"),
        ({"batch": torch.ones(2)}, r"batch= was given without loss_fn="),
        ({"quantities": ["drifft"]}, "no quantity 'drifft'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(options, words):
    model = plain()
    with pytest.raises(ValueError, match=words):
        nk.watch(model, torch.optim.Adam(model.parameters()), out=None, **options)


def test_an_optimizer_in_a_wrapper_is_found():
    inner = torch.optim.SGD(plain().parameters(), lr=0.1)
    wrapper = type("Wrapper", (), {"optimizer": inner})()
    assert torch_optimizer(wrapper) is inner
    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer"):
        torch_optimizer(object())


def _two(rank: int, directory: str) -> None:
    from torch.nn.parallel import DistributedDataParallel

    left = {}
    for watch in (False, True):
        torch.manual_seed(5)
        model = DistributedDataParallel(dropout_and_batch_norm(nk.SyncBatchNorm if watch is None else nn.BatchNorm1d))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watching = nk.watch(model, optimizer, every=2, out=f"{directory}/a", budget=0.5) if watch else None
        torch.manual_seed(10 + rank)
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6) + rank), torch.randint(3, (8,))).backward()
            optimizer.step()
        left[watch] = {**model.module.state_dict(), "random": torch.get_rng_state()}
        if watching is not None:
            steps = torch.tensor([float(watching.spacing.next)])
            every = [torch.zeros(1) for _ in range(2)]
            dist.all_gather(every, steps)
            assert every[0] == every[1]  # the processes agree on the next sample
            assert (watching.directory is not None) == (rank == 0)
            watching.close()
    assert different(left[False], left[True]) == []


@pytest.mark.slow
def test_two_processes_agree_and_the_first_one_writes(tmp_path):
    spawn(2, tmp_path, _two, str(tmp_path))
    diagnosis = report_of_run(tmp_path / "a")
    assert diagnosis.run["processes"] == 2
    spread = [r for r in diagnosis.readings if r.quantity == "rank_spread"]
    assert {r.module for r in spread} == {"1"}
    assert all(r.value > 0.01 for r in spread)  # their inputs are one apart
    assert "Processes" in (tmp_path / "a" / "report.html").read_text()


def _apart(rank: int, directory: str) -> None:
    """Each process has data of its own kind; how they are cured is in the name of the run."""
    from torch.nn.parallel import DistributedDataParallel

    for how in ("plain", "synchronised"):
        torch.manual_seed(5)
        inner = dropout_and_batch_norm()
        if how == "synchronised":
            nk.sync_(inner)
        model = DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(10 + rank)
        with nk.watch(model, optimizer, every=1, out=f"{directory}/{how}", budget=None):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(16, 6) + 5 * rank), torch.randint(3, (16,))).backward()
                optimizer.step()
        norm, means = inner[1], [torch.zeros(8) for _ in range(2)]
        dist.all_gather(means, norm.running_mean)
        if rank == 0:
            spread = ((means[0] - means[1]).abs() / (norm.running_var + norm.eps).sqrt()).max()
            told = [r.value for r in report_of_run(f"{directory}/{how}").readings if r.quantity == "rank_spread"]
            assert told[-1] == pytest.approx(float(spread), rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_processes_whose_statistics_differ_are_found_in_a_real_run_and_synchronised_ones_are_not(tmp_path):
    spawn(2, tmp_path, _apart, str(tmp_path))
    found = {how: report_of_run(tmp_path / how) for how in ("plain", "synchronised")}
    (finding,) = (f for f in found["plain"].findings if f.rule == "ranks_differ")
    assert finding.modules == ("1",)
    assert finding.measured > 0.1
    rules = {f.rule for f in found["synchronised"].findings}
    assert "ranks_differ" not in rules
    assert max(r.value for r in found["synchronised"].readings if r.quantity == "rank_spread") < 1e-5


def _writes_as_autograd_sees_it(model: nn.Module) -> None:
    """DistributedDataParallel._sync_buffers as it was before torch 2.13."""
    with torch.no_grad():
        model._assign_modules_buffers()
        model._sync_module_buffers(0)


def _twice(rank: int, directory: str) -> None:
    """A siamese loss: two forward passes, one backward pass."""
    from torch.nn.parallel import DistributedDataParallel

    installed = DistributedDataParallel._sync_buffers
    for how, norm, sync in (
        ("torch", nn.BatchNorm1d, _writes_as_autograd_sees_it),
        ("as it is installed", nn.BatchNorm1d, installed),
        ("normkit", nk.BatchNorm1d, _writes_as_autograd_sees_it),
    ):
        DistributedDataParallel._sync_buffers = sync
        torch.manual_seed(5)
        model = DistributedDataParallel(dropout_and_batch_norm(norm))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with nk.watch(model, optimizer, every=1, out=f"{directory}/{how}", budget=None) as watching:
            for _ in range(3):
                optimizer.zero_grad()
                x = torch.randn(16, 6)
                loss = F.mse_loss(model(x), model(x + 0.1 * torch.randn(16, 6)))
                if how == "torch":
                    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                        loss.backward()
                    break  # as it ends a training
                loss.backward()
                optimizer.step()
        assert watching.steps == (0 if how == "torch" else 3)


@pytest.mark.slow
def test_two_forward_passes_before_a_backward_pass_are_found_in_the_run_that_they_end(tmp_path):
    spawn(2, tmp_path, _twice, str(tmp_path))
    rules = {
        how: [f.rule for f in report_of_run(tmp_path / how).findings]
        for how in ("torch", "as it is installed", "normkit")
    }
    assert rules["torch"][0] == "forward_twice_before_backward"
    assert "2 forward passes for" in report_of_run(tmp_path / "torch").findings[0].claim
    assert "forward_twice_before_backward" not in rules["as it is installed"] + rules["normkit"]


def test_a_run_knows_what_stands_around_its_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nk.watch(model, optimizer, every=1, out=None, budget=None) as watched:
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    assert "bias_before_norm" in {finding.rule for finding in watched.diagnose().findings}
