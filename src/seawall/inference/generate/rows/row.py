"""One request at work in a batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from seawall.inference.errors import InvalidSettingError

from ..answer import Answer
from ..choosing import Chooser
from ..exactness import Kind
from ..slot import Array, Slot
from ..speculation.drafter import Drafting
from ..speculation.settings import Speculation, resolved
from ..speculation.speculator import Speculator
from ..speculation.starting import begin
from ..speculation.statistics import SpeculationStatistics
from .request import Request

if TYPE_CHECKING:
    from ..decoder import Decoder


class Row:
    """A request that has joined a batch. `ContinuousBatch` advances it; the rest of the world reads it.

    Attributes:
        request: what was asked.
        paused: set it between steps to leave the row out of them; it keeps its cache.
        cached_tokens: how many tokens of the prompt were found in a cache, or were read by a row that shares them.
        error: why it ended, where it failed.
    """

    def __init__(self, request: Request, index: int, chooser: Chooser, answer: Answer, *, number: int) -> None:
        self.request = request
        self.paused = False
        self.cached_tokens = 0
        self.error: Exception | None = None
        self.index = index
        self.number = number  # of those that joined
        self.length = 0  # tokens in the cache
        self.left = False
        self.chooser = chooser
        self.answer = answer
        self.names: list[bytes] = []  # of the prompt's blocks that need not be computed where they are known
        self.padded = False  # single tokens run as two
        self.drafts: Speculation | None = None
        self.speculator: Speculator | None = None  # once the prompt is read
        self.pinned = False  # a draft model may work in its cache, where that lies now
        self._held: list[Drafting] = []

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.request.prompt)

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far, an end token included."""
        return self.answer.tokens

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is unread."""
        return not self.answer.tokens and not self.finished

    @property
    def untouched(self) -> bool:
        """Whether it has computed nothing itself."""
        return self.length == self.cached_tokens

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to come: the answer is complete, or it failed, or it left."""
        return self.left or self.error is not None or self.answer.finish is not None

    @property
    def speculation(self) -> SpeculationStatistics | None:
        """What speculation did so far; None without it, and before the first token."""
        return None if self.speculator is None else self.speculator.statistics()

    @property
    def drafted_tokens(self) -> int:
        """Tokens proposed and verified."""
        return 0 if self.speculator is None else self.speculator.statistics().drafted

    @property
    def accepted_tokens(self) -> int:
        """Proposed tokens that the model agreed with."""
        return 0 if self.speculator is None else self.speculator.statistics().accepted

    @property
    def pending(self) -> int:
        """The last decided token, which the model has not read."""
        return self.answer.tokens[-1]

    def begin(self, decoder: Decoder, cache: Array) -> None:
        """Begin to speculate, if that is asked for; the prompt has been read into `cache`, as of a slot."""
        if self.drafts is None or self.speculator is not None:
            return
        start = begin(decoder, self.drafts, self.chooser, self.request.prompt, self._held.append)
        slot = Slot(decoder._session, decoder._config, cache.shape[4], decoder.kv, cache=cache)
        self.speculator = start(slot).speculator
        self.pinned = any(drafter.cost() > 0 for drafter in self.drafts.drafters)

    def close(self) -> None:
        """Let its drafters go, all of them, whatever one raises."""
        with ExitStack() as held:
            while self._held:
                held.callback(self._held.pop(0).close)


def new_row(request: Request, decoder: Decoder, *, index: int, number: int, kind: Kind) -> Row:
    """A row at the beginning of its prompt. Raises InvalidSettingError, of which ConstraintError is one."""
    drafts = resolved(request.speculation, decoder._speculation)
    if drafts and drafts.exact and kind == "none":
        raise InvalidSettingError(
            f"exact must be False for {decoder.name!r} in {decoder.precision!r}: every number of tokens in a run gives "
            "its own logits; or use another precision"
        )
    chooser = Chooser(
        request.sampling,
        request.penalties,
        request.prompt,
        vocabulary=decoder._words,
        constraint=request.constraint,
        logprobs=request.logprobs,
    )
    limit = min(request.max_tokens, decoder.context - len(request.prompt))
    answer = Answer(decoder._codec, chooser, ends=decoder.end_tokens, limit=limit, stop=request.stop)
    row = Row(request, index, chooser, answer, number=number)
    if drafts:
        row.drafts = drafts
        row.padded = drafts.exact and kind == "padded"
    return row
