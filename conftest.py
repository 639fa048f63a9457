"""Collects the examples of README, docs and docstrings as tests (see tests/fences.py)."""

import os

import pytest
from hypothesis import settings
from sybil.sybil import SybilCollection

from tests.fences import doctest_finder, fence_finders, fences, is_excused

pytest_collect_file = SybilCollection([*fence_finders(), doctest_finder()]).pytest()


def pytest_report_header(config: pytest.Config) -> str:
    found = list(fences(config.rootpath))
    return f"python fences: {len(found)}, of which not run: {sum(map(is_excused, found))}"


# CI runs the same examples each time; to search for new ones is a developer's run, where a find can be followed up.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
