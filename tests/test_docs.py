"""What the documentation says is true: generated tables are current, examples print what they show, programs run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import normkit as nk
from normkit.cli.errors import EXTRAS
from normkit.vocabulary.record import encode_line
from normkit.vocabulary.spec import REGISTRY

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = "<!-- runs -->"
"""On the line before a Python block: the block is a whole program, which this file runs."""


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """docs/generate.py, at work on copies of the pages that it writes."""
    source = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    for path in module.pages():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            copy.write_bytes(path.read_bytes())
    kinds = (
        "RECORDS",
        "OVERHEAD",
        "SYNCHRONIZED",
        "SURGERY",
        "SPEEDS",
        "DOCTOR",
        "WATCHED",
        "COMPOSED",
        "WHOLE",
        "LIMITS",
    )
    for records in (getattr(module, kind) for kind in kinds):
        if (ROOT / records).exists():
            (tmp_path / records).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / records).symlink_to(ROOT / records)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_the_generated_tables_are_current(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def timed(reason: str, extra: float, speedup: float, **changes: object) -> dict[str, object]:
    """One line of `normkit bench --op overhead`."""
    part = {"extra_us": {"value": extra}, "speedup": {"value": speedup}}
    record = {"kind": "overhead", "op": "layer_norm", "reason": reason, "implementation": "normkit:torch"}
    return {
        **record,
        "backend": "torch",
        "state": "measured",
        "allocator": "default",
        "quiet": True,
        "forward": part,
        "step": part,
        **changes,
    }


def test_the_cost_of_a_call_is_that_of_the_committed_record(generate, monkeypatch):
    page = generate.ROOT / "docs" / "benchmarks.md"
    monkeypatch.setattr(generate, "OVERHEAD", Path("a_record"))
    directory = generate.ROOT / generate.OVERHEAD
    assert generate.UNMEASURED in generate.benchmarks(page.read_text())
    made = {
        "kind": "environment",
        "command": "normkit bench --op overhead",
        "processor": "a processor",
        "torch": "2.13.0",
    }
    lines = [
        {**made, "threads of torch": 2},
        timed("tiny", 6.25, 0.5),
        timed("tiny", 99.0, 0.5, implementation="normkit", backend="native"),
        timed("tiny", 99.0, 0.5, allocator="pinned"),
        timed("tiny", 99.0, 0.5, state="refused"),
        timed("1 MB", 7.0, 1 / 1.02),
        timed("4 MB", -1.0, 1 / 0.99, quiet=False),
    ]
    for run, tiny in (("1", 6.25), ("2", 60.0), ("3", 2.0)):
        (directory / run).mkdir(parents=True)
        lines[1] = timed("tiny", tiny, 0.5)
        (directory / run / "bench.jsonl").write_bytes(b"".join(encode_line(line) for line in lines))
    text = generate.benchmarks(page.read_text())
    assert "| `layer_norm` | +6.2 µs | +6.2 µs | +2.0 % | +2.0 % | ~-1.0 % | ~-1.0 % |" in text
    assert "a processor, 2 threads, torch 2.13.0, medians of 3 runs: [1](" in text
    assert "report.md): `normkit bench --op overhead --out DIR`" in text
    assert "99" not in text.partition("<!-- call:begin -->")[2].partition("<!-- call:end -->")[0]
    assert generate.main(["--check"]) == 1  # the page on the disk does not say so yet


@pytest.mark.parametrize("name", ["README.md", "docs/norms.md"])
def test_a_stale_table_is_said_and_written_anew(generate, capsys, name):
    page = generate.ROOT / name
    current = page.read_text()
    page.write_text(current.replace("✓", "", 1))
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().err == f"{name} is not what the registry says: run `python docs/generate.py`.\n"
    assert page.read_text() != current
    assert generate.main([]) == 0
    assert page.read_text() == current
    page.unlink()
    if name != "README.md":
        assert generate.main(["--check"]) == 1


def test_a_readme_without_a_place_for_the_table_is_said(generate):
    (generate.ROOT / "README.md").write_text("no marks")
    with pytest.raises(SystemExit, match=r"README\.md has no <!-- norms:begin -->"):
        generate.main(["--check"])


def test_the_tables_hold_every_norm_and_every_law(generate):
    page = generate.norms_page()
    rows = {line.split("]")[0].removeprefix("| ["): line for line in page.splitlines() if line.startswith("| [")}
    assert set(rows) == set(REGISTRY)
    for name, family in REGISTRY.items():
        cells = [cell.strip() for cell in rows[name].strip("|").split("|")][2:]
        assert [cell == "✓" for cell in cells] == [law in family.spec.laws for law in nk.laws.LAWS]
        assert f"\n## {name}\n" in page


# examples


def modules() -> list[str]:
    """Every module of the package that shows an example in a docstring, read from the source: nothing is imported."""
    package = Path(nk.__file__).parent
    names = [info.name for info in pkgutil.walk_packages([str(package)], "normkit.", onerror=lambda name: None)]
    found = []
    for name in ["normkit", *names]:
        path = package.joinpath(*name.split(".")[1:])
        source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if source.exists() and re.search(r"^\s*>>> ", source.read_text(), re.MULTILINE):
            found.append(name)
    return found


HOSTS = ("lightning", "transformers")
"""Imported by their adapter alone."""


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_print_what_they_show(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name not in (*EXTRAS, *HOSTS):  # anything else should always be there
            raise
        pytest.skip(f"{error.name} is not installed")
    examples = [example for example in doctest.DocTestFinder().find(module) if example.examples]
    assert examples
    for example in examples:
        said = []
        doctest.DocTestRunner(verbose=False).run(example, out=said.append)
        assert not said, "".join(said)


def test_the_search_for_examples_finds_those_of_the_front_page():
    assert {"normkit", "normkit.create", "normkit.explanation", "normkit.layout"} <= set(modules())


@pytest.mark.parametrize("name", REGISTRY)
def test_every_norm_is_documented_in_full(name):
    """The function on its own; the class, which may point to its sister of another dimension."""
    family = REGISTRY[name]
    function, layer = getattr(nk.functional, name), family.pick(2)
    for documented in (function, layer):
        text = inspect.getdoc(documented)
        assert "\nArgs:\n" in text
        assert "\nRaises:\n" in text or name == "identity"
        assert "\n>>> " in text
        assert not family.spec.paper or f"Source: {family.spec.paper}." in text
        for argument in inspect.signature(documented).parameters:
            assert re.search(rf"^    {argument}: ", text, re.MULTILINE), argument
    both = inspect.getdoc(layer) + inspect.getdoc(function)
    assert "When not to use it" in both or "Do not " in both
    assert "``y = " in both
    for cls in (*family.classes.values(), *family.lazy.values()):
        text = inspect.getdoc(cls)
        assert "\n>>> " in text or ":class:`" in text, cls


# programs in pages


def programs() -> list:
    found = []
    for page in PAGES:
        for match in re.finditer(rf"^{MARK}\n```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            line = page.read_text()[: match.start(1)].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{page.name}:{line}"))
    return found


@pytest.mark.parametrize("program", programs())
def test_a_program_in_a_page_runs(program, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "page", "exec"), {"__name__": "__main__"})


def test_no_mark_stands_before_something_else_and_the_readme_has_a_program():
    marks = {page.name: page.read_text().count(MARK) for page in PAGES}
    assert sum(marks.values()) == len(programs())
    assert marks["README.md"] > 0
