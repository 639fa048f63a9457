"""The page says all there is: parameters, codes of errors, metrics and limits."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from seawall.web.openai import Limits, requests
from seawall.web.openai.metrics import METRICS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "openai-server.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\n]+)`", PAGE))


@pytest.mark.parametrize(
    "shape", [requests.CHAT, requests.COMPLETION, requests.EMBEDDING], ids=["chat", "text", "vectors"]
)
def test_every_parameter_is_on_the_page(shape):
    assert [] == [name for name in shape.fields if not any(named.partition(".")[0] == name for named in NAMED)]


def test_every_metric_is_on_the_page():
    told = {name + "_total" * (kind == "counter") for name, (kind, _) in METRICS.items()}

    assert told == {name for name in NAMED if name.startswith("vllm:")}


def test_every_limit_is_on_the_page():
    assert [] == [one.name for one in fields(Limits) if f"Limits.{one.name}" not in NAMED]


def test_every_code_of_an_error_is_on_the_page():
    source = "".join(path.read_text() for path in (ROOT / "src/seawall/web/openai").glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source)) | set(re.findall(r'_unavailable\("(\w+)"\)', source))
    of_parameters = {"missing_required_parameter", "unknown_parameter", "unsupported_parameter", "unsupported_value"}

    assert of_parameters < codes
    assert set() == codes - of_parameters - NAMED - {"method_not_allowed"}
