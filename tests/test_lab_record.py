"""Records on disk: strict JSON, atomic documents, a torn last line that costs nothing but itself."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.lab.journal import Journal
from normkit.vocabulary.record import (
    decode,
    encode,
    encode_line,
    read_cell,
    read_cells,
    read_experiment,
    read_json,
    read_lines,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.just("a word"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_what_is_written_is_strict_json_and_reads_back_the_same(value):
    text = json.dumps(encode(value), allow_nan=False)  # raises if a non-finite number got through
    back = decode(json.loads(text))
    assert json.dumps(encode(back), sort_keys=True) == json.dumps(encode(value), sort_keys=True)


def test_non_finite_numbers_are_strings(tmp_path):
    write_json(tmp_path / "a.json", {"x": [math.nan, math.inf, -math.inf, 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": ["nan", "inf", "-inf", 1.5]}
    nan, *rest = read_json(tmp_path / "a.json")["x"]
    assert math.isnan(nan)
    assert rest == [math.inf, -math.inf, 1.5]


@pytest.mark.parametrize("content", ['{"a": NaN}', '{"a": 1', "", '{"a": Infinity}'])
def test_a_document_that_is_no_strict_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not a JSON document"):
        read_json(tmp_path / "a.json")


def test_a_document_is_replaced_as_a_whole_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json(path, {"state": "pending"})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        write_json(path, {"state": "done"})
    assert read_json(path) == {"state": "pending"}
    monkeypatch.undo()
    write_json(path, {"state": "done"})
    assert read_json(path) == {"state": "done"}


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path, cut):
    whole = encode_line({"step": 5, "loss": 0.25}), encode_line({"step": 10, "loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole[0] + whole[1][: min(cut, len(whole[1]) - 1)])
    assert read_lines(path) == [{"step": 5, "loss": 0.25}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2"):
        read_lines(tmp_path / "m.jsonl")


def test_a_journal_is_cut_back_and_goes_on(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    journal.append({"step": 1})
    offset = journal.offset
    journal.append({"step": 2})
    journal.close()
    again = Journal(tmp_path / "m.jsonl")
    again.cut(offset)
    again.append({"step": 3})
    again.close()
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 3}]


def test_cells_that_were_only_just_begun_are_left_out(tmp_path):
    cell = tmp_path / "cells" / "a"
    cell.mkdir(parents=True)
    write_json(cell / "config.json", {"seed": 1})
    assert read_cells(tmp_path) == []
    with pytest.raises(ValueError, match=r"status\.json is missing"):
        read_cell(cell)
    write_json(cell / "status.json", {"state": "diverged"})
    (record,) = read_cells(tmp_path)
    assert (record.name, record.state, record.finished, record.metrics) == ("a", "diverged", True, [])


def test_a_directory_of_something_else_or_of_another_schema_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this is no run directory"):
        read_experiment(tmp_path)
    write_json(tmp_path / "experiment.json", {"schema": 99})
    with pytest.raises(ValueError, match="schema 99, this normkit reads schema 1"):
        read_experiment(tmp_path)
