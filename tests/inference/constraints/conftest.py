"""The model that can spell anything."""

import pytest

from seawall.inference import Decoder
from tests.inference import tiny
from tests.inference.constraints.spelling import LETTER, PAIRS, SPECIALS, TOKENS


@pytest.fixture(scope="package")
def speller(tmp_path_factory):
    """A model of random weights that can spell any text: what it says is nonsense, so the constraint does the work."""
    folder = tmp_path_factory.mktemp("speller")
    types = [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS))
    merges = [" ".join(LETTER[ord(letter)] for letter in pair) for pair in PAIRS]
    path = tiny.write(folder / "speller.gguf", tokens=TOKENS, types=types, merges=merges, context_length=512)
    with Decoder.load(path, precision="int8", cache_dir=folder, context=512, threads=1) as decoder:
        yield decoder
        assert decoder.active_sequences == 0
