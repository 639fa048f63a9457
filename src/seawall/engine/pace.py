"""How fast the engine has been, and so how long things will take. Pure: told what each step did."""

from __future__ import annotations

_WEIGHT = 0.1  # of the newest measurement


class Pace:
    """Running means of what steps took and of how long answers get; each is None until there was one.

    Attributes:
        per_prompt_token: seconds to read one.
        step: seconds of a step that only writes.
        rows: answers that such a step takes further.
        answer: tokens of an answer.
    """

    __slots__ = ("answer", "per_prompt_token", "rows", "step")

    def __init__(self) -> None:
        self.per_prompt_token: float | None = None
        self.step: float | None = None
        self.rows: float | None = None
        self.answer: float | None = None

    def stepped(self, seconds: float, *, read: int, written: int, rows: int) -> None:
        """A step took so long for reading and writing so many tokens, the latter in so many answers."""
        if read:
            writing = self.step or 0.0 if written else 0.0
            self.per_prompt_token = _mean(self.per_prompt_token, max(seconds - writing, seconds / 10) / read)
        elif written:
            self.step = _mean(self.step, seconds * rows / written)  # with speculation a row gets several at once
            self.rows = _mean(self.rows, rows)

    def ended(self, tokens: int) -> None:
        """An answer is whole, with so many tokens."""
        self.answer = _mean(self.answer, tokens)

    def expected(self, most: int) -> float:
        """Tokens that an answer of at most `most` probably gets; optimistic before there was any."""
        return float(most) if self.answer is None else min(most, self.answer)

    def service(self, prompt: int, answer: float) -> float | None:
        """Seconds that such an answer takes once it runs, among as many as usual; None before it can be known."""
        if self.per_prompt_token is None or self.step is None:
            return None
        return prompt * self.per_prompt_token + answer * self.step

    def work(self, prompt: int, answer: float) -> float | None:
        """Seconds of the engine's time that it takes away from others."""
        if self.per_prompt_token is None or self.step is None:
            return None
        return prompt * self.per_prompt_token + answer * self.step / max(1.0, self.rows or 1.0)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _WEIGHT * (value - mean)
