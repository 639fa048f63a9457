"""Drafts from the sequence itself: what followed the same tokens before, in the prompt or in the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from seawall.inference.errors import InvalidSettingError

from .automaton import SuffixAutomaton
from .drafter import Host, Proposal, Turn

STRENGTHS = (1, 2, 3, 5, 9, 17, 33)  # tokens matched, from which each class of confidence begins


def strength_of(matched: int) -> int:
    """Which class of confidence a match of so many tokens is in."""
    strength = 0
    while strength + 1 < len(STRENGTHS) and matched >= STRENGTHS[strength + 1]:
        strength += 1
    return strength


def check_shortest(shortest: int, most: int | None = None) -> None:
    """InvalidSettingError for what is no length of a match."""
    if type(shortest) is not int or shortest < 1 or (most is not None and shortest > most):
        rule = "of at least 1" if most is None else f"from 1 to {most}"
        raise InvalidSettingError(f"shortest must be a whole number {rule}, got {shortest!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NGram:
    """Prompt lookup: proposes what followed the longest repeated end of prompt and answer the last time.

    Costs about 3 us a token, needs no model and no training, and knows nothing of other sequences. It wins where
    answers repeat: copying, editing, summaries with quotations, code, structured output.

    Attributes:
        shortest: tokens that have to match before anything is proposed.
    """

    shortest: int = 1
    name: ClassVar[str] = "ngram"
    chances: ClassVar[tuple[float, ...]] = (0.2, 0.35, 0.5, 0.7, 0.85, 0.93, 0.97)  # over the ten benchmark prompts

    def __post_init__(self) -> None:
        check_shortest(self.shortest)

    def cost(self) -> float:
        """Nothing worth counting."""
        return 0.0

    def start(self, prompt: Sequence[int], host: Host | None = None) -> NGramDrafting:
        """Index the prompt."""
        return NGramDrafting(prompt, self.shortest)


class NGramDrafting:
    """An n-gram drafter at work on one sequence."""

    def __init__(self, prompt: Sequence[int], shortest: int) -> None:
        self._automaton = SuffixAutomaton()
        self._shortest = shortest
        for token in prompt:
            self._automaton.append(token)

    def propose(self, turn: Turn) -> Iterator[Proposal]:
        """The tokens that followed, the longer the match the more confident; each that holds makes it longer."""
        matched = self._automaton.matched
        if matched < self._shortest:
            return
        for place, token in enumerate(self._automaton.following(turn.most)):
            yield Proposal(token, strength_of(matched + place))

    def extend(self, token: int) -> None:
        """The sequence grew by a token."""
        self._automaton.append(token)

    def close(self) -> None:
        """Nothing is held."""
