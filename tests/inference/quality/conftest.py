"""A decoder of a few kilobytes in three precisions, converted once."""

import pytest

from seawall.inference import Decoder, models
from tests.inference import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Prepared folders of the tiny model by precision; tests copy what they change."""
    at = tmp_path_factory.mktemp("tiny")
    file = tiny.write(at / "tiny.gguf")
    return {
        precision: models.prepare(file, precision=precision, cache_dir=at / "cache").folder
        for precision in ("fp32", "int8", "int4-rtn", "int4", "fp8-e4m3")
    }


@pytest.fixture(scope="session")
def decoders(folders):
    """The same, loaded."""
    loaded = {precision: Decoder.load(folder, context=64, threads=1) for precision, folder in folders.items()}
    yield loaded
    for decoder in loaded.values():
        decoder.close()
