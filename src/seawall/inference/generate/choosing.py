"""Who chooses the tokens of one answer: by which rules, with which noise, penalising what was said before."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from seawall.inference.errors import ConstraintError, InvalidSettingError

from .constraints import Constraint, Course, Vocabulary
from .sampling import Greedy, Logits, Sampling, distribution, draw, greedy, is_number

_WORD = (1 << 64) - 1
_MOST_LOGPROBS = 20  # as in OpenAI's API
_STRIDE = 0xD1342543DE82EF95  # odd, so that no two positions of an answer share a key


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Makes repetition less likely, before the temperature. The defaults change nothing.

    Attributes:
        repetition: divides the positive logits, and multiplies the negative ones, of every token that stands in
            the prompt or the answer (Keskar et al., arXiv 1909.05858); from 0.01 to 100, and above 1 to penalise.
        presence: subtracted from the logits of tokens that stand in the answer, in [-100, 100].
        frequency: subtracted once for each time that a token stands in the answer, in [-100, 100].
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.repetition) or not 0.01 <= self.repetition <= 100:
            raise InvalidSettingError(f"repetition must be from 0.01 to 100, got {self.repetition!r}")
        for name in ("presence", "frequency"):
            if not is_number(value := getattr(self, name)) or not -100 <= value <= 100:
                raise InvalidSettingError(f"{name} must be in [-100, 100], got {value!r}")


def penalised(logits: Logits, rules: Penalties, prompt: set[int], answer: Counter[int]) -> Logits:
    """A copy of the logits with the penalties taken off."""
    logits = logits.copy()
    said = np.fromiter(answer, dtype=np.int64, count=len(answer))
    if rules.repetition != 1:
        everything = np.fromiter(prompt | answer.keys(), dtype=np.int64)
        found = logits[everything]
        logits[everything] = np.where(found > 0, found / rules.repetition, found * rules.repetition)
    if len(said) and (rules.presence or rules.frequency):
        times = np.fromiter(answer.values(), dtype=np.float32, count=len(answer))
        logits[said] -= np.float32(rules.presence) + np.float32(rules.frequency) * times
    return logits


_Bytes: TypeAlias = bytes  # the field of this name hides it


class TokenLogprob(NamedTuple):
    """How likely the model thought one token.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        bytes: what it stands for, often a part of a character; nothing for control tokens.
    """

    token: int
    logprob: float
    bytes: _Bytes


class Logprobs(NamedTuple):
    """What the model itself thought at one position: before penalties, constraint, temperature and narrowing.

    Attributes:
        chosen: the token that stands there.
        top: the likeliest tokens, likeliest first; the chosen one need not be among them.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


def logprobs_of(logits: Logits, token: int, top: int, bytes_of: Callable[[int], bytes]) -> Logprobs:
    """The log-softmax of the logits, at one token and at the `top` largest; the first of equals."""
    largest = logits.max()
    whole = float(largest) + math.log(np.exp(logits - largest).sum(dtype=np.float64))
    top = min(top, len(logits))
    best = np.flatnonzero(logits >= np.partition(logits, -top)[-top]) if top else np.arange(0)
    best = best[np.argsort(-logits[best], kind="stable")][:top]
    chosen, *others = (TokenLogprob(one, float(logits[one]) - whole, bytes_of(one)) for one in (token, *best.tolist()))
    return Logprobs(chosen, tuple(others))


def _check_kinds(sampling: object, penalties: object, constraint: object) -> None:
    """Settings of the wrong type would fail in the middle of an answer, far from whoever gave them."""
    if not isinstance(sampling, (Greedy, Sampling)):
        raise InvalidSettingError(f"sampling must be Greedy() or Sampling(...), got {sampling!r:.200}")
    if not (penalties is None or isinstance(penalties, Penalties)):
        raise InvalidSettingError(f"penalties must be Penalties(...) or None, got {penalties!r:.200}")
    if constraint is not None and (isinstance(constraint, type) or not isinstance(constraint, Constraint)):
        raise InvalidSettingError(
            f"constraint must be JsonSchema(...), Regex(...) or another Constraint, or None, got {constraint!r:.200}"
        )


class Chooser:
    """Chooses the tokens of one answer.

    The choice at a position depends on the logits, the tokens before it and the seed, and on nothing else: not on
    who asks, how often, or in which order. So a drafter can ask what the target would choose.

    Attributes:
        sampling: the rules.
        position: how many tokens of the answer are decided.
        course: where the answer stands in its constraint, if it has one.
    """

    def __init__(
        self,
        sampling: Greedy | Sampling,
        penalties: Penalties | None = None,
        prompt: Sequence[int] = (),
        *,
        vocabulary: Vocabulary | None = None,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> None:
        _check_kinds(sampling, penalties, constraint)
        if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= _MOST_LOGPROBS):
            raise InvalidSettingError(
                f"logprobs must be a whole number from 0 to {_MOST_LOGPROBS}, or None, got {logprobs!r}"
            )
        self.sampling = sampling
        self.position = 0
        self.course: Course | None = None
        if constraint is not None:
            assert vocabulary is not None
            self.course = Course(constraint.matcher(vocabulary), vocabulary.ends)
        self._vocabulary = vocabulary
        self._top = logprobs
        self._logprobs: deque[Logprobs] = deque()
        self._penalties = None if penalties == Penalties() else penalties
        self._prompt = set(prompt) if self._penalties else set()
        self._answer: Counter[int] = Counter()
        seed = sampling.seed if isinstance(sampling, Sampling) else 0
        self._seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])

    def choose(self, logits: Logits, drafted: Sequence[int] = ()) -> int:
        """The token after the decided ones and `drafted`."""
        logits = self._allowed(logits, drafted)
        if isinstance(self.sampling, Greedy):
            return greedy(logits)
        return draw(logits, self.sampling, self._key(drafted))[0]

    def choose_with_lead(self, logits: Logits, drafted: Sequence[int] = ()) -> tuple[int, float]:
        """The same, and by how much logit the choice won: where that is little, another model may choose otherwise."""
        logits = self._allowed(logits, drafted)
        if isinstance(self.sampling, Greedy):
            best = greedy(logits)
            top = logits[best]
            logits[best] = -np.inf  # far quicker than a copy
            lead = float(top - logits.max())
            logits[best] = top
            return best, lead
        token, lead = draw(logits, self.sampling, self._key(drafted))
        return token, lead * self.sampling.temperature

    def probabilities(self, logits: Logits, drafted: Sequence[int] = ()) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The whole distribution that the choice is drawn from, [vocabulary]; certainty where it is greedy."""
        logits = self._allowed(logits, drafted)
        whole = np.zeros(len(logits))
        if isinstance(self.sampling, Greedy):
            whole[greedy(logits)] = 1.0
            return whole
        tokens, found = distribution(logits, self.sampling)
        whole[slice(None) if tokens is None else tokens] = found
        return whole

    def decide(self, token: int, logits: Logits) -> None:
        """Say which token stands at the position, and what the model said there; the next one comes after it."""
        self.position += 1
        if self._penalties:
            self._answer[token] += 1
        if self.course is not None:
            self.course.decide(token)
        if self._top is not None:
            assert self._vocabulary is not None
            self._logprobs.append(logprobs_of(logits, token, self._top, self._vocabulary.bytes_of))

    def logprobs(self) -> Logprobs | None:
        """Those of the earliest decided token that they were not yet asked of; None if nobody wanted any."""
        return self._logprobs.popleft() if self._logprobs else None

    def likelihood(self, logits: Logits, token: int, drafted: Sequence[int] = ()) -> float:
        """Probability of one token, by the rules; of a greedy choice, as if it were drawn at temperature 1."""
        if isinstance(self.sampling, Sampling):
            return float(self.probabilities(logits, drafted)[token])
        logits = self._allowed(logits, drafted)
        if logits[token] == -np.inf:
            return 0.0
        top = logits[greedy(logits)]
        return float(np.exp(logits[token] - top) / np.exp(logits - top).sum(dtype=np.float64))

    def generator(self, stream: int) -> np.random.Generator:
        """A random generator of this answer's own, for whatever is drawn besides its tokens; each stream another."""
        return np.random.default_rng([self._seed, stream])

    def _allowed(self, logits: Logits, drafted: Sequence[int]) -> Logits:
        if self._penalties is not None:
            logits = penalised(logits, self._penalties, self._prompt, self._answer + Counter(drafted))
        if self.course is not None and (mask := self.course.allowed(drafted)) is not None:
            if np.shape(mask) != logits.shape:
                raise ConstraintError(
                    f"a constraint must allow or forbid each of the {len(logits)} tokens, got {mask!r:.80}"
                )
            logits = np.where(mask, logits, np.float32(-np.inf))
        return logits

    def _key(self, drafted: Sequence[int]) -> int:
        return (self._seed + (self.position + len(drafted) + 1) * _STRIDE) & _WORD
