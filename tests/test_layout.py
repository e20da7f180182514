"""Pattern and shape -> axes: the patterns of the registry, all others in the grammar, and everything outside it."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.layout import Layout, parse, solve
from normkit.vocabulary.spec import REGISTRY


@pytest.mark.parametrize(
    ("pattern", "shape", "options", "view", "pooled", "weighted"),
    [
        ("[n] c [s...]", (8, 3), {}, (8, 3), (0,), (1,)),
        ("[n] c [s...]", (8, 3, 5), {}, (8, 3, 5), (0, 2), (1,)),
        ("[n] c [s...]", (8, 3, 5, 7, 2), {}, (8, 3, 5, 7, 2), (0, 2, 3, 4), (1,)),
        ("n c [s...]", (8, 3, 5, 7), {}, (8, 3, 5, 7), (2, 3), (1,)),
        ("n c [s...]", (8, 3), {}, (8, 3), (), (1,)),
        ("n [c] s...", (8, 3, 5, 7), {}, (8, 3, 5, 7), (1,), (1,)),
        ("n... [c...]", (3,), {}, (3,), (0,), (0,)),
        ("n... [c...]", (8, 5, 3), {}, (8, 5, 3), (2,), (2,)),
        ("n... [c...]", (8, 5, 3), {"trailing": 2}, (8, 5, 3), (1, 2), (1, 2)),
        ("n... [c...]", (5, 3), {"trailing": 2}, (5, 3), (0, 1), (0, 1)),
        ("n (g [c]) [s...]", (8, 48, 14, 14), {"groups": 4}, (8, 4, 12, 14, 14), (2, 3, 4), (1, 2)),
        ("n (g [c]) [s...]", (8, 48), {"groups": 48}, (8, 48, 1), (2,), (1, 2)),
        ("n (g [c]) [s...]", (0, 6, 5), {"groups": 2}, (0, 2, 3, 5), (2, 3), (1, 2)),
    ],
)
def test_which_axes_pool_and_which_carry_a_weight(pattern, shape, options, view, pooled, weighted):
    layout = solve(pattern, shape, **options)
    assert layout == Layout(view, pooled, weighted)
    assert layout.values == math.prod(view[axis] for axis in pooled)
    assert layout.statistics == math.prod(view[axis] for axis in range(len(view)) if axis not in pooled)
    assert layout.weight_view == tuple(size if axis in weighted else 1 for axis, size in enumerate(view))


def test_a_group_is_a_run_of_neighbouring_channels():
    layout = solve("n (g [c]) [s...]", (1, 6, 2), groups=3)
    x = torch.arange(12).reshape(1, 6, 2)
    assert x.reshape(layout.view)[0, 1].tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("[n c", "unbalanced '['"),
        ("n] c", "unbalanced ']'"),
        ("n (g c", "unbalanced '('"),
        ("n g c)", "unbalanced ')'"),
        ("n (g [c) s]", "unbalanced ')'"),
        ("[n (g] c)", "unbalanced ']'"),
        ("n ((g c))", "more than one level of '('"),
        ("[n [c]]", "more than one level of '['"),
        ("n, c", "unexpected ','"),
        ("n 3", "unexpected '3'"),
        ("N c", "unexpected 'N'"),
        ("n é", "unexpected 'é'"),
        ("n .. c", "unexpected '.'"),
        ("n n", "a name stands for one axis and occurs once"),
        ("n... c s...", "only one name besides 'c' can stand for any number of axes"),
        ("n (c)", "parentheses hold 'g' and one other name, as in '(g c)'"),
        ("n (c g)", "parentheses hold 'g' and one other name, as in '(g c)'"),
        ("n (g c d)", "parentheses hold 'g' and one other name, as in '(g c)'"),
        ("n (g c...)", "parentheses hold 'g' and one other name, as in '(g c)'"),
    ],
)
def test_what_is_outside_the_grammar_is_refused(pattern, complaint):
    with pytest.raises(ValueError) as refusal:
        parse(pattern)
    assert str(refusal.value) == f"pattern {pattern!r}: {complaint}"


@pytest.mark.parametrize(
    ("pattern", "shape", "options", "complaint"),
    [
        ("[n] c [s...]", (3,), {}, 'pattern "[n] c [s...]" needs at least 2 axes, the shape (3,) has 1'),
        ("n... [c...]", (3,), {"trailing": 2}, 'pattern "n... [c...]" needs at least 2 axes, the shape (3,) has 1'),
        ("n c", (3, 4, 5), {}, 'pattern "n c" covers 2 axes, the shape (3, 4, 5) has 3'),
        ("n (g [c]) [s...]", (8, 48, 7), {"groups": 32}, "48 channels do not divide into 32 groups"),
        ("n (g [c]) [s...]", (8, 48, 7), {"groups": 0}, "48 channels do not divide into 0 groups"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_the_numbers(pattern, shape, options, complaint):
    with pytest.raises(ValueError) as refusal:
        solve(pattern, shape, **options)
    assert str(refusal.value) == complaint


shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)


@given(st.text("ncgsd.()[] 0", max_size=14), shapes, st.integers(0, 4), st.integers(1, 3))
def test_any_text_is_laid_out_or_refused(pattern, shape, groups, trailing):
    """Nothing but ValueError, and a layout covers the tensor exactly: no element is lost, none is counted twice."""
    try:
        layout = solve(pattern, shape, groups=groups, trailing=trailing)
    except ValueError:
        return
    assert math.prod(layout.view) == math.prod(shape)
    assert layout.values * layout.statistics == math.prod(shape)
    assert list(layout.pooled) == sorted(set(layout.pooled))
    assert set(layout.pooled) | set(layout.weighted) <= set(range(len(layout.view)))


SHARED_BY = {  # pattern -> of an element (its index in the tensor), what all who share its mean and variance agree on
    "[n] c [s...]": lambda index, shape, groups, trailing: index[1],
    "n c [s...]": lambda index, shape, groups, trailing: index[:2],
    "n [c] s...": lambda index, shape, groups, trailing: (index[0], index[2:]),
    "n... [c...]": lambda index, shape, groups, trailing: index[: len(shape) - trailing],
    "n (g [c]) [s...]": lambda index, shape, groups, trailing: (index[0], index[1] // (shape[1] // groups)),
}


def test_every_pattern_of_the_registry_is_spelt_out_here():
    assert {family.spec.over for family in REGISTRY.values()} - {None} <= set(SHARED_BY)


@given(st.sampled_from(sorted(SHARED_BY)), shapes, st.integers(1, 3), st.integers(1, 2))
def test_elements_share_statistics_as_the_letters_say(pattern, shape, groups, trailing):
    try:
        layout = solve(pattern, shape, groups=groups, trailing=trailing)
    except ValueError:
        return
    kept = [axis for axis in range(len(layout.view)) if axis not in layout.pooled]
    numbers = torch.arange(math.prod(shape)).reshape(layout.view).permute(*kept, *layout.pooled)
    found = {frozenset(row) for row in numbers.reshape(layout.statistics, layout.values).tolist() if row}
    wanted = defaultdict(set)
    for number, index in enumerate(itertools.product(*map(range, shape))):
        wanted[SHARED_BY[pattern](index, shape, groups, trailing)].add(number)
    assert found == {frozenset(row) for row in wanted.values()}
