"""From what was asked for to speculation at work on a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from seawall.inference.errors import InvalidSettingError

from ..choosing import Chooser
from ..sampling import is_number
from ..slot import Slot
from .controller import Controller
from .costs import Costs
from .drafter import Drafter, Drafting, Host
from .forced import Forced
from .settings import Speculation
from .speculator import Speculator
from .target import SlotTarget

if TYPE_CHECKING:
    from seawall.inference.generate.decoder import Decoder


class Started(NamedTuple):
    """A target and the rounds over it."""

    target: SlotTarget
    speculator: Speculator


def begin(
    decoder: Decoder, settings: Speculation, chooser: Chooser, prompt: Sequence[int], hold: Callable[[Drafting], None]
) -> Callable[[Slot], Started]:
    """What to call with the slot once the first step runs: measuring and indexing take time.

    `hold` is given every drafter at work as soon as it exists, to be closed with the sequence. A constrained answer
    is also drafted for with what its constraint forces.
    """
    if chooser.course is not None and settings.drafters:
        settings = replace(settings, drafters=(*settings.drafters, Forced()))

    def start(slot: Slot) -> Started:
        exactness = decoder.exactness() if settings.exact else None
        if exactness is not None and exactness.kind == "none":
            raise InvalidSettingError(
                f"exact must be False for {decoder.name!r} in {decoder.precision!r}: every number of tokens in a run "
                "gives its own logits; or use another precision"
            )
        padded = exactness is not None and exactness.kind == "padded"
        target = SlotTarget(slot, padded=padded)
        pace = decoder.pace(padded=padded)
        host = Host(decoder, slot, chooser)
        draftings = []
        for drafter in settings.drafters:
            draftings.append(drafter.start(prompt, host))
            hold(draftings[-1])
        costs = Costs(pace, [_cost(drafter) for drafter in settings.drafters])
        chances = [drafter.chances for drafter in settings.drafters]
        controller = Controller(chances, costs, most=settings.most, length=settings.length)
        speculator = Speculator(
            target,
            chooser,
            draftings,
            controller,
            settings,
            ends=decoder.end_tokens,
            vocabulary=decoder.vocabulary,
        )
        return Started(target, speculator)

    return start


def _cost(drafter: Drafter) -> float:
    seconds = drafter.cost()
    if not is_number(seconds) or not 0 <= seconds < math.inf:
        raise InvalidSettingError(f"the cost of drafter {drafter.name!r} must be seconds, 0 or more, got {seconds!r}")
    return seconds
