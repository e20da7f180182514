"""The task `gan`: who steps, what is measured, by hand, what a run leaves behind, and that a killed one goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

import normkit as nk
from normkit.lab import LabError
from normkit.lab.adversarial import digit_features, ring
from normkit.lab.adversarial.gallery import density, moments, tiled
from normkit.lab.adversarial.networks import Adversaries, take_step
from normkit.lab.adversarial.quality import Modes, frechet_distance
from normkit.lab.arm import parse_arm
from normkit.lab.build import build_model, build_optimizer
from normkit.lab.cell import Cell
from normkit.lab.load import Source
from normkit.lab.norm_layer import norms_of
from normkit.lab.tasks.gan import ARMS
from normkit.lab.tasks.samples import digits
from normkit.lab.train import train
from normkit.lab.worker import seeded_data


def task(data: str = "ring"):
    return Source("gan").load({"data": data, "width": 16})


def network(arm: str, data: str = "ring") -> Adversaries:
    return build_model(task(data), parse_arm(arm), 3)[0]


@pytest.mark.parametrize("data", ["ring", "digits"])
def test_arms_differ_in_what_they_name_and_start_from_the_same_weights(data):
    built = {arm: build_model(task(data), parse_arm(arm), 3) for arm in ARMS}
    assert len({drawn for _, drawn in built.values()}) == 1
    sides = {arm: {name.partition(".")[0] for name in norms_of(model)} for arm, (model, _) in built.items()}
    assert sides["none"] == sides["batch"] == {"generator", "discriminator"}
    assert sides["batch+side:generator"] == sides["batch:virtual+side:generator"] == {"generator"}
    assert sides["batch+side:discriminator"] == {"discriminator"}
    (spectral, _), (mixed, _) = built[ARMS[-1]], built["batch+side:discriminator+statistics:mixed"]
    for layer in spectral.discriminator.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.05)
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in spectral.generator.modules())
    assert mixed.mixed
    assert not built["batch"][0].mixed


@pytest.mark.parametrize(("arm", "words"), [
    ("batch+side:left", "side:left is unknown.*generator, discriminator, both"),
    ("none+spectral:generators", "spectral:generators is unknown.*generator"),
    ("batch+statistics:shared", "statistics:shared is unknown.*separated, mixed"),
    ("batch+processes:2", "gan takes its steps by itself; leave processes:2 out"),
])  # fmt: skip
def test_an_arm_that_cannot_be_is_refused(arm, words):
    with pytest.raises(LabError, match=words):
        network(arm)


def test_data_that_is_not_known_is_refused():
    with pytest.raises(LabError, match="gan with data 'rings'; choose ring or digits"):
        task("rings")


@pytest.mark.parametrize("arm", ["batch", "batch+statistics:mixed"])
def test_a_step_is_two_descents_by_hand(arm):
    """With plain SGD: the discriminator against a fixed generator, then the generator against the new discriminator."""
    model, rate, F = network(arm), 0.1, nn.functional
    twin = network(arm)
    noise, real = torch.zeros(6, ring.NOISE), torch.randn(6, 2)
    torch.manual_seed(5)
    loss = take_step(model, torch.optim.SGD(model.parameters(), rate), noise, real)
    torch.manual_seed(5)
    fake = twin.generator(torch.randn(6, ring.NOISE))

    def logits(samples):
        if twin.mixed:
            return twin.discriminator(torch.cat([real, samples])).split(6)
        return twin.discriminator(real), twin.discriminator(samples)

    of_real, of_fake = logits(fake.detach())
    expected = -F.logsigmoid(of_real).mean() - F.logsigmoid(-of_fake).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for part, target in (
        (twin.discriminator, lambda: expected),
        (twin.generator, lambda: -F.logsigmoid(logits(fake)[1]).mean()),
    ):
        parameters = list(part.parameters())
        gradients = torch.autograd.grad(target(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    for mine, by_hand in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, by_hand, atol=1e-6)


def test_samples_of_virtual_batch_norm_do_not_know_each_other():
    z = torch.randn(5, ring.NOISE)
    for arm, alone in (("batch:virtual+side:generator", True), ("batch+side:generator", False)):
        model = network(arm)
        assert torch.allclose(model(z)[:2], model(z[:2]), atol=1e-5) == alone


def test_the_frechet_distance_is_that_of_the_textbook():
    torch.manual_seed(0)
    first, second = torch.randn(40, 5) @ torch.randn(5, 5), 1 + torch.randn(60, 5) @ torch.randn(5, 5)
    a, b = first.double().T.cov().numpy(), second.double().T.cov().numpy()
    expected = (first.double().mean(0) - second.double().mean(0)).square().sum() + (
        a + b - 2 * sqrtm(a @ b).real
    ).trace()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert math.isnan(frechet_distance(first, torch.full((3, 5), math.nan)))


def test_modes_are_counted_as_their_rule_says():
    centres = ring.centres()
    near = centres + 0.1 * torch.tensor([1.0, 0.0])
    assert ring.nearest_mode(near).tolist() == list(range(8))
    assert ring.nearest_mode(centres * 1.2).tolist() == [-1] * 8
    assert ring.nearest_mode(torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, 0.0]])).tolist() == [-1] * 3
    modes = Modes(8, ring.nearest_mode)
    one, half = centres[:1].expand(100, 2), centres[:4].repeat(25, 1)
    assert (modes.covered(one), modes.overlap(one)) == (1, pytest.approx(1 / 8))
    assert (modes.covered(half), modes.overlap(half)) == (4, pytest.approx(1 / 2))
    lost = torch.cat([half[:50], torch.zeros(50, 2)])
    assert float(modes.shares(lost).sum()) == pytest.approx(1 / 2)
    stray = torch.cat([half[:98], centres[5:6], centres[6:7]])  # one in a hundred is less than a fifth of an eighth
    assert modes.covered(stray) == 4


def test_the_ring_is_what_it_says():
    data = ring.data(4)
    points = data.test.first(10**4)[1]
    modes = ring.nearest_mode(points)
    assert 0.98 < float((modes >= 0).float().mean()) < 0.997
    apart = (points - ring.centres()[modes])[modes >= 0]
    assert float(apart.std()) == pytest.approx(ring.DEVIATION, rel=0.05)
    assert points.equal(ring.data(5).test.first(10**4)[1])
    assert not data.train.first(9)[1].equal(ring.data(5).train.first(9)[1])


def test_the_stored_classifier_has_the_accuracy_that_is_stored_with_it():
    classifier, stored = digit_features.load()
    assert digit_features.accuracy(classifier, digits(None)[0]) == stored > 0.97
    train, _ = digits(None)
    features = classifier.features(digit_features.as_generated(train.x))
    assert torch.allclose(features.mean(0), torch.zeros(16), atol=1e-3)
    assert torch.allclose(features.std(0), torch.ones(16), atol=1e-3)
    assert digit_features.FILE.stat().st_size < 50_000


@pytest.mark.slow
def test_the_classifier_can_be_made_again(tmp_path):
    assert digit_features.write(tmp_path / "again.npz") == pytest.approx(digit_features.load()[1], abs=0.01)


def test_pictures_show_what_is_there():
    assert tiled(torch.arange(16.0).view(16, 1, 1, 1).expand(16, 1, 2, 2)).equal(
        (torch.arange(16.0).view(4, 4) + 1).div(2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    )
    drawn = density(torch.tensor([[1.4, 1.4], [1.4, 1.4], [-1.4, 0.0], [math.nan, 0.0], [9.0, 9.0]]), side=4, reach=1.5)
    assert drawn.nonzero().tolist() == [[0, 3], [1, 0]]  # up is the first row
    assert max(moments(800)) == 800


def cell(arm: str, data: str, steps: int) -> Cell:
    own = task(data)
    return Cell("gan", parse_arm(arm), own.optimizer, 0.01, 0, "final", steps=steps, eval_every=2, batch_size=16,
                target=own.target, threads=1, data="", code="", options={"data": data, "width": 16})  # fmt: skip


@pytest.mark.parametrize(
    ("arm", "data"), [("batch:virtual+side:generator", "ring"), ("batch+side:discriminator", "digits")]
)
def test_a_run_measures_what_it_should(arm, data, tmp_path):
    status = train(cell(arm, data, 4), task(data), seeded_data(task(data), 0), tmp_path)
    assert status["state"] == "done"
    assert list(status["measures"]) == [
        "modes_covered", "high_quality_share", "collapsed", "loss_variance", "real_against_real"
    ]  # fmt: skip
    assert status["measures"]["collapsed"] is True  # nothing is learnt in four steps
    assert status["test_exact"] is status["test_batch"] is None  # no statistic of a training batch is in its evaluation
    assert [step for step, _ in status["pictures"]["at"]] == sorted(moments(4))
    better = task(data).metric.better
    assert better(status["measures"]["real_against_real"], status["test"])


def test_a_generators_running_statistics_are_looked_at(tmp_path):
    status = train(cell("batch", "ring", 4), task(), seeded_data(task(), 0), tmp_path)
    assert status["test_exact"] is not None


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    class Killed(Exception):
        pass

    def kill(step):
        if step.number == 5:
            raise Killed

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    asked, data = cell("batch+side:generator", "ring", 8), seeded_data(task(), 0)
    for place in (whole, broken):
        place.mkdir()
    expected = train(asked, task(), data, whole)
    deadly = replace(task(), between_steps=[*task().between_steps, kill])
    with pytest.raises(Killed):
        train(asked, deadly, data, broken, checkpoint_seconds=0)
    found = train(asked, replace(task(), between_steps=[*task().between_steps, lambda step: None]), data, broken)
    for key in ("test", "best_validation", "measures", "pictures"):
        assert found[key] == expected[key]
    lines = [(place / "metrics.jsonl").read_text().splitlines() for place in (whole, broken)]
    untimed = lambda line: {key: value for key, value in json.loads(line).items() if key != "seconds"}
    assert [*map(untimed, lines[0])] == [*map(untimed, lines[1])]


def test_options_of_an_optimizer_are_the_tasks_and_not_an_arms():
    own, model = task(), network("none")
    assert build_optimizer(own, parse_arm("none"), model, 0.1).defaults["betas"] == (0.5, 0.999)
    assert build_optimizer(own, parse_arm("none+momentum"), model, 0.1).defaults["momentum"] == 0.9
    assert isinstance(nk.create("batch:virtual", 3, dim=1).statistics, nk.statistics.Virtual)


@pytest.mark.slow
def test_a_comparison_has_the_pictures_and_the_docs_have_its_answers(tmp_path):
    from normkit.lab import compare
    from normkit.lab.analyse.against import against, final_runs
    from normkit.report import adversarial

    result = compare(
        "gan", arms="none, batch+side:generator, none+spectral:discriminator", budget="quick", seeds=2, steps=4,
        batch_size=16, parallel="1", out=tmp_path, options={"width": 16},
    )  # fmt: skip
    page, text = result.page.read_text(), (tmp_path / "report.md").read_text()
    assert "data:image/png;base64" in page
    assert "Generated samples over training" in page
    assert "| modes covered | high quality share | collapsed | loss variance | real against real |" in text
    assert "Final runs that collapse: no normalization in 2 of 2" in text
    summary = result.summary
    gaps = {(arm, other): against(other, final_runs(summary), arm, True) for arm, other in adversarial.pairs(summary)}
    assert set(gaps) == {
        ("batch+side:generator", "none"),
        ("none+spectral:discriminator", "none"),
        ("none+spectral:discriminator", "batch+side:generator"),
    }
    rows = adversarial.table(summary).rows
    assert [row[0] for row in rows] == [
        "No normalization", "Batch norm in the generator", "Spectral norm in the discriminator", "Real against real"
    ]  # fmt: skip
    helps, spectral = adversarial.sentences(summary, gaps)
    assert helps.startswith("**In which of the two networks does batch norm help?** Batch norm in the generator is ")
    assert "; 2 of 2 runs collapse)" in helps
    assert spectral.count("Spectral norm in the discriminator is ") == 2
