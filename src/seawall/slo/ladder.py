"""When to take a step up a ladder of measures and when one down: up quickly, down slowly, never to and fro."""

from __future__ import annotations


class Ladder:
    """Chooses a level from 0 to `top`, from counts of good and bad calls. Pure, and told the time.

    Calls are judged in looks of `step_up` seconds, each from the last change on, so that a step shows what it did
    before the next is taken. A look that burns at `factor` or more, while the alert fires, is a step up; `hold` seconds
    of looks that burn at 1 or less are a step down. Who must go up again within the hold came down too early: the hold
    doubles, to eight times at most, until the bottom was calm for as long.

    Args:
        top: the highest level.
        step_up: seconds of a look, and the least between two steps up.
        hold: seconds of calm before each step down.
        minimum_calls: with fewer in a look, its bad calls say nothing.
    """

    __slots__ = (
        "_bad", "_burning", "_calm_since", "_changed_at", "_down_at", "_good", "_looked_at",
        "_shortest", "hold", "level", "minimum_calls", "step_up", "top",
    )  # fmt: skip

    def __init__(self, top: int, *, step_up: float, hold: float, minimum_calls: int) -> None:
        self.top, self.step_up, self.minimum_calls = top, step_up, minimum_calls
        self.hold = self._shortest = hold
        self.level = 0
        self._looked_at: float | None = None
        self._changed_at = -step_up
        self._calm_since: float | None = None
        self._down_at = float("-inf")
        self._burning = False
        self._good = self._bad = 0

    def configure(self, *, step_up: float, hold: float, minimum_calls: int) -> None:
        """Other settings from now on; a hold that relapses made longer begins anew."""
        self.step_up, self.minimum_calls = step_up, minimum_calls
        if hold != self._shortest:
            self.hold = self._shortest = hold

    def judge(self, now: float, *, alert: bool, factor: float, good: int, bad: int, tolerated: float) -> int:
        """The level from now on; `good` and `bad` are counts that only grow."""
        if self._looked_at is None:
            self._look(now, good, bad)
        elif now - self._looked_at >= self.step_up:
            self._judge_look(factor * tolerated, tolerated, good - self._good, bad - self._bad)
            self._look(now, good, bad)
        if alert and self._burning and self.level < self.top and now - self._changed_at >= self.step_up:
            if now - self._down_at < self.hold:
                self.hold = min(2 * self.hold, 8 * self._shortest)
            self.level += 1
            self._changed_at = now
            self._burning = False
            self._look(now, good, bad)
        elif self._calm_since is not None:
            self._come_down(now)
        return self.level

    def _look(self, now: float, good: int, bad: int) -> None:
        self._looked_at, self._good, self._bad = now, good, bad

    def _judge_look(self, burning: float, calm: float, good: int, bad: int) -> None:
        calls = good + bad
        # A single bad call proves nothing: it may have been in flight when the last step was taken.
        self._burning = calls >= self.minimum_calls and bad > 1 and bad >= burning * calls
        if bad > calm * calls:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = self._looked_at

    def _come_down(self, now: float) -> None:
        """One step for each hold that was calm: several at once after a silence."""
        since = max(self._calm_since or 0.0, self._changed_at)
        while self.level and now - since >= self.hold:
            self.level -= 1
            since += self.hold
            self._changed_at = self._down_at = since
        if not self.level and now - since >= self.hold:
            self.hold = self._shortest
