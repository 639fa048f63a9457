"""How an answer is wanted: the settings of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from seawall.inference.errors import InvalidSettingError

if TYPE_CHECKING:
    from seawall.inference.generate.choosing import Penalties
    from seawall.inference.generate.constraints import Constraint
    from seawall.inference.generate.sampling import Greedy, Sampling

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
MOST_SAMPLES = 128


class AnswerOptions(TypedDict, total=False):
    """The same as keywords, for what passes them on."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: Sequence[str]
    penalties: Penalties | None
    logprobs: int | None
    constraint: Constraint | None
    n: int
    chat: bool
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How one call wants its answers; `Engine.stream` takes them by name. `dataclasses.replace` makes a changed one.

    Attributes:
        max_tokens: of the answer, at most.
        temperature: 0 for greedy; see `Sampling` for it and those after it.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities add up to this.
        min_p: keep what is at least this fraction as likely as the likeliest.
        seed: makes a drawn answer repeatable; sample i draws with `seed + i`.
        stop: texts that end the answer, and are no part of it.
        penalties: against repetition.
        logprobs: how many of the likeliest tokens to tell for each position, with their log-probabilities.
        constraint: what the answer may look like.
        n: samples; their pieces come mixed, each with its `index`.
        chat: False reads the prompt verbatim, without the model's chat template.
        tenant: whose call it is: tenants share the engine fairly, and no cached prompts.

    Raises:
        InvalidSettingError: a setting is outside its range; a `ValueError`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    penalties: Penalties | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None
    n: int = 1
    chat: bool = True
    tenant: str = ""

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise InvalidSettingError(f"max_tokens must be a whole number of at least 1, got {self.max_tokens!r}")
        if type(self.n) is not int or not 1 <= self.n <= MOST_SAMPLES:
            raise InvalidSettingError(f"n must be a whole number from 1 to {MOST_SAMPLES}, got {self.n!r}")
        if not isinstance(self.tenant, str):
            raise InvalidSettingError(f"tenant must be a str, got {self.tenant!r}")
        object.__setattr__(self, "tenant", str.__str__(self.tenant))  # an enum of strings has hashes of its own
        if isinstance(self.stop, str) or not isinstance(self.stop, Sequence):
            raise InvalidSettingError(f"stop must be a list of strings, such as {[str(self.stop)]}, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        constraint = self.constraint
        if constraint is not None and (isinstance(constraint, type) or not hasattr(constraint, "matcher")):
            raise InvalidSettingError(
                "constraint must be a Regex, JsonSchema, Choice or Grammar, or one of your own, such as "
                f"Regex('[0-9]+'), got {constraint!r:.200}"
            )
        self.sampling()

    def sampling(self, index: int = 0) -> Greedy | Sampling:
        """How tokens of sample `index` are chosen; its seed is `seed + index`."""
        from seawall.inference.generate.sampling import Greedy, Sampling

        greedy = self.temperature == 0
        drawn = Sampling(  # for greedy as well: it checks
            temperature=1.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed + index if self.seed is not None and index else self.seed,
        )
        return Greedy() if greedy else drawn
