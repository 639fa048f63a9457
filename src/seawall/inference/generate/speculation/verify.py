"""The rules by which drafted tokens are accepted. Pure: probabilities, choices and a random generator in, tokens out.

Two rules, and neither changes what the target says:

* `verify_chosen`: the target chooses at every position as it would alone, and a draft survives for as long as it
  guessed those choices. Greedy answers, and sampled ones with a seed, come out token for token as without drafts.
* `verify_drawn`: the rejection rule of Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318).
  It accepts a little more of a drafter that draws at random, and keeps the distribution instead of the tokens.

Probabilities are float arrays [..., vocabulary] that sum to 1; leading axes are a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Probabilities = np.ndarray[Any, np.dtype[np.float64]]
Tokens = np.ndarray[Any, np.dtype[np.int64]]


def accept(token: Any, target: Probabilities, draft: Probabilities, rng: np.random.Generator) -> Any:
    """Whether to keep `token`, which was drawn from `draft`: with probability min(1, target / draft).

    Written as a product, so a draft that gives its own token no probability divides by nothing; such a token
    is accepted where the target allows it.
    """
    index = np.asarray(token)[..., None]
    wanted = np.take_along_axis(target, index, -1)[..., 0]
    offered = np.take_along_axis(draft, index, -1)[..., 0]
    return rng.random(wanted.shape) * offered < wanted


def residual(target: Probabilities, draft: Probabilities) -> Probabilities:
    """What a rejected position is drawn from: max(0, target - draft), normalised; the target where nothing is left.

    ```python
    import numpy as np

    from seawall.inference.generate.speculation import residual

    print(residual(np.array([0.5, 0.3, 0.2]), np.array([0.8, 0.1, 0.1])).round(3))
    #> [0.    0.667 0.333]
    ```
    """
    left = np.maximum(target - draft, 0.0)
    mass = left.sum(-1, keepdims=True)
    return np.where(mass > 0, left / np.where(mass > 0, mass, 1.0), target)


def sample(probabilities: Probabilities, rng: np.random.Generator) -> Any:
    """A token, or one for each row of a batch."""
    cumulated = probabilities.cumsum(-1)
    heights = rng.random(cumulated.shape[:-1])[..., None] * cumulated[..., -1:]  # the sum is a hair off 1
    return np.minimum((cumulated <= heights).sum(-1), probabilities.shape[-1] - 1)


def accept_or_reject(
    token: Any, target: Probabilities, draft: Probabilities, rng: np.random.Generator
) -> tuple[Any, Any]:
    """Whether the drafted token is accepted, and the token that stands there: it, or one drawn from the residual.

    If `token` was drawn from `draft`, the second is distributed exactly as `target`.
    """
    accepted = accept(token, target, draft, rng)
    if np.all(accepted):
        return accepted, token
    return accepted, np.where(accepted, token, sample(residual(target, draft), rng))


def verify_drawn(
    drafted: Sequence[int],
    draft_at: Callable[[int], Probabilities],
    target_at: Callable[[int], Probabilities],
    rng: np.random.Generator,
    lenient: Callable[[int], bool] | None = None,
) -> list[int]:
    """The tokens that are decided: those accepted, then a correction, or a bonus token where all were accepted.

    `draft_at(i)` is what `drafted[i]` was drawn from, `target_at(i)` the target's distribution after the first
    i of them. `lenient(i)` accepts a token whatever the rule says: lossy.
    """
    decided: list[int] = []
    for place, token in enumerate(drafted):
        if lenient is not None and lenient(place):
            decided.append(token)
            continue
        accepted, taken = accept_or_reject(token, target_at(place), draft_at(place), rng)
        decided.append(int(taken))
        if not accepted:
            return decided
    return [*decided, int(sample(target_at(len(drafted)), rng))]


def verify_chosen(
    drafted: Sequence[int], choose_at: Callable[[int], int], lenient: Callable[[int], bool] | None = None
) -> list[int]:
    """The tokens that are decided: the target's own choices up to the first that was not drafted, that included.

    `choose_at(i)` is what the target chooses after the first i drafted tokens. `lenient(i)` keeps the drafted
    token in its place: lossy.
    """
    decided: list[int] = []
    for place, token in enumerate(drafted):
        kept = lenient is not None and lenient(place)
        decided.append(token if kept else choose_at(place))
        if decided[-1] != token:
            return decided
    return [*decided, choose_at(len(drafted))]


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens that a round decides on average: (1 - a^(k+1)) / (1 - a), for k drafted tokens, each accepted with a.

    ```python
    from seawall.inference.generate.speculation import expected_tokens

    print(expected_tokens(0.5, 3))
    #> 1.875
    ```
    """
    if acceptance >= 1:
        return length + 1.0
    return float((1 - acceptance ** (length + 1)) / (1 - acceptance))
