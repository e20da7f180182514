"""What every test can rely on: one thread, seeded, and memory that is NaN until somebody writes to it."""

from __future__ import annotations

import collections
import os
import zlib

# Before torch is loaded, and inherited by the processes that tests start: pytest-xdist already uses every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("normkit", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.load_profile("normkit")


@pytest.fixture(autouse=True)
def _seeded_with_nan_in_fresh_memory():
    """torch.empty returns NaN (the largest number for integers), so that reading what nobody wrote shows.

    torch fills fresh memory only in deterministic mode. A test may leave any global setting behind: all are restored.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.set_num_threads(1)


MOST_SETS = 120


WHAT_IT_COMPUTES = ("test_parity.py", "test_reference.py", "test_laws.py")


def _is_elsewhere(item: pytest.Item) -> bool:
    """A norm that torch does not have is one class for any axes of space: beside what it computes, `make test` looks at
    it with two of them.
    """
    form = item.callspec.params.get("form") if hasattr(item, "callspec") else None
    own = form is not None and form.spec.twin is None and form.dim != 2
    return own and item.path.name not in WHAT_IT_COMPUTES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with hundreds of parameter sets, `make test` runs a fixed sample; `make test-all` runs them all.

    Tests loop over the registry, so their number grows with every norm, backend and option; the minutes must not.
    """
    sets = collections.Counter(item.nodeid.partition("[")[0] for item in items)
    for item in items:
        if _is_elsewhere(item):
            item.add_marker(pytest.mark.slow)
        every = -(-sets[item.nodeid.partition("[")[0]] // MOST_SETS)
        if every > 1 and zlib.crc32(item.nodeid.encode()) % every:
            item.add_marker(pytest.mark.slow)
