"""The real model, fetched once into the default cache and converted once per precision."""

import json
from pathlib import Path

import pytest

from seawall.inference import Decoder, models

NAME = "smollm2-135m"
ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="session")
def gguf():
    """Path of the model's weights; the first call on a machine downloads them."""
    return models.add(NAME)


@pytest.fixture(scope="session")
def decoder(gguf):
    with Decoder.load(NAME, context=1500) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def fp32(gguf):
    with Decoder.load(NAME, precision="fp32", context=1500) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def reference():
    return json.loads((ORACLE / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def nothing_left_running(request):
    """Every test gives back what it started."""
    yield
    for name in ("decoder", "fp32"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).active_sequences == 0
