"""The page: the same numbers in HTML, Markdown and JSON, one self-contained file, the same bytes every time."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import synthetic_runs as synthetic
from normkit import report
from normkit.cli import main
from normkit.cli.report import following, terminal_tables
from normkit.lab.analyse import analyse
from normkit.report import html, markdown
from normkit.report.page import document
from normkit.report.plots.canvas import ARMS, colours
from normkit.report.words import verdict
from synthetic_runs import Script

PACKAGE = Path(report.__file__).parent
ROOT = PACKAGE.parent


class Page(HTMLParser):
    """What the tests ask of the page: tables as text, ids, addresses, tags, headings, text alternatives."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        if "id" in given:
            self.ids.append(given["id"])
        self.references += [given[key] for key in ("src", "href") if key in given]
        self.references += re.findall(r"url\(([^)]+)\)", " ".join(value or "" for _, value in attributes))
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "svg":
            self.pictures.append(given)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = []
        if tag in ("details", "section", "table", "figure", "div", "p", "ul", "svg", "g", "pre"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)


def markdown_tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [re.sub(r"\\(.)", r"\1", cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            cells = [cell.strip() for cell in cells]
            if not inside:
                tables.append([])
            if not all(re.fullmatch(r"-+:?", cell) for cell in cells):
                tables[-1].append(cells)
        inside = line.startswith("| ")
    return tables


def scripts() -> dict[str, Script]:
    none = Script([1000, 1200, None, 1100, 1300, 900], test=[0.93, 0.94, 0.92, 0.93, 0.95, 0.93], lr=3.0, usable=(1, 3))
    none.states = ["done", "done", "diverged", "done", "done", "done"]
    batch = Script([100, 80, 90, 110, 100, 70], test=[0.97, 0.98, 0.97, 0.96, 0.97, 0.98], lr=1.0, diverges_above=99)
    rms = Script([None] * 5 + [1900], states=["done", "failed", "done", "done", "done", "done"], bound_hit="low")
    layer = Script(
        [300, 500, 400, 450, 350, 300], ms=0.9, fields={"dead_units": 0.12, "variance_ratio": {"norms.0": 1.2}}
    )
    return {"none": none, "batch": batch, "layer+dropout:0.2": layer, "rms": rms}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = synthetic.directory(tmp_path_factory.mktemp("page") / "digits", scripts())
    analyse(path)
    report.write(path)
    return path


@pytest.fixture(scope="module")
def page(digits):
    return Page((digits / "report.html").read_text())


def test_sections_are_in_the_order_of_the_issue(page):
    assert page.sections == (
        ["answer", "table", "learning", "rates", "inside", "cost", "runs", "methods", "environment"]
    )


def test_html_and_markdown_have_the_same_tables(digits, page):
    theirs = markdown_tables((digits / "report.md").read_text())
    assert len(page.tables) > 8
    ours = sorted(page.tables, key=str)
    assert ours == sorted(theirs, key=str)


def test_all_three_say_the_same_answer(digits):
    summary = json.loads((digits / "summary.json").read_text())
    text = re.sub(r"<[^>]+>", "", (digits / "report.html").read_text()).replace("\N{NO-BREAK SPACE}", " ")
    plain = re.sub(r"\\(.)", r"\1", (digits / "report.md").read_text())
    assert verdict(summary) in text
    assert f"**{verdict(summary)}**" in plain


def read_numbers(cell: str) -> list[float]:
    return [float(number.replace("−", "-")) for number in re.findall(r"[−+]?\d+\.?\d*(?:e-?\d+)?", cell)]


def test_the_page_shows_the_numbers_of_the_summary(digits, page):
    """Read back from the page and compared with the JSON, without the code that wrote them."""
    summary = json.loads((digits / "summary.json").read_text())
    header, *rows = page.tables[0]
    assert header[:5] == ["arm", "rate", "steps to target", "fewer steps", "seconds to target"]
    checked = 0
    for arm, row in zip(summary["points"][0]["arms"], rows, strict=True):
        cells = dict(zip(header, row, strict=True))
        assert read_numbers(cells["rate"]) == [arm["lr"]]
        assert read_numbers(cells["steps to target"]) == [m for m in [arm["steps_to_target"]["median"]] if m]
        if "steps_ratio" in arm and arm["steps_ratio"]["value"]:
            for column, key in (("fewer steps", "steps_ratio"), ("less time", "seconds_ratio")):
                shown = [arm[key][end] for end in ("value", "low", "high") if arm[key][end] is not None]
                assert read_numbers(cells[column]) == pytest.approx(shown, rel=0.05)
                checked += len(shown)
            gap = arm["test_difference"]
            assert read_numbers(cells["difference"]) == pytest.approx(
                [100 * gap[end] for end in ("value", "low", "high")], abs=0.051
            )
        test = arm["test"]
        assert read_numbers(cells["test accuracy"]) == pytest.approx(
            [100 * test[end] for end in ("mean", "low", "high")], abs=0.051
        )
    assert checked == 2 * 2 * 2  # two arms, two ratios; value and lower end: a baseline diverged, the upper end is open
    assert sum("no ratio" in row for row in rows) == 1


def test_page_is_one_small_self_contained_file_without_script(digits, page):
    text = (digits / "report.html").read_text()
    assert len(text.encode()) < 2_000_000
    assert "script" not in page.tags
    assert {"link", "img", "iframe", "object", "embed"}.isdisjoint(page.tags)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in text
    assert "@import" not in text


def test_every_reference_inside_the_page_has_its_target_and_ids_are_unique(page):
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_tags_are_balanced(page):
    assert page.open == []


def test_every_picture_has_a_text_alternative(digits, page):
    assert len(page.pictures) >= 10
    text = (digits / "report.html").read_text()
    for picture in page.pictures:
        assert picture["role"] == "img"
        title, description = picture["aria-labelledby"].split()
        assert {title, description} <= set(page.ids)
        assert len(re.search(rf'id="{description}">([^<]*)<', text)[1]) > 40


def test_pictures_follow_the_colours_and_fonts_of_the_page(digits):
    """A colour of the light palette left inside a picture would be wrong on a dark page."""
    body = (digits / "report.html").read_text().partition("</style>")[2]
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []
    assert "var(--arm-0)" in body
    assert "DejaVu" not in body
    assert "<style" not in body


def test_labels_of_axes_keep_their_digits(digits):
    """Coordinates are shortened, labels are not: 0.001 must not become 0.00."""
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", (digits / "report.html").read_text())
    assert "0.01" in labels
    assert not {"0.00", "0.000"} & set(labels)


def test_failures_are_on_the_page_with_their_traceback_escaped(digits):
    text = (digits / "report.html").read_text()
    assert "failed: RMS norm, rate 0.3, seed 1: ValueError: &lt;shape&gt; &amp; size" in text
    assert "File &quot;net.py&quot;, line 3, in forward" in text
    assert "diverged: no normalization, rate 3, seed 2: loss is not finite at step 40" in text


def test_every_run_and_its_command_are_on_the_page(digits, page):
    shown = {row[-1] for table in page.tables for row in table}
    assert {cell.name for cell in (digits / "cells").iterdir()} <= shown
    assert "normkit compare digits" in (digits / "report.md").read_text()


def test_a_rate_on_the_edge_of_the_grid_says_so_in_the_table(digits, page):
    rates = {row[0]: row[1] for row in page.tables[0][1:]}
    assert rates["RMS norm"] == "0.3 (edge)"
    assert rates["batch norm"] == "1"


def test_the_variance_ratio_is_shown_at_each_norm(tmp_path):
    fields = {"variance_ratio": {"1": 0.83, "5": 1.17}}
    arms = {"none": Script([100] * 5), "batch+dropout:0.2": Script([50] * 5, fields=fields)}
    path = synthetic.directory(tmp_path, arms)
    analyse(path)
    tables = Page(report.write(path).read_text()).tables
    (by_norm,) = [table for table in tables if table[0][:2] == ["arm", "norm"]]
    words = "batch norm with dropout 0.2"
    assert by_norm[1:] == [[words, "1", "0.830"], [words, "5", "1.17"]]


def test_arms_with_another_optimizer_have_a_table_like_for_like(tmp_path, digits, page):
    steps = {"none": 600, "batch": 100, "none+adamw": 300, "batch+adamw": 100}
    path = synthetic.directory(tmp_path, {name: Script([count] * 5) for name, count in steps.items()})
    analyse(path)
    tables = Page(report.write(path).read_text()).tables
    (alike,) = [table for table in tables if "against" in table[0]]
    assert alike[1][:3] == ["batch norm with AdamW", "no normalization with AdamW", "3.0× [3.0, 3.0]"]
    assert len(alike) == 2
    assert not any("against" in table[0] for table in page.tables)


def test_the_page_says_where_the_runs_went_on(tmp_path):
    began = {"torch": "2.13.0", "cores": 2}
    changes = {"environment": began, "continued_in": [began | {"torch": "2.14.0"}]}
    path = synthetic.directory(tmp_path, {"none": Script([100] * 5), "batch": Script([50] * 5)}, **changes)
    analyse(path)
    rows = Page(report.write(path).read_text()).tables[-1]
    assert ["continued with other torch", "2.14.0"] in rows
    assert not any("other cores" in row[0] for row in rows)


def test_names_from_the_experiment_are_no_markup(tmp_path):
    path = synthetic.directory(
        tmp_path,
        {"a|b<i>": Script([100] * 5), "c_d*": Script([50] * 5)},
        title="<b>mine</b>",
        description="a & b",
        command="normkit compare 'x<y'",
    )
    analyse(path)
    report.write(path)
    page = Page((path / "report.html").read_text())
    assert {"b", "i"} & set(page.tags) <= {"b", "i"}
    assert "<b>mine</b>" not in (path / "report.html").read_text()
    assert "a|b<i>" in page.tables[0][1][0]
    assert markdown_tables((path / "report.md").read_text())[0][1][0] == "a|b<i>"


def test_arms_have_the_same_colour_everywhere(digits):
    summary = json.loads((digits / "summary.json").read_text())
    index = colours(summary["experiment"])
    assert index == {"none": 0, "batch": 1, "layer+dropout:0.2": 2, "rms": 3}
    text = (digits / "report.html").read_text()
    for name in ("rates-steps", "learning-step", "gradient-start"):
        picture = text[text.index(f'aria-labelledby="{name}-title') :].partition("</svg>")[0]
        assert {f"--arm-{k}" for k in range(3)} <= set(re.findall(r"--arm-\d", picture))


def test_more_arms_than_colours_repeat_the_colours_but_not_the_baselines(tmp_path):
    names = ["none", *(f"group:{2**k}" for k in range(9))]
    about = {"arms": [{"name": name} for name in names], "baseline": "none"}
    index = colours(about)
    assert all(0 < index[name] < len(ARMS) for name in names[1:])


def test_sweep_page(tmp_path):
    rows = {
        value: {
            "none": Script([400, 410, 390, 420, 405], fields={"dead_units": 0.1}),
            "batch": Script(steps, fields={"dead_units": 0.02, "variance_ratio": {"0": 1.0 + value}}),
        }
        for value, steps in {0.0: [100, 110, 90, 95, 105], 0.2: [50] * 5, 0.5: [None] * 5}.items()
    }
    path = synthetic.sweep(tmp_path, "dropout", rows)
    analyse(path)
    report.write(path)
    page = Page((path / "report.html").read_text())
    assert page.sections[2] == "sweep"
    text = (path / "report.html").read_text()
    for name in ("steps", "seconds", "fewer", "less", "test", "cost", "dead", "variance"):
        assert f'aria-labelledby="sweep-{name}-title' in text
    assert len(page.tables[0]) == 1 + 3 * 2
    assert sorted(page.tables, key=str) == sorted(markdown_tables((path / "report.md").read_text()), key=str)
    assert len(page.ids) == len(set(page.ids))
    assert len(text) < 2_000_000


def test_statistics_at_test_time_and_processor_time_are_shown_where_they_were_measured(tmp_path):
    measured = {"test_exact": 0.98, "test_batch": 0.9, "cpu_seconds": 0.4}
    rows = {
        size: {"none": Script([400] * 5, fields={"cpu_seconds": 0.2}), "batch": Script([100] * 5, fields=measured)}
        for size in (2, 8)
    }
    path = synthetic.sweep(tmp_path, "batch-size", rows)
    summary = analyse(path)
    found = summary["points"][0]["arms"][1]
    assert found["test_exact"]["difference"]["value"] == pytest.approx(0.02)
    assert found["test_batch"]["difference"]["verdict"] == "worse"
    assert found["cpu_ms_per_step"] == pytest.approx(1e3 * 0.4 / synthetic.STEPS)
    assert summary["points"][0]["arms"][0]["test_exact"] is None
    text = report.write(path).read_text()
    assert "at-test" in Page(text).sections
    assert 'aria-labelledby="sweep-exact-title' in text
    page = (path / "report.md").read_text()
    assert "98.0 % [98.0, 98.0] (+2.0 points [+2.0, +2.0])" in page
    assert "CPU ms per step" in page
    report.picture(path, tmp_path / "one.svg")
    assert report.picture(path, tmp_path / "two.svg").read_bytes() == (tmp_path / "one.svg").read_bytes()


def test_a_record_from_before_that_has_no_such_section(digits):
    page = Page(report.write(digits).read_text())
    assert "at-test" not in page.sections
    assert "CPU ms per step" not in (digits / "report.md").read_text()


@pytest.mark.slow
def test_long_sweep_stays_small(tmp_path):
    rows = {value: {"none": Script([400]), "batch": Script([100])} for value in range(1, 16)}
    path = synthetic.sweep(tmp_path, "depth", rows)
    analyse(path)
    text = report.write(path).read_text()
    assert len(text.encode()) < 2_000_000
    assert "7 of the 15 values are drawn; summary.json holds all." in text
    assert {"depth 1", "depth 15"} <= set(re.findall(r"<summary>(depth \d+)</summary>", text))
    assert len(Page(text).tables[0]) == 1 + 15 * 2


@pytest.mark.parametrize(
    "arms",
    [
        {"none": Script([None] * 3), "batch": Script([None] * 3)},
        {"none": Script([500])},
        {"none": Script([None] * 3, states=["failed"] * 3), "batch": Script([None] * 3, states=["diverged"] * 3)},
    ],
)
def test_a_page_can_be_made_of_poor_results(tmp_path, arms):
    path = synthetic.directory(tmp_path, arms)
    analyse(path)
    assert Page(report.write(path).read_text()).sections[0] == "answer"
    report.picture(path, tmp_path / "picture.png")


def test_a_page_can_be_made_before_anything_has_run(tmp_path):
    synthetic.write(tmp_path / "experiment.json", synthetic.experiment(["none", "batch"], 3))
    analyse(tmp_path)
    text = report.write(tmp_path).read_text()
    assert "no final run has finished yet" in text
    assert "No finished run has recorded this yet." in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(digits, tmp_path, ending):
    first = report.picture(digits, tmp_path / f"one.{ending}").read_bytes()
    assert first == report.picture(digits, tmp_path / f"two.{ending}").read_bytes()
    assert first.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(first) > 20_000


def test_picture_of_another_kind_is_refused(digits, tmp_path):
    with pytest.raises(ValueError, match=r"written as \.png or \.svg, not as '\.jpg'"):
        report.picture(digits, tmp_path / "one.jpg")


def test_write_without_a_summary_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"no summary\.json; `normkit report .*` computes it"):
        report.write(tmp_path)


def test_made_twice_it_has_the_same_bytes(digits):
    before = (digits / "summary.json").read_bytes()
    analyse(digits)
    assert (digits / "summary.json").read_bytes() == before
    summary = json.loads((digits / "summary.json").read_text())
    page = document(summary)
    assert html.render(page) == (digits / "report.html").read_text()
    assert markdown.render(page) == (digits / "report.md").read_text()


# --- without torch


def modules(*rooms: Path) -> list[Path]:
    return sorted(file for room in rooms for file in room.rglob("*.py"))


@pytest.mark.parametrize(
    "path", modules(PACKAGE, ROOT / "lab" / "analyse"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_of_the_report_names_torch(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] == "torch" for name in names)


WITHOUT_TORCH = """
import importlib.abc, sys, types
from pathlib import Path

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("this machine has no torch")

sys.meta_path.insert(0, Refuse())
for name in ("normkit", "normkit.lab"):  # their own __init__ is for machines that train
    package = types.ModuleType(name)
    package.__path__ = [str(Path(sys.argv[1], *name.split(".")[1:]))]
    sys.modules[name] = package

from normkit.lab.analyse import analyse
from normkit.report import write
analyse(sys.argv[2])
print(write(sys.argv[2]))
"""


def test_the_same_page_is_made_on_a_machine_without_torch(digits, tmp_path):
    before = (digits / "report.html").read_bytes()
    (digits / "report.html").unlink()
    (digits / "summary.json").unlink()
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(ROOT), str(digits)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (digits / "report.html").read_bytes() == before


# --- normkit report DIR


def test_command_makes_everything_from_the_cells_alone(digits, tmp_path, capsys):
    before = (digits / "report.html").read_bytes()
    for name in ("report.html", "report.md", "summary.json"):
        (digits / name).unlink()
    assert main(["report", str(digits), "--picture", str(tmp_path / "p.png")]) == 0
    assert (digits / "report.html").read_bytes() == before
    assert (tmp_path / "p.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == verdict(json.loads((digits / "summary.json").read_text()))
    assert {f"page: {digits / 'report.html'}", f"picture: {tmp_path / 'p.png'}"} <= set(lines)
    assert lines[-1] == "next: normkit compare digits --thorough"
    assert any(line.startswith("batch norm") and "13×" in line for line in lines)


def test_a_record_that_kept_only_its_summary_gets_the_same_page(digits, tmp_path, capsys):
    summary = (digits / "summary.json").read_bytes()
    (tmp_path / "summary.json").write_bytes(summary)
    assert main(["report", str(tmp_path), "--picture", str(tmp_path / "p.svg")]) == 0
    assert capsys.readouterr().out.startswith(verdict(json.loads(summary)))
    assert (tmp_path / "report.html").read_bytes() == (digits / "report.html").read_bytes()
    assert (tmp_path / "summary.json").read_bytes() == summary
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == json.loads(summary)["points"]


def test_command_prints_json(digits, capsys):
    assert main(["report", str(digits), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["answer"] == verdict(printed)
    assert printed["points"] == json.loads((digits / "summary.json").read_text())["points"]


def test_table_is_split_where_the_terminal_is_narrow(digits, monkeypatch):
    summary = json.loads((digits / "summary.json").read_text())
    assert len(terminal_tables(summary)) == 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = terminal_tables(summary)
    assert [column.header for part in narrow for column in part.columns].count("arm") == 2
    monkeypatch.setenv("COLUMNS", "200")
    assert len(terminal_tables(summary)) == 1


@pytest.mark.parametrize(
    ("budget", "command", "words"),
    [
        ("quick", "normkit compare digits --quick --out 'my runs' --seeds 3", "normkit compare digits --seeds 3"),
        ("quick", "normkit compare digits --quick --out=here", "normkit compare digits"),
        ("default", "normkit compare digits", "normkit compare digits --thorough"),
        ("thorough", "normkit compare digits --thorough", "normkit report runs/a --picture runs/a/picture.png"),
        ("default", "normkit.lab.compare('digits')", "normkit report runs/a --picture runs/a/picture.png"),
    ],
)
def test_command_names_the_next_one(digits, budget, command, words):
    summary = json.loads((digits / "summary.json").read_text())
    summary["experiment"] |= {"budget": budget, "command": command}
    assert following(summary, Path("runs/a")) == words
    summary["points"][0]["arms"][0]["runs"]["unfinished"] = 1
    assert following(summary, Path("runs/a")) == (command if command.startswith("normkit compare") else words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["."], "no experiment.json"),
        (["{digits}", "--picture", "p.bmp"], "written as .png or .svg, not as '.bmp'"),
    ],
)
def test_command_has_one_clear_error(digits, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *(argument.format(digits=digits) for argument in arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors
    assert "Traceback" not in errors
