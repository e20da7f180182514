"""The gallery: broken training scripts, each a complaint that somebody has made; the doctor names the fault first."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest

from normkit.rules import RULES

GALLERY = Path(__file__).parent / "gallery"
SCRIPTS = sorted(GALLERY.glob("*.py"))
RECORD = Path(__file__).parent.parent / "records" / "doctor" / "gallery.json"


def load(path: Path):
    source = importlib.util.spec_from_file_location(f"gallery_{path.stem}", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "normkit")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_planted_fault_is_named_first(path):
    script = load(path)
    found = script.diagnosis()
    assert found.findings, f"nothing was found: {found}"
    assert found.findings[0].rule == script.PLANTED, found
    assert f"{script.PLANTED}: " in repr(found)


def test_there_are_fifteen_and_each_cites_who_complained():
    assert len(SCRIPTS) >= 15
    for path in SCRIPTS:
        text = path.read_text()
        assert "https://github.com/" in text.split('"""')[1], path.name
        assert len(text.splitlines()) <= 45, path.name
    assert len({load(path).PLANTED for path in SCRIPTS}) == len(SCRIPTS)


def test_the_record_in_the_docs_is_of_these_scripts():
    record = json.loads(RECORD.read_text())
    assert [row["script"] for row in record["scripts"]] == [path.stem for path in SCRIPTS]
    for row, path in zip(record["scripts"], SCRIPTS, strict=True):
        assert row["planted"] == load(path).PLANTED == row["named"]
        assert row["planted"] in RULES
    assert sum(not row["at_first_go"] for row in record["scripts"]) == len(record["changed_afterwards"])
