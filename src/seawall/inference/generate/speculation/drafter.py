"""What a drafter is: the small protocol that all of them share, and that your own can follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from ..choosing import Chooser
from .verify import Probabilities

if TYPE_CHECKING:
    from seawall.inference.generate.decoder import Decoder
    from seawall.inference.generate.slot import Slot
    from seawall.inference.runtime import ort


class Proposal(NamedTuple):
    """A token that may come next.

    Attributes:
        token: its id.
        strength: which of the drafter's classes of confidence it is in, from 0; the controller learns, for each
            class, how often the target agrees.
        drawn_from: the distribution that the token was drawn from, [vocabulary]; None where it was not drawn.
    """

    token: int
    strength: int = 0
    drawn_from: Probabilities | None = None


class Host(NamedTuple):
    """The sequence that a drafter is to work for; a drafter without a model need not look at it.

    Attributes:
        decoder: the target.
        slot: the target's key/value cache of this sequence.
        chooser: chooses its tokens.
    """

    decoder: Decoder
    slot: Slot
    chooser: Chooser


@dataclass(frozen=True, slots=True)
class Turn:
    """What a drafter is told when it is asked for tokens.

    Attributes:
        most: nobody will ask for more tokens than this.
        chooser: chooses as the target would; `chooser.choose(logits, drafted)`.
        drawn: whether proposals have to be drawn, and say from what: the rejection rule needs it.
        options: of every run of a model in this turn, so that cancelling stops it.
    """

    most: int
    chooser: Chooser
    drawn: bool = False
    options: ort.RunOptions | None = None


class Drafting(Protocol):
    """A drafter at work on one sequence. Everything it knows of the sequence ends with it."""

    def propose(self, turn: Turn) -> Iterator[Proposal]:
        """Tokens that may follow, one after the other, for as long as there are any and somebody asks."""
        ...

    def extend(self, token: int) -> None:
        """The sequence grew by a token, whoever proposed it."""
        ...

    def close(self) -> None:
        """The sequence has ended; give back what was held for it."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Makes drafts. It is a setting, shared by all sequences, so it may know a corpus or a model but no sequence.

    Attributes:
        name: labels its statistics.
        chances: for each class of strength, how often a proposal is expected to be accepted, before anything
            is known of the sequence.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def chances(self) -> tuple[float, ...]: ...  # noqa: D102

    def cost(self) -> float:
        """Seconds that one proposal takes, on an idle machine; 0 for next to nothing.

        Of a drafter that costs nothing, the controller keeps score all the time, used or not; one that costs is tried
        only where the time for it is earned.
        """
        ...

    def start(self, prompt: Sequence[int], host: Host) -> Drafting:
        """Begin with a sequence."""
        ...
