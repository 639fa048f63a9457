"""Collects the examples of README, docs and docstrings as tests (see tests/fences.py)."""

import gc
import os

import pytest
from hypothesis import settings
from sybil.sybil import SybilCollection

from tests.fences import doctest_finder, fence_finders, fences, is_excused

pytest_collect_file = SybilCollection([*fence_finders(), doctest_finder()]).pytest()


def pytest_report_header(config: pytest.Config) -> str:
    found = list(fences(config.rootpath))
    return f"python fences: {len(found)}, of which not run: {sum(map(is_excused, found))}"


def pytest_collection() -> None:
    """What is imported and collected stays: to look for garbage among it takes as long as the collecting."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Half a million objects that no later collection reads: a test's own `gc.collect()` takes 1 ms, not 200."""
    gc.collect()
    gc.freeze()
    gc.enable()


# CI runs the same examples each time; to search for new ones is a developer's run, where a find can be followed up.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
