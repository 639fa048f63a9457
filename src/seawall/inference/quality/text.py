"""How alike two decoders predict a text, and how well one does: the measure of whether it is the same model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

import numpy as np

from seawall.inference.errors import (
    EmptyPromptError,
    IncomparableModelsError,
    InvalidSettingError,
    NoQualityDataError,
    NotFiniteError,
)
from seawall.inference.generate.decoder import Decoder
from seawall.inference.quantize.measures import checked_logits, divergence, log_probabilities

Array = np.ndarray[Any, Any]
Progress = Callable[[str, float], None]
Texts = str | Sequence[str] | Sequence[Sequence[int]]
"""A text, several, or the tokens of several; each begins without a past."""

WINDOW = 1024  # tokens
_ROWS = 16  # rows of logits in float64 at once: 6 MB for a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class TextScores:
    """How alike two decoders predict what comes next, over all tokens of some texts.

    Attributes:
        tokens: how many predictions were compared.
        kl: mean KL divergence in nats, from the candidate's prediction to the reference's.
        kl_error: standard error of that mean.
        kl_p99: its 99th percentile.
        kl_max: its largest value.
        top1: fraction of predictions with the same likeliest token.
        perplexity: the candidate's.
        reference_perplexity: the reference's.
    """

    tokens: int
    kl: float
    kl_error: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        """The candidate's perplexity over the reference's: 1 for the same model, more for a worse one."""
        return self.perplexity / self.reference_perplexity


def evaluation_text() -> str:
    """English prose and technical documentation, 4,071 tokens of SmolLM2; written for this project, its licence."""
    return resources.files(__package__).joinpath("evaluation.txt").read_text(encoding="utf-8")


def compare_texts(
    reference: Decoder,
    candidate: Decoder,
    texts: Texts,
    *,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> TextScores:
    """Let two decoders read the same texts, and compare their predictions after every token.

    Both read each text in the same windows of at most `window` tokens and in the same pieces. That matters: 8-bit
    activations round differently for one token than for many, and a decoder that reads token by token is already
    KL 0.006 from itself. Two decoders of the same files give exactly 0 here.

    At most 64 tokens' logits of each are in memory, and 24 bytes for each token read.

    Raises:
        IncomparableModelsError: different vocabularies, or different tokens for a text.
        NoQualityDataError: no texts, or none of at least two tokens.
        NotFiniteError: NaN among a model's logits; no gate may compare with that.
        ModelError: what `Decoder.logits` raises.
    """
    if type(window) is not int or window < 2:
        raise InvalidSettingError(f"window must be a whole number of at least 2 tokens, got {window!r}")
    if reference.vocabulary != candidate.vocabulary:
        raise IncomparableModelsError(
            f"the reference {reference.name!r} knows {reference.vocabulary} tokens and the candidate "
            f"{candidate.name!r} {candidate.vocabulary}: compare models of one vocabulary"
        )
    window = min(window, reference.context, candidate.context)
    windows = [
        tokens[start : start + window]
        for tokens in _tokens(reference, candidate, texts)
        for start in range(0, len(tokens), window)
    ]
    total = sum(map(len, windows))
    sums = _TextSums()
    for tokens in windows:
        position = 0
        for first, second in zip(reference.logits(tokens), candidate.logits(tokens), strict=True):
            targets = np.array(tokens[position + 1 : position + len(first) + 1], np.intp)
            sums.add(first, second, targets)
            position += len(first)
            if progress is not None:
                progress("comparing", sums.tokens / total)
    return sums.scores()


class _TextSums:
    """Three numbers for each token, and nothing of its logits."""

    def __init__(self) -> None:
        self.tokens = 0
        self._divergences: list[Array] = []
        self._losses: tuple[list[Array], list[Array]] = ([], [])
        self._same = 0

    def add(self, first: Array, second: Array, targets: Array) -> None:
        """Count [n, vocabulary] logits of both; `targets` are the n tokens that follow, or the n - 1 that there are."""
        for start in range(0, len(first), _ROWS):
            rows = slice(start, start + _ROWS)
            p, q = (log_probabilities(logits) for logits in _checked(first[rows], second[rows]))
            self._divergences.append(divergence(p, q))
            self._same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            wanted = targets[rows]
            for losses, predictions in zip(self._losses, (p, q), strict=True):
                losses.append(-predictions[np.arange(len(wanted)), wanted])
        self.tokens += len(first)

    def scores(self) -> TextScores:
        """The whole; NoQualityDataError before there was a token to predict."""
        reference, candidate = (np.concatenate(losses) if losses else np.empty(0) for losses in self._losses)
        if not len(reference):
            raise NoQualityDataError("no text of at least two tokens was given: there is nothing to predict")
        nats = np.concatenate(self._divergences)
        return TextScores(
            tokens=self.tokens,
            kl=float(nats.mean()),
            kl_error=float(nats.std() / math.sqrt(len(nats))),
            kl_p99=float(np.percentile(nats, 99)),
            kl_max=float(nats.max()),
            top1=self._same / self.tokens,
            perplexity=_exp(candidate.mean()),
            reference_perplexity=_exp(reference.mean()),
        )


def _checked(first: Array, second: Array) -> tuple[Array, Array]:
    try:
        return checked_logits(first, second)
    except NotFiniteError as error:
        which = "the candidate's logits" if np.isfinite(first.max(axis=1)).all() else "the reference's logits"
        raise NotFiniteError(error.count, error.index, which) from None


def _exp(loss: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


def _tokens(reference: Decoder, candidate: Decoder, texts: Texts) -> list[list[int]]:
    found: list[list[int]] = []
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        if not isinstance(text, str):
            found.append(list(cast(Sequence[int], text)))
            continue
        tokens = encoded(reference, text)
        if tokens != encoded(candidate, text):
            raise IncomparableModelsError(
                f"text {number} becomes other tokens in the candidate than in the reference: "
                "the models have different tokenizers, so their predictions cannot be compared"
            )
        found.append(tokens)
    return found


def encoded(decoder: Decoder, text: str) -> list[int]:
    """Tokens of a text that may be longer than the decoder's context: line by line, joined."""
    return [token for line in _pieces(text, decoder.context) for token in decoder.encode(line)]


def _pieces(text: str, context: int) -> Iterator[str]:
    """Stretches that surely fit, cut before a space or a line's end, where byte-level tokenizers cut as well."""
    start = 0
    while len(text) - start > context:
        cut = max(text.rfind(mark, start + 1, start + context) for mark in " \n")
        end = cut if cut > start else start + context
        yield text[start:end]
        start = end
    yield text[start:]


def token_losses(decoder: Decoder, tokens: Sequence[int]) -> Iterator[float]:
    """Minus the natural logarithm of the probability of each token after the first, given those before it.

    The text is read in parts of the decoder's context, each part on its own.
    """
    for start in range(0, len(tokens), decoder.context):
        part = list(tokens[start : start + decoder.context])
        position = 1
        for logits in decoder.logits(part):
            targets = part[position : position + len(logits)]
            rows = log_probabilities(logits[: len(targets)].astype(np.float64))
            yield from (-rows[np.arange(len(targets)), targets]).tolist()
            position += len(logits)


def perplexity(decoder: Decoder, tokens: Sequence[int]) -> float:
    """Perplexity of a text of at least two tokens; lower is better, the vocabulary's size is a blind guess.

    Compare it between precisions of one model on one text; other tokenizers make other numbers.
    """
    losses = list(token_losses(decoder, tokens))
    if not losses:
        raise EmptyPromptError
    return math.exp(math.fsum(losses) / len(losses))
