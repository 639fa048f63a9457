"""What a row is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from seawall.inference.errors import InvalidSettingError

from ..choosing import Penalties
from ..constraints import Constraint
from ..sampling import Greedy, Sampling
from ..speculation.settings import Speculation
from ..text import checked_stops


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how to answer it; the settings are those of `Decoder.start`.

    Attributes:
        prompt: tokens, as `Decoder.encode_chat` gives them.
        max_tokens: of the answer; the context may end it earlier.
        sampling: how tokens are chosen. Samples of one prompt are requests that differ in its seed.
        penalties: against repetition.
        stop: strings that end the answer before them.
        constraint: what the answer may look like.
        logprobs: how many likely tokens each step names, 0 to 20; None for no logprobs.
        speculation: how to draft; None as the decoder was loaded, False not at all.
        salt: whose prompt it is. Prompts are shared between equal salts only, so a tenant can't learn from the time
            to the first token what another has asked (CVE-2025-46570).
    """

    prompt: tuple[int, ...] = field(repr=False)
    max_tokens: int
    sampling: Greedy | Sampling = Greedy()  # noqa: RUF009 - frozen
    penalties: Penalties | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None
    logprobs: int | None = None
    speculation: Speculation | Literal[False] | None = None
    salt: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        prompt: Any = self.prompt
        if not isinstance(prompt, (str, bytes)):  # a text is refused with advice when the request joins
            object.__setattr__(self, "prompt", tuple(prompt))
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise InvalidSettingError(f"max_tokens must be a whole number of at least 1, got {self.max_tokens!r}")
        if not isinstance(self.salt, bytes):
            raise InvalidSettingError(f"salt must be bytes, got {type(self.salt).__name__}")
        object.__setattr__(self, "stop", checked_stops(self.stop))
