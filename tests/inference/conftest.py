"""The real model, fetched once into the default cache and converted once per precision."""

import json
from pathlib import Path

import pytest

from seawall.inference import Decoder, models
from seawall.inference.errors import ModelFetchError

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


@pytest.fixture(scope="session")
def embedding_model():
    """all-MiniLM-L6-v2 as ONNX in float32, prepared: folder and facts."""
    return prepared("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def classifier_model():
    """Path of Google's file type classifier, as it ships in the package magika; its config lies beside it."""
    return prepared("magika").folder / "model.onnx"


def prepared(name):
    """The model, fetched where it is missing; the test is skipped where its package cannot be had."""
    try:
        models.add(name)
    except ModelFetchError as error:
        pytest.skip(f"no {name}: {error}")
    return models.prepare(name)


@pytest.fixture(autouse=True)
def nothing_left_running(request):
    """Every test gives back what it started."""
    yield
    for name in ("decoder", "fp32"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).active_sequences == 0
