"""The one impure edge: runs a row of guards around a call.

It reads the clock twice a call, holds one process-wide lock while guards decide, waits without it, and
delivers events after it. Whatever entered exits exactly once, in reverse, however the call ends. One thing can
break that: a signal handler that raises (Ctrl-C) in the few instructions between two of our own `try` blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, cast

from seawall.core import events
from seawall.core.locking import lock as lock  # noqa: PLC0414 - the others take it from here
from seawall.core.protocol import AWAKE, Guard, GuardPerCall, Judge, Token, Wait
from seawall.core.sleeping import MakeSleeper, async_sleeper, no_sleeper, on_asyncio, on_trio, sync_sleeper
from seawall.core.timers import arm

if TYPE_CHECKING:
    from seawall.core.watching import Watch

Clock = Callable[[], float]

clock: Clock = time.monotonic  # read through the module, so that use_clock reaches every call
sleep: Callable[[float], object] = time.sleep  # how a plain function's policies pass the time; with the clock
_pending = events.pending


@contextmanager
def use_clock(replacement: Clock) -> Iterator[None]:
    """Tell every guard this clock's time (seconds, never going back) until the block ends. For tests.

    If it has a method `sleep`, pauses of plain functions call that instead of `time.sleep`.
    """
    global clock, sleep
    before = clock, sleep
    clock, sleep = replacement, getattr(replacement, "sleep", sleep)
    try:
        yield
    finally:
        clock, sleep = before


def now() -> float:
    """The time guards are told: monotonic seconds."""
    return clock()


def pause_sync(seconds: float) -> bool:
    """Let `seconds` pass in a plain function. False, at once, where that would block an event loop."""
    if on_asyncio() or on_trio():
        return False
    sleep(seconds)
    return True


def bed(wait: Wait, sleeper: MakeSleeper) -> Wait:
    """Say where `wait` sleeps. With the lock held still: whoever wakes it must find it there."""
    wait.__traceback__ = None  # or its frames live as long as it does
    try:
        found = sleeper()
    except BaseException:  # no event loop that we know
        wait.abandon(clock())
        raise
    if found is None:  # who can't sleep is refused
        return wait
    wait.sleeper = found
    if wait.begin is not None:
        wait.begin()
    if wait.granted or wait.woken:  # meanwhile, by a finaliser that ran as the sleeper was made
        wait.woken = False
        found.ring()  # type: ignore[attr-defined]
    return wait


class Row:
    """Neighbouring guards, outermost first, run in one frame. Holds nothing of any call: that is the token list.

    A guard that issues deadlines is the last of its row, so that what comes further in, waiting included, runs in time.
    """

    __slots__ = ("enters", "exits", "guards", "judging", "members", "per_call", "timed")

    def __init__(self, members: tuple[Guard | GuardPerCall, ...]) -> None:
        self.members = members
        self.per_call = any(hasattr(member, "guard_for") for member in members)
        self.judging = any(getattr(member, "judges", False) for member in members)
        self.timed = bool(members) and getattr(members[-1], "issues_deadlines", False)  # its token is an Expiry
        self._bind(() if self.per_call else members)  # type: ignore[arg-type]

    def _bind(self, guards: tuple[Guard, ...]) -> None:
        self.guards = guards
        self.enters = tuple([guard.enter for guard in guards])
        self.exits = tuple([guard.exit for guard in reversed(guards)])

    def for_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Row:
        """The row of the call with these arguments: with the guard that each `GuardPerCall` chose for it."""
        if not self.per_call:
            return self
        row = object.__new__(Row)
        row.members, row.per_call, row.judging, row.timed = self.members, False, self.judging, self.timed
        row._bind(tuple([self._chosen(member, args, kwargs) for member in self.members]))
        return row

    def _chosen(self, member: Guard | GuardPerCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Guard:
        choose = getattr(member, "guard_for", None)
        if choose is None:
            return cast(Guard, member)
        guard: Guard = choose(args, kwargs)
        for flag in ("issues_deadlines", "judges"):  # the frame was made without
            if getattr(guard, flag, False) and not getattr(member, flag, False):
                raise TypeError(f"{member!r} chose {guard!r}, so it needs {flag} = True as well")
        return guard

    async def enter(self, tokens: list[Token], wait: Wait | None = None) -> None:
        """Let one call in, from `wait` on if it already asked; waits where a guard says so."""
        if wait is None:
            wait = self._ask(tokens, async_sleeper)
        while wait is not None:
            sleeper = wait.sleeper
            try:
                await sleeper.sleep(wait.until - clock(), wait.after)
            except BaseException as exc:
                sleeper.rise()
                self._give_up(tokens, wait, exc)
                raise
            sleeper.rise()
            wait = self._go_on(tokens, wait, async_sleeper)
        if _pending:
            self._deliver(tokens)

    def enter_sync(self, tokens: list[Token], wait: Wait | None = None) -> None:
        """`enter` for plain functions. Never blocks a thread that runs an event loop: there it refuses."""
        if wait is None:
            wait = self._ask(tokens, sync_sleeper)
        while wait is not None:
            if wait.sleeper is AWAKE:
                self._refuse(tokens, wait)
            try:
                if sleep is time.sleep or wait.until == math.inf:
                    wait.sleeper.sleep_sync(wait.until - clock())
                else:  # on a clock of its own, which only this moves on
                    sleep(max(0.0, wait.until - clock()))
            except BaseException as exc:
                self._give_up(tokens, wait, exc)
                raise
            wait = self._go_on(tokens, wait, sync_sleeper)
        if _pending:
            self._deliver(tokens)

    def _go_on(self, tokens: list[Token], wait: Wait, sleeper: MakeSleeper) -> Wait | None:
        """Awake: the next wait, or None once all have let the call in."""
        if wait.granted:  # before it was woken, so this needs no lock
            tokens.append(wait.token)
        elif not self._resume(tokens, wait, sleeper):
            return wait
        if _pending:
            self._deliver(tokens)
        return self._ask(tokens, sleeper) if len(tokens) < len(self.guards) else None

    def enter_now(self) -> list[Token]:
        """`enter` for callers that can't wait."""
        tokens: list[Token] = []
        wait = self._ask(tokens, no_sleeper)
        if wait is not None:
            self._refuse(tokens, wait)
        if _pending:
            self._deliver(tokens)
        return tokens

    def _deliver(self, tokens: list[Token]) -> None:
        try:
            events.deliver()
        except BaseException as exc:  # Ctrl-C or SystemExit in a listener: the call never starts
            self.fail(tokens, exc)
            raise

    def _ask(self, tokens: list[Token], sleeper: MakeSleeper) -> Wait | None:
        """Enter the guards that `tokens` lacks. Stops at one that says "not yet" and returns its wait."""
        try:
            with lock:
                moment = clock()
                try:
                    for enter in self.enters[len(tokens) :]:
                        tokens.append(enter(moment))
                except Wait as wait:
                    return bed(wait, sleeper)
        except BaseException as exc:
            self.fail(tokens, exc)
            raise
        return None

    def _resume(self, tokens: list[Token], wait: Wait, sleeper: MakeSleeper) -> bool:
        try:
            with lock:
                try:
                    tokens.append(wait.resume(clock()))
                except Wait as again:
                    again.after = None
                    bed(again, sleeper)
                    return False
        except BaseException as exc:
            self.fail(tokens, exc)
            raise
        return True

    def _refuse(self, tokens: list[Token], wait: Wait) -> NoReturn:
        """The caller can't sleep."""
        try:
            with lock:
                wait.abandon(clock())
                raise wait.refuse(clock())
        except BaseException as exc:
            self.fail(tokens, exc)
            raise

    def _give_up(self, tokens: list[Token], wait: Wait, exc: BaseException) -> None:
        """The call left while it waited."""
        try:
            with lock:
                wait.abandon(clock())
        except BaseException as failure:
            self.fail(tokens, failure)
            raise
        self.fail(tokens, exc)

    def fail(self, tokens: list[Token], exc: BaseException, watch: Watch | None = None) -> None:
        """Leave with `exc`; raise what a guard put in its place, return if it stays as it is."""
        outcome = self.leave(tokens, exc)
        if watch is not None:
            watch.end(outcome)
        try:
            if outcome is not None and outcome is not exc:
                raise outcome from exc
        finally:
            del outcome, exc  # or this frame, its traceback and the error would be a cycle

    def arm(self, tokens: list[Token]) -> bool:
        """Start the deadline of this call in the current task; False where asyncio does not run."""
        return arm(tokens[-1], clock(), clock)  # type: ignore[arg-type]

    def leave_well(self, tokens: list[Token], watch: Watch | None = None, result: object = None) -> None:
        """The call returned. Raises what a guard says instead."""
        outcome = self.leave(tokens, None, result)
        if watch is not None:
            watch.end(outcome)
        if outcome is not None:
            try:
                raise outcome
            finally:
                del outcome

    def leave(self, tokens: list[Token], exc: BaseException | None, result: object = None) -> BaseException | None:
        """The call ended with `exc`. Exits what `tokens` entered, innermost first; returns what to raise, or None."""
        read = clock
        while tokens:
            try:
                if self.judging:  # runs code of the user's, so without the lock and one guard at a time
                    exc = self._judged(tokens, exc, result)
                with lock:
                    moment = read()
                    for leave in self.exits[len(self.exits) - len(tokens) :]:
                        try:
                            leave(tokens.pop(), moment, exc)
                        except BaseException as replacement:
                            exc = replacement.with_traceback(None)
                        if self.judging:
                            break
            except BaseException as interruption:  # Ctrl-C as we took the lock: the rest must leave all the same
                exc = interruption.with_traceback(None)
                read = time.monotonic  # should it be a clock of the user's that fails
        if _pending:
            try:
                events.deliver()
            except BaseException as interruption:  # Ctrl-C in a listener
                exc = interruption.with_traceback(None)
        return exc

    def _judged(self, tokens: list[Token], exc: BaseException | None, result: object) -> BaseException | None:
        """Let the guard that leaves next look at the outcome."""
        guard = self.guards[len(tokens) - 1]
        try:
            if getattr(guard, "judges", False):
                cast(Judge, guard).judge(tokens[-1], result, exc)
        except BaseException as interruption:  # Ctrl-C in a predicate
            return interruption.with_traceback(None)
        return exc
