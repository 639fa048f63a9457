"""The retry itself: its settings and counters, and the loops that run the attempts of a call."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

from seawall.core import gate, watching
from seawall.core.events import Listener
from seawall.core.policy import AroundPolicy
from seawall.core.sleeping import pause
from seawall.policies.retry.loop import Loop
from seawall.policies.retry.rules import Budget, Duration, On, Rules, Stop, Wait
from seawall.policies.retry.run import LONGEST, Run, TimeLimit

T = TypeVar("T")
_OUTCOMES = ("succeeded_without_retry", "succeeded_with_retry", "failed_without_retry", "failed_with_retry")


@dataclass(frozen=True, slots=True)
class RetrySnapshot:
    """A retry's counters, which only grow. Calls that were cancelled are in none of the first four."""

    succeeded_without_retry: int
    succeeded_with_retry: int
    failed_without_retry: int
    failed_with_retry: int
    retries: int


class Retry(Rules, AroundPolicy):
    """Makes a call again that failed, after a pause, up to `attempts` times in all.

    The caller gets the last attempt's own outcome: its exception as it was, or its result. A cancellation ends the
    call at once, whatever `on` says. A callee that says when to come back (`retry_after` on the error) is believed:
    no attempt comes before, and if there is no time to wait that long, the call ends at once. A refusal by a policy
    that does not know when (a full bulkhead) is retried only where `on` names it.

    Args:
        name: labels errors, metrics and logs.
        on: which exceptions to retry: classes, a function of the exception, or one of tenacity's `retry_*` objects.
            There is no default on purpose: retrying what is no passing fault only does harm.
        on_result: which results to retry, as a function of the result.
        attempts: how often the call is made at most, the first time included; None for no limit but time.
        timeout: seconds for all attempts and pauses together. On an event loop an attempt in flight then is
            cancelled; the calls inside see it as their deadline; a plain function can't be stopped, but no
            attempt begins after it.
        wait_initial: seconds of the shortest pause.
        wait_max: seconds of the longest pause; a callee that asks for longer is not waited for unless a `timeout`
            or deadline allows it.
        jitter: draw each pause from `wait_initial` to thrice the one before, so that clients spread out; False
            doubles it exactly.
        wait: decides the pause instead: seconds, a function of the `Attempt`, or one of tenacity's `wait_*` objects.
        stop: decides instead of `attempts`: a function of the `Attempt`, or one of tenacity's `stop_*` objects.
        retry_after: seconds to wait that an exception or result tells, as a function of it; None where it does not.
        budget: a `RetryBudget`, usually shared, that an attempt must be allowed by.
        until_first_item: serve async generators too, opened again only until the first item has come.
        listeners: called with its `RetryScheduled` and `RetryGivenUp` events.

    Raises:
        CallTimeoutError: from a call whose first attempt outlived `timeout`.

    Examples:
        >>> answers = iter([ConnectionError(), "hello"])
        >>> @Retry("greetings", on=ConnectionError, wait=0)
        ... def greet():
        ...     answer = next(answers)
        ...     if isinstance(answer, Exception):
        ...         raise answer
        ...     return answer
        >>> greet()
        'hello'
    """

    kind: ClassVar[str] = "retry"

    def __init__(
        self,
        name: str,
        *,
        on: On,
        on_result: Callable[..., bool] | None = None,
        attempts: int | None = 3,
        timeout: Duration | None = None,
        wait_initial: Duration = 0.1,
        wait_max: Duration = 5.0,
        jitter: bool = True,
        wait: Wait | None = None,
        stop: Stop | None = None,
        retry_after: Callable[..., Duration | None] | None = None,
        budget: Budget | None = None,
        until_first_item: bool = False,
        listeners: Iterable[Listener] = (),
    ) -> None:
        AroundPolicy.__init__(self, name, listeners)
        Rules.__init__(
            self,
            on=on,
            on_result=on_result,
            attempts=attempts,
            timeout=timeout,
            wait_initial=wait_initial,
            wait_max=wait_max,
            jitter=jitter,
            wait=wait,
            stop=stop,
            retry_after=retry_after,
            budget=budget,
        )
        if not isinstance(until_first_item, bool):
            raise TypeError(f"until_first_item must be True or False, got {until_first_item!r}")
        self.until_first_item = self.streams = until_first_item
        self.passed = 0  # successes without a retry
        self._counts = [0, 0, 0]  # successes with one, failures without and with
        self._retries = 0
        self._register()

    @property
    def rescues(self) -> bool:
        """Whether nothing matters but an exception; see `Rescuer`."""
        return not self.watches

    async def around(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run `call` until its outcome is not to be retried, or no attempt may follow."""
        if self.watches:
            return await self._watched(call)
        try:
            result = await call()
        except Exception as exc:
            error = exc
        else:
            self.passed += 1
            return result
        try:
            return await self.rescue(error, call)
        finally:
            del error  # or it, its traceback and this frame would be a cycle

    async def rescue(self, exc: Exception, call: Callable[[], Awaitable[T]]) -> T:
        """The first attempt failed with `exc`: make others."""
        run = Run(self)
        try:
            if run.after(exc, None) is None:
                raise exc
            return await self._attempts(run, call)
        finally:
            run.close()
            del exc

    async def _watched(self, call: Callable[[], Awaitable[T]]) -> T:
        run = Run(self)
        try:
            if run.limit == math.inf:
                return await self._attempts(run, call)
            with TimeLimit(run, after=run.timeout, cancels=True):
                return await self._attempts(run, call)
            return cast(T, run.last())
        finally:
            run.close()

    @staticmethod
    async def _attempts(run: Run, call: Callable[[], Awaitable[T]]) -> T:
        """The attempts from here on; `run` knows of those before."""
        while True:
            if run.pause is not None:
                await pause(run.pause)
                if not run.resume():
                    return cast(T, run.last())
            try:
                first = run.number == 1
                result = await (call() if first else watching.attempt("retry", run.policy.name, run.number, call))
            except Exception as exc:
                if run.after(exc, None) is None:
                    raise
            else:
                if run.after(None, result) is None:
                    return result

    def around_sync(self, call: Callable[[], T]) -> T:
        """The same for plain functions. On a thread that runs an event loop it never pauses: it gives up instead."""
        if self.watches:
            return self._watched_sync(call)
        try:
            result = call()
        except Exception as exc:
            run = Run(self, blocks=True)
            if run.after(exc, None) is None:
                run.close()
                raise
        else:
            self.passed += 1
            return result
        try:
            return self._attempts_sync(run, call)
        finally:
            run.close()

    def _watched_sync(self, call: Callable[[], T]) -> T:
        run = Run(self, blocks=True)
        try:
            if run.limit == math.inf:
                return self._attempts_sync(run, call)
            with TimeLimit(run, after=run.timeout, cancels=False):
                return self._attempts_sync(run, call)
            return cast(T, run.last())
        finally:
            run.close()

    @staticmethod
    def _attempts_sync(run: Run, call: Callable[[], T]) -> T:
        while True:
            if run.pause is not None:
                gate.pause_sync(min(run.pause, LONGEST))
                if not run.resume():
                    return cast(T, run.last())
            try:
                first = run.number == 1
                result = call() if first else watching.attempt_sync("retry", run.policy.name, run.number, call)
            except Exception as exc:
                if run.after(exc, None) is None:
                    raise
            else:
                if run.after(None, result) is None:
                    return result

    async def open_stream(
        self, call: Callable[[], AsyncGenerator[T, Any]]
    ) -> tuple[AsyncGenerator[T, Any] | None, list[T]]:
        """The stream that `call` opens, opened again until its first item has come; from then on it is on its own."""
        stream: AsyncGenerator[T, Any] | None = None
        empty = False

        async def first() -> T | None:
            nonlocal stream, empty
            if stream is not None:
                await stream.aclose()
            stream, empty = call(), False
            try:
                return await stream.__anext__()
            except StopAsyncIteration:
                empty = True
                return None

        try:
            item = await self._watched(first)
        except BaseException:
            if stream is not None:
                await stream.aclose()
            raise
        return (None, []) if empty or stream is None else (stream, [cast(T, item)])

    def loop(self) -> Loop:
        """Retry a block: `for attempt in policy.loop():` (or `async for`), and in it `with attempt:`.

        A block has no result, so `on_result` has no say.

        Examples:
            >>> tries = 0
            >>> for attempt in Retry("search", on=ConnectionError, wait=0).loop():
            ...     with attempt:
            ...         tries += 1
            ...         if attempt.number < 3:
            ...             raise ConnectionError
            >>> tries
            3
        """
        return Loop(self)

    def _count(self, *, failed: bool, retried: bool) -> None:
        with self._lock:
            if failed or retried:
                self._counts[2 * failed + retried - 1] += 1
            else:
                self.passed += 1

    def _adopt(self, fresh: Self, now: float) -> None:
        counted = {"passed": self.passed, "_counts": self._counts, "_retries": self._retries}
        vars(self).update(vars(fresh) | counted)

    def snapshot(self) -> RetrySnapshot:
        """The counters at one moment."""
        with self._lock:
            later, failed, failed_later = self._counts
            return RetrySnapshot(self.passed, later, failed, failed_later, self._retries)

    def counters(self) -> dict[str, int]:
        """What only grows, for exporters: calls by how they ended, and whether it took more than one attempt."""
        with self._lock:
            return dict(zip(_OUTCOMES, (self.passed, *self._counts), strict=True))

    def gauges(self) -> dict[str, float]:
        """What goes up and down, for exporters: nothing."""
        return {}
