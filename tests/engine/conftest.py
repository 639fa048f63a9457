from __future__ import annotations

import pytest

from seawall.inference import models
from seawall.inference.generate.decoder import Decoder


@pytest.fixture(scope="session")
def decoder():
    models.add("smollm2-135m")
    with Decoder.load("smollm2-135m", precision="int8") as decoder:
        yield decoder
