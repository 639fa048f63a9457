"""Drafts what a constraint leaves no choice about: the keys, quotes and brackets of a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..constraints import Course
from .drafter import Host, Proposal, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """Proposes the tokens of text that must come next. Added by itself where an answer has a constraint.

    The text is forced, its tokens are not: the target may still spell it in other ones, so they are verified like any.

    Attributes:
        name: labels its statistics.
    """

    name: str = "forced"
    chances: tuple[float, ...] = (0.97,)

    def cost(self) -> float:
        """Next to nothing."""
        return 0.0

    def start(self, prompt: Sequence[int], host: Host) -> ForcedDrafting:
        """Begin with a sequence."""
        return ForcedDrafting(host.chooser.course)


class ForcedDrafting:
    """Forced tokens of one sequence."""

    def __init__(self, course: Course | None) -> None:
        self._course = course

    def propose(self, turn: Turn) -> Iterator[Proposal]:
        """What must come next, as far as that is known."""
        if self._course is not None:
            yield from map(Proposal, islice(self._course.forced(), turn.most))

    def extend(self, token: int) -> None:
        """The chooser keeps count."""

    def close(self) -> None:
        """Nothing is held."""
