"""How well a decoder predicts a text: the measure of whether a smaller model is still the same one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .errors import EmptyPromptError
from .generate.decoder import Decoder


def token_losses(decoder: Decoder, tokens: Sequence[int]) -> Iterator[float]:
    """Minus the natural logarithm of the probability of each token after the first, given those before it.

    The text is read in parts of the decoder's context, each part on its own.
    """
    import numpy as np

    for start in range(0, len(tokens), decoder.context):
        part = list(tokens[start : start + decoder.context])
        position = 1
        for logits in decoder.logits(part):
            targets = part[position : position + len(logits)]
            rows = logits[: len(targets)].astype(np.float64)
            top = rows.max(axis=1)
            spread = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
            yield from (spread - rows[np.arange(len(targets)), targets]).tolist()
            position += len(logits)


def perplexity(decoder: Decoder, tokens: Sequence[int]) -> float:
    """Perplexity of a text of at least two tokens; lower is better, the vocabulary's size is a blind guess.

    Compare it between precisions of one model on one text; other tokenizers make other numbers.
    """
    losses = list(token_losses(decoder, tokens))
    if not losses:
        raise EmptyPromptError
    return math.exp(math.fsum(losses) / len(losses))
