"""The page of a diagnosis: sections in their order, every word escaped, one small file that asks for nothing else."""

from __future__ import annotations

import builtins
import html
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import normkit as nk
from normkit.report import diagnosis_page, layer_table, run_sections
from normkit.report.glossary import TERMS
from normkit.report.plots.heat import _scale, heat_map
from normkit.vocabulary.finding import Finding
from normkit.vocabulary.prescription import Prescription
from normkit.watching.quantities import ALL

EVIL = '<script>alert("x")</script> & $x_1$'


class Page(HTMLParser):
    """Tags, headings and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        known = dict(attributes)
        self.addresses += [value for key, value in attributes if key in ("href", "src", "xlink:href")]
        self.ids += [known["id"]] if "id" in known else []
        if tag in ("h2", "h3"):
            self._open.append("")

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3"):
            self.headings.append(self._open.pop())


def reading(quantity: str, value: Any, module: str = "", step: int | None = None) -> dict[str, Any]:
    return {"quantity": quantity, "value": value, "module": module, "step": step, "unit": ""}


def finding(**changes: Any) -> dict[str, Any]:
    cure = Prescription("statistics are estimated anew", "1.bn", "they lag behind", "train_identical", "", "calibrate_")
    made = Finding(
        "stale", "error", "the running mean is off by 3.2", ("1.bn",), "mean_drift", 3.2, 0.1, "a paper", 101
    )
    plain = asdict(made) | {"prescriptions": [asdict(cure) | {"code": cure.code}], "check": "nk.diagnose(model)"}
    return plain | changes


def data(layers: int = 3, steps: int = 12, run: bool = True, **changes: Any) -> dict[str, Any]:
    """As Diagnosis.to_json has it."""
    draw = random.Random(0)
    names, readings = [f"{index}.bn" for index in range(layers)], []
    for name in names:
        readings += [reading("kind", "batch_norm", name), reading("values_per_channel", 128.0, name)]
    for step in range(1, 10 * steps, 10) if run else ():
        for quantity, value in (("loss_training", 1.0), ("loss_running", 2.0), ("loss_batch_statistics", 1.1)):
            readings.append(reading(quantity, value * draw.uniform(0.9, 1.1), "", step))
        for name in names:
            readings += [reading("mean_drift", draw.uniform(0.01, 2), name, step)]
            readings += [reading("activation_std", draw.uniform(0.5, 2), name, step)]
            readings += [reading("update_to_weight", 10 ** draw.uniform(-4, -2), f"{name}.weight", step)]
            readings += [reading("rank_spread", draw.uniform(0, 0.2), name, step)]
    frame = {"module": "1.bn", "class": "BatchNorm2d", "what": "output", "least": 0.0, "greatest": 3e38, "nonfinite": 2}
    facts = {
        "name": "a",
        "steps": 10 * steps,
        "samples": steps,
        "overhead": {"share": 0.0132, "sample_ms": 12.0, "interval": 50, "step_ms": 18.5},
        "first_nan": {"step": 11, "module": "1.bn", "verdict": "1.bn gives the first NaN.", "frames": [frame]},
    }
    return {
        "schema": 1,
        "verdict": "1 error: the running mean is off by 3.2",
        "counts": {"error": 1, "warning": 0, "note": 0},
        "model": {"class": "ResNet", "parameters": 1234, "norms": layers},
        "findings": [finding()],
        "readings": readings,
        "not_asked": {"needs_a_loss": "it takes a loss"},
        "environment": {"torch": "2.13.0"},
        "run": facts if run else None,
        **changes,
    }


def test_the_sections_of_a_run_come_in_their_order():
    page = Page(diagnosis_page.page(data()))
    sections = [
        "answer",
        "findings",
        "statistics",
        "layers",
        "maps",
        "updates",
        "ranks",
        "first-nan",
        "appendix",
    ]
    assert [name for name in page.ids if name in sections] == sections
    assert page.headings[2] == "The running mean is off by 3.2"


def test_it_is_one_file_without_script_that_asks_for_nothing():
    page = Page(diagnosis_page.page(data()))
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert len(page.ids) == len({*page.ids})
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= {*page.ids}


@pytest.mark.slow
def test_a_long_run_of_a_deep_network_stays_below_two_megabytes():
    assert len(diagnosis_page.page(data(layers=150, steps=200)).encode()) < 2_000_000


def test_every_word_from_outside_is_escaped():
    readings = [reading("mean_drift", float(step), EVIL, step) for step in range(4)]
    readings += [reading("loss_training", 1.0, "", step) for step in range(4)]
    evil = finding(
        claim=EVIL, modules=[EVIL], rule=EVIL, check=EVIL, source=EVIL, prescriptions=[{"action": EVIL, "code": EVIL}]
    )
    facts = data()["run"] | {"name": EVIL}
    text = diagnosis_page.page(
        data(
            verdict=EVIL,
            findings=[evil],
            readings=readings,
            model={"class": EVIL},
            environment={EVIL: EVIL},
            not_asked={EVIL: EVIL},
            run=facts,
        )
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 8
    assert "script" not in Page(text).tags


def test_a_finding_has_its_number_its_place_its_curve_and_its_cure():
    text = diagnosis_page.page(data())
    assert "Measured: mean_drift 3.2; threshold 0.1 (a paper)." in text
    assert "error: stale, in 1.bn, at step 101" in text
    assert html.escape(finding()["prescriptions"][0]["code"]) in text
    assert 'id="finding-0-line-title"' in text
    assert "dashed: the threshold 0.1" in text
    assert "It computes the same in training; evaluation changes." in text


def test_severity_is_said_in_words_beside_the_colour():
    text = diagnosis_page.page(data())
    assert '<i class="chip" style="--c:var(--arm-2)"></i>1 error</td>' in text


def test_a_diagnosis_of_one_batch_has_a_table_where_a_run_has_curves():
    readings = [reading("loss_training", 1.0), reading("loss_running", 2.5), reading("train_eval_gap", 0.7)]
    page = Page(text := diagnosis_page.page(data(run=False, readings=readings)))
    assert "svg" not in page.tags
    assert not {"maps", "updates", "ranks", "first-nan"} & {*page.ids}
    assert "<td>running statistics</td>" in text
    assert ">2.5<" in text


def test_markdown_tells_the_same_numbers():
    text = diagnosis_page.text(data())
    assert "threshold 0.1" in text
    assert "1.bn gives the first NaN." in text
    assert "| 1.bn | batch\\_norm | 1 error | 128 |" in text


def test_without_matplotlib_the_words_and_tables_stay(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    for name in [n for n in sys.modules if n.startswith(("matplotlib", "normkit.report.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    page = Page(text := diagnosis_page.page(data()))
    assert "svg" not in page.tags
    assert "matplotlib is not installed" in text
    assert "Measured: mean_drift 3.2" in text


def test_one_scale_for_all_layers_and_what_is_not_finite_stands_out():
    values = {("a", 1): 1.0, ("a", 2): 100.0, ("b", 1): 0.0, ("b", 2): math.nan}
    figure = heat_map("Drift", "σ", ["a", "b"], [1, 2], values, "map")
    assert "from 0 to 100 σ; 1 values are not finite (orange)" in figure.alternative
    assert type(_scale([0.0, 1.0, 100.0])).__name__ == "LogNorm"
    assert type(_scale([1.0, 2.0])).__name__ == "Normalize"
    assert type(_scale([-1.0, 200.0])).__name__ == "Normalize"


def test_the_page_of_a_real_diagnosis(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    path = nk.diagnose(model, torch.randn(4, 3, 8, 8)).to_html(tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "no_running_statistics" in path.read_text(encoding="utf-8")
    assert {"answer", "findings", "layers", "appendix"} <= {*page.ids}


def test_every_quantity_and_word_on_the_page_is_in_its_glossary(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    batch = torch.randn(4, 3, 8, 8), torch.randn(4, 8, 6, 6)
    found = nk.diagnose(model, batch, nn.functional.mse_loss)
    data = found.to_json()
    assert {*data["quantities"]} == {reading.quantity for reading in found.readings}
    text = diagnosis_page.page(data)
    for name, known in data["quantities"].items():
        assert known == {field: getattr(ALL[name], field) for field in ("means", "formula", "unit", "paper", "per")}
        assert html.escape(name.replace("_", " ")) in text
        assert html.escape(known["means"] or known["formula"][1:], quote=False) in text
        assert html.escape(known["paper"]) in text
    layers = {
        word
        for column in (*layer_table.NORMS, *layer_table.ACTIVATIONS)
        for word in ("σ", "γ", "ε")
        if word in column.header
    }
    assert layers <= {*TERMS}
    assert {f"loss_{way}" for way in ("training", "running", "batch_statistics")} <= {*data["quantities"]}
    assert {*run_sections.LOSSES.values()} <= {*TERMS}


def test_the_page_shows_no_quantity_that_nobody_measures():
    assert {quantity for quantity, *_ in run_sections.MAPS} <= {*ALL}
    assert {*layer_table.OF_A_NORM} <= {*ALL}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_it(tmp_path):
    """Chromium lays the page out and finds nothing to complain of; every section has its place, one under the other."""
    measuring = """<script>document.title = JSON.stringify([...document.querySelectorAll('section')].map(
      s => [s.id, Math.round(s.getBoundingClientRect().top), document.body.scrollWidth <= innerWidth]))</script>"""
    path = tmp_path / "page.html"
    path.write_text(diagnosis_page.page(data()).replace("</body>", f"{measuring}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,900", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    places = json.loads(html.unescape(shown.partition("<title>")[2].partition("</title>")[0]))
    tops = [top for _, top, _ in places]
    assert [name for name, _, _ in places][:2] == ["answer", "findings"]
    assert tops == sorted(tops)
    assert len({*tops}) == len(tops) == 9
    assert all(fits for *_, fits in places)
