"""Drafts from a smaller model: the target's own weights in fewer bits, or another model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from seawall.inference.errors import DecoderClosedError, InvalidSettingError
from seawall.inference.runtime import ort

from ..slot import CHUNK, Slot
from .drafter import Host, Proposal, Turn
from .verify import Probabilities, sample

if TYPE_CHECKING:
    from seawall.inference.generate.decoder import Decoder
    from seawall.inference.generate.sampling import Logits

_LEADS = (0.25, 0.5, 1.0, 2.0)  # logits; a narrower lead is where another precision chooses otherwise
_STREAM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDraft:
    """Proposes what another decoder would say.

    Where that decoder is the same model in fewer bits (self-speculation), it drafts in the target's own
    key/value cache: it reads no prompt, keeps nothing of its own, has nothing to catch up with after a rejection,
    and guesses better than with a cache of its own, since the past it sees is the target's (int8 for fp32, greedy:
    0.92 of five drafted tokens accepted against 0.85). What it writes is overwritten by the verification.

    Attributes:
        decoder: the draft model, loaded; closing it is yours.
        share: False keeps a cache of its own even where the target's would do.
        name: labels its statistics.
    """

    decoder: Decoder
    share: bool = True
    name: str = "model"
    chances: tuple[float, ...] = (0.65, 0.85, 0.92, 0.96, 0.985)

    def __post_init__(self) -> None:
        from seawall.inference.generate.decoder import Decoder  # which imports this module

        if not isinstance(self.decoder, Decoder):
            raise InvalidSettingError(f"decoder must be a loaded Decoder, got {self.decoder!r:.200}")

    def cost(self) -> float:
        """A plain pass of the draft model, timed the first time it is asked for."""
        return self.decoder.pace().plain

    def start(self, prompt: Sequence[int], host: Host) -> ModelDrafting:
        """Begin with a sequence; InvalidSettingError if the two do not share a vocabulary."""
        mine, theirs = self.decoder, host.decoder
        if mine._codec.vocabulary_digest != theirs._codec.vocabulary_digest:
            raise InvalidSettingError(
                f"a draft model must have the target's vocabulary, got {mine.name!r} for {theirs.name!r}"
            )
        if mine._session is None:
            raise DecoderClosedError("the draft decoder is closed: load it again")
        alike = mine.name == theirs.name and mine._config == theirs._config and mine.kv == theirs.kv == "fp32"
        if self.share and alike:
            slot = Slot(mine._session, mine._config, theirs.context, cache=host.slot.cache)
            return ModelDrafting(self, prompt, host, slot)
        return ModelDrafting(self, prompt, host, None)


class ModelDrafting:
    """A draft model at work on one sequence."""

    def __init__(self, drafter: ModelDraft, prompt: Sequence[int], host: Host, shared: Slot | None) -> None:
        self._decoder = drafter.decoder
        self._slot: Slot | None = drafter.decoder._lend() if shared is None else shared
        self._shares = shared is not None
        self._context = host.decoder.context if shared else drafter.decoder.context
        self._tokens = list(prompt)
        self._read = 0  # of these tokens, how many the cache holds
        self._ahead: list[int] = []  # what the cache holds beyond them
        self._rng = host.chooser.generator(_STREAM)

    def propose(self, turn: Turn) -> Iterator[Proposal]:
        """Choose as the target would, one token after the other, each seeing those before."""
        if self._shares:  # the target has read all but the last token, and has written over what was drafted
            self._read = len(self._tokens) - 1
        length = min(self._read, len(self._tokens) - 1)
        feed, drafted = self._tokens[length:], list[int]()
        while len(drafted) < turn.most and length + len(feed) <= self._context:
            logits = self._run(feed, length, turn.options)
            length += len(feed)
            self._read, self._ahead = len(self._tokens), list(drafted)
            proposal = self._proposal(logits, drafted, turn)
            drafted.append(proposal.token)
            feed = [proposal.token]
            yield proposal

    def extend(self, token: int) -> None:
        """The sequence grew by a token; what was drafted is kept where it is that token."""
        if self._ahead and self._ahead[0] == token:
            self._read += 1
            del self._ahead[0]
        else:
            self._ahead.clear()
        self._tokens.append(token)

    def close(self) -> None:
        """Give a cache of its own back; twice changes nothing."""
        slot, self._slot = self._slot, None
        if slot is not None and not self._shares:
            self._decoder._take_back(slot)

    def _run(self, tokens: list[int], length: int, options: ort.RunOptions) -> Logits:
        options = ort.run_options() if options is None else options
        assert self._slot is not None
        for start in range(0, len(tokens) - CHUNK, CHUNK):
            self._slot.run(tokens[start : start + CHUNK], length + start, options)
        rest = (len(tokens) - 1) // CHUNK * CHUNK
        return self._slot.run(tokens[rest:], length + rest, options)

    def _proposal(self, logits: Logits, drafted: list[int], turn: Turn) -> Proposal:
        if turn.drawn:
            whole: Probabilities = turn.chooser.probabilities(logits, drafted)
            return Proposal(int(sample(whole, self._rng)), len(_LEADS) // 2, whole)
        token, lead = turn.chooser.choose_with_lead(logits, drafted)
        return Proposal(token, int(np.searchsorted(_LEADS, lead, side="right")))
