"""Choosing the next token. Pure: logits and a key for the noise in, a token out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidSettingError, RuntimeFailure

Logits = np.ndarray[Any, np.dtype[np.float32]]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NEGLIGIBLE = 12.0  # e^-12: candidates below this share of the best are rarely in the nucleus


@dataclass(frozen=True, slots=True)
class Greedy:
    """Always the likeliest token; the first of equals. The same prompt gives the same answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Draw from the model's distribution, narrowed in this order: temperature, top_k, top_p, min_p.

    The defaults draw from the whole distribution. A `seed` makes the answer repeatable on one machine, with
    speculation or without; without it every sequence is seeded by the operating system.

    Attributes:
        temperature: from 1e-30 to 1e30; below 1 sharpens, above 1 flattens.
        top_k: keep this many of the likeliest; 0 keeps all.
        top_p: keep the likeliest until their probabilities add up to this, in (0, 1].
        min_p: keep what is at least this fraction as likely as the likeliest, in [0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rule = "from 1e-30 to 1e30 (for 0 use Greedy())"  # a logit divided by it has to be a float32
        _check(is_number(self.temperature) and 1e-30 <= self.temperature <= 1e30, "temperature", rule, self.temperature)
        _check(type(self.top_k) is int and self.top_k >= 0, "top_k", "a whole number, 0 or more", self.top_k)
        _check(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _check(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        seeded = type(self.seed) is int and self.seed >= 0
        _check(seeded or self.seed is None, "seed", "a whole number, 0 or more, or None", self.seed)


def is_number(value: object) -> bool:
    """Whether something is an int or a float, numpy's included; True and False are not, nor are fractions."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check(good: bool, name: str, rule: str, value: object) -> None:
    if not good:
        raise InvalidSettingError(f"{name} must be {rule}, got {value!r}")


def greedy(logits: Logits) -> int:
    """The likeliest token; RuntimeFailure where the model gave NaN or infinity."""
    best = int(logits.argmax())  # finds a NaN before any number
    if not math.isfinite(logits[best]):
        raise RuntimeFailure("choosing a token", f"the model's best logit is {logits[best]}")
    return best


def draw(logits: Logits, rules: Sampling, key: int) -> tuple[int, float]:
    """Draw one token by the rules, and its lead: how far the noise would have to move for another token to win.

    Every candidate runs a race, whose noise depends on `key` and on its own id alone (the Gumbel-max trick). So one
    key gives one token, and two models that nearly agree give the same one nearly always, whichever is asked first:
    where they differ by a total variation of d, with probability (1 - d) / (1 + d) or more (Daliri et al.,
    arXiv 2408.07978). A draft model that draws with the target's keys guesses what the target will draw.
    """
    if rules.top_k == 0 and rules.top_p == 1 and rules.min_p == 0:
        return _race_of_all(logits, rules, key)
    ids, weights = distribution(logits, rules)
    return _race(np.arange(len(logits)) if ids is None else ids, weights, key)


def _race(ids: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], key: int) -> tuple[int, float]:
    times = noise(key, ids) / np.maximum(weights, 1e-300)
    first = int(times.argmin())
    won = float(times[first])
    times[first] = math.inf
    return int(ids[first]), math.log(float(times.min()) / won)


def _race_of_all(logits: Logits, rules: Sampling, key: int) -> tuple[int, float]:
    """The race of the whole vocabulary: those far behind run as one, and among themselves only if that one wins.

    Their fastest time is distributed like that of one runner of their weight, so nothing is approximated, and no
    logarithm is taken of 49,152 numbers.
    """
    top = logits[greedy(logits)]
    near = np.flatnonzero(logits >= top - _NEGLIGIBLE * rules.temperature)
    weights = np.exp((logits[near].astype(np.float64) - top) / rules.temperature)
    far = np.exp((logits - top) / np.float32(rules.temperature))
    far[near] = 0
    rest = float(far.sum(dtype=np.float64))
    if rest == 0:
        return _race(near, weights, key)
    token, lead = _race(np.append(near, len(logits)), np.append(weights, rest), key)
    if token < len(logits):
        return token, lead
    others = np.flatnonzero(far)
    return _race(others, far[others].astype(np.float64), key)


def noise(key: int, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Exponentially distributed numbers, one for each token: SplitMix64 begun at `key`, at the token's own place."""
    mixed = tokens.astype(np.uint64) * _GOLDEN + np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(np.minimum(uniform, 1 - 2.0**-53))  # never of 0, nor of 1, which the last one is rounded to


def distribution(logits: Logits, rules: Sampling) -> tuple[np.ndarray[Any, Any] | None, np.ndarray[Any, Any]]:
    """The narrowed distribution: candidate tokens (None for all, in order) and their probabilities.

    Exact for all rules. A full sort of 49,152 logits takes milliseconds, so only those near the best are
    sorted, and more of them only where those near the best do not settle the question.
    """
    top = float(logits[greedy(logits)])
    if rules.top_k == 0 and rules.top_p == 1 and rules.min_p == 0:
        weights = np.exp((logits.astype(np.float64) - top) / rules.temperature)
        return None, weights / weights.sum()
    whole = _mass(logits, top, rules) if rules.top_p < 1 and not rules.top_k else 0.0
    order = _candidates(logits, top, rules, whole)
    weights = np.exp((logits[order].astype(np.float64) - top) / rules.temperature)
    if rules.top_k:
        order, weights = order[: rules.top_k], weights[: rules.top_k]
        whole = float(weights.sum())
    if rules.top_p < 1:
        mass_of_likelier = weights.cumsum() - weights
        keep = int(np.count_nonzero(mass_of_likelier < rules.top_p * whole))
        order, weights = order[:keep], weights[:keep]
    if rules.min_p:
        keep = int(np.count_nonzero(weights >= rules.min_p))  # the likeliest weighs exactly 1
        order, weights = order[:keep], weights[:keep]
    return order, weights / weights.sum()


def _candidates(logits: Logits, top: float, rules: Sampling, whole: float) -> np.ndarray[Any, Any]:
    """Tokens, likeliest first, among which are all that the rules can keep."""
    near = np.flatnonzero(logits >= top - _NEGLIGIBLE * rules.temperature)
    if rules.top_k:
        if len(near) < rules.top_k < len(logits):
            near = np.argpartition(logits, -rules.top_k)[-rules.top_k :]
        settled = len(near) >= rules.top_k
    elif rules.top_p < 1:
        settled = _mass(logits[near], top, rules) >= rules.top_p * whole
    else:
        settled = rules.min_p >= math.exp(-_NEGLIGIBLE)
    if not settled:
        near = np.arange(len(logits))
    return near[np.argsort(-logits[near], kind="stable")]


def _mass(logits: Logits, top: float, rules: Sampling) -> float:
    """Sum of the unnormalised probabilities, the likeliest weighing 1."""
    return float(np.exp((logits - np.float32(top)) / np.float32(rules.temperature)).sum(dtype=np.float64))
