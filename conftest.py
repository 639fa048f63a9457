"""Collects the examples of README, docs and docstrings as tests (see tests/fences.py)."""

import pytest
from sybil.sybil import SybilCollection

from tests.fences import doctest_finder, fence_finders, fences, is_excused

pytest_collect_file = SybilCollection([*fence_finders(), doctest_finder()]).pytest()


def pytest_report_header(config: pytest.Config) -> str:
    found = list(fences(config.rootpath))
    return f"python fences: {len(found)}, of which not run: {sum(map(is_excused, found))}"
