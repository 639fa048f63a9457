"""Rows that share the pages of a prompt answer as if each had read it itself. On the real model."""

import numpy as np
import pytest

from seawall.inference.generate.batch import Part
from seawall.inference.generate.rows.memory import Layout, Piece, RowMemory

pytestmark = pytest.mark.model


def test_rows_that_adopt_a_prompt_go_on_as_the_row_that_read_it(decoder):
    config = decoder._config
    rows = RowMemory(Layout(config["layers"], config["kv_heads"], config["head_size"]), 3, 256)
    batch = decoder.batch(3, rows.array)
    prompt = decoder.encode_chat("Why is the sea salty? Answer in one sentence.")
    shared = len(prompt) // rows.layout.page_tokens * rows.layout.page_tokens
    assert shared > 0
    batch.run([Part(0, prompt[:shared], 0)])
    rows.lengths[0] = shared
    segment = rows.share(0, 0, shared)
    for row in (1, 2):
        rows.adopt(row, (Piece(segment, 0, shared),))
    tails = [[*prompt[shared:], token, 7] for token in (11, 12, 13)]
    together = batch.run([Part(row, tail, shared) for row, tail in enumerate(tails)])
    for tail, logits in zip(tails, together, strict=True):
        expected = batch.run([Part(0, [*prompt[:shared], *tail], 0)])[0]
        assert np.array_equal(logits, expected)
