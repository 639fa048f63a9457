"""What a user asks for: which drafters, how exact, how far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from seawall.inference.errors import InvalidSettingError

from ..sampling import is_number
from .drafter import Drafter
from .ngram import NGram

MOST = 16  # drafted tokens of a round: as far as the probe of exactness looks


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How to draft, given to `Decoder.start`. The answer stays the target's own.

    Attributes:
        drafters: asked in every round, and the one that gains most drafts; none at all decodes plainly, in the
            arithmetic that `exact` asks for.
        most: tokens of one draft at most, 1 to 16.
        length: None lets the controller decide whether and how far to draft; a number always drafts so many.
        exact: every token comes out of the same arithmetic, drafted or not, whatever it takes: where
            `Decoder.exactness` says "padded", single tokens run as two. False takes the quickest way, and in a
            quantized model the answer may then turn another way where two tokens are nearly as likely.
        rule: "chosen" accepts what the target itself would have chosen: greedy answers, and sampled ones of
            one seed, are token for token those without drafts. "drawn" is the rejection rule of the papers: it keeps
            the distribution, not the tokens, and accepts slightly more of a model's drafts.
        accept_above: lossy. Accept any drafted token to which the target gives at least this probability, in (0, 1].
    """

    drafters: Sequence[Drafter] = field(default_factory=lambda: (NGram(),))
    most: int = MOST
    length: int | None = None
    exact: bool = True
    rule: Literal["chosen", "drawn"] = "chosen"
    accept_above: float | None = None

    def __post_init__(self) -> None:
        given: Any = self.drafters
        drafters = tuple(given) if isinstance(given, Iterable) else (None,)
        if any(isinstance(one, type) or not isinstance(one, Drafter) for one in drafters):
            raise InvalidSettingError(f"drafters must be a list of them, such as [NGram()], got {given!r:.200}")
        object.__setattr__(self, "drafters", drafters)
        names = [drafter.name for drafter in self.drafters]
        if len(set(names)) != len(names):
            raise InvalidSettingError(f"drafters must have different names, got {names!r}")
        for drafter in self.drafters:
            chances: Any = drafter.chances
            listed = isinstance(chances, (tuple, list)) and len(chances) > 0
            if not listed or not all(is_number(chance) and 0 < chance < 1 for chance in chances):
                raise InvalidSettingError(
                    f"the chances of drafter {drafter.name!r} must be numbers between 0 and 1, one for each class of "
                    f"strength, such as (0.5,), got {chances!r:.200}"
                )
        _whole("most", self.most)
        if self.length is not None:
            _whole("length", self.length)
        if type(self.exact) is not bool:
            raise InvalidSettingError(f"exact must be True or False, got {self.exact!r}")
        if self.rule not in ("chosen", "drawn"):
            raise InvalidSettingError(f"rule must be 'chosen' or 'drawn', got {self.rule!r}")
        threshold = self.accept_above
        if threshold is not None and not (is_number(threshold) and 0 < threshold <= 1):
            raise InvalidSettingError(f"accept_above must be in (0, 1], or None, got {threshold!r}")


def resolved(asked: object, usual: Speculation | None) -> Speculation | None:
    """How an answer is drafted: as was asked for, or as usual where None was; None for not at all."""
    if asked is None or asked is False:
        return usual if asked is None else None
    if not isinstance(asked, Speculation):
        raise InvalidSettingError(
            'speculation must be Speculation(...), False or None, or "auto" where a decoder is loaded, '
            f"got {asked!r:.200}"
        )
    return asked


def _whole(name: str, value: int) -> None:
    if type(value) is not int or not 1 <= value <= MOST:
        raise InvalidSettingError(f"{name} must be a whole number from 1 to {MOST}, got {value!r}")
