"""Whether a block left something of ours behind: a place taken, a task running, a thread alive."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seawall.core import registry

_HELD = ("active", "waiting", "queued", "in_flight", "probes")  # of a policy's snapshot: what its calls hold
_CODE = (str(Path(__file__).resolve().parent.parent), "<seawall ")  # files of ours: written, and compiled by the core

Task = asyncio.Task[Any]


class LeakError(AssertionError):
    """Something of seawall outlived the block that used it; the message lists what."""


@contextmanager
def no_leaks() -> Iterator[None]:
    """Raise `LeakError` if the block leaves a permit, a queue place, a task or a thread of seawall behind.

    Policies that the block makes are kept alive until it ends, or a dropped one would hide what it lost. Tasks count
    that seawall started or that run a guarded function, and were not done when the block, or an event loop in it,
    ended.

    Examples:
        >>> from seawall import Bulkhead
        >>> places = Bulkhead("places", max_concurrent=1)
        >>> try:
        ...     with no_leaks():
        ...         permit = places.admit()
        ... except LeakError as error:
        ...     print(error)
        left behind: Bulkhead 'places' has 1 active, 0 before
        >>> permit.cancel()
    """
    threads = set(threading.enumerate())
    tasks = _own_tasks(_running_loop())
    before = {policy: _held(policy) for policy in registry.live()}
    with _kept_policies() as made, _stopped_loops() as interrupted:
        yield
    interrupted |= _own_tasks(_running_loop())
    held = _still_held(before, made)
    if held:  # by garbage, perhaps
        gc.collect()
        held = _still_held(before, made)
    left = [
        *held,
        *(f"task {_name(task)}" for task in interrupted - tasks if not task.done() or task.cancelled()),
        *(f"thread {thread.name}" for thread in threading.enumerate() if thread not in threads and _outlives(thread)),
    ]
    if left:
        raise LeakError(f"left behind: {'; '.join(left)}")


def _still_held(before: dict[object, dict[str, int]], made: Iterable[object]) -> list[str]:
    return [
        f"{type(policy).__name__} {getattr(policy, 'name', '')!r} has {count} {what}, {earlier.get(what, 0)} before"
        for policy, earlier in [*before.items(), *((policy, {}) for policy in made)]
        for what, count in _held(policy).items()
        if count > earlier.get(what, 0)
    ]


def _held(policy: object) -> dict[str, int]:
    """What calls hold of `policy` now, as far as its snapshot tells."""
    snapshot = policy.snapshot() if hasattr(policy, "snapshot") else None
    return {what: count for what in _HELD if isinstance(count := getattr(snapshot, what, None), int)}


@contextmanager
def _kept_policies() -> Iterator[list[object]]:
    """The policies made meanwhile."""
    made: list[object] = []
    register = registry.register

    def remember(policy: object) -> None:
        register(policy)
        made.append(policy)

    registry.register = remember
    try:
        yield made
    finally:
        registry.register = register


@contextmanager
def _stopped_loops() -> Iterator[set[Task]]:
    """Our tasks that were not done when an event loop stopped meanwhile. What closes a loop cancels them first."""
    interrupted: set[Task] = set()
    run_forever = asyncio.BaseEventLoop.run_forever

    def watched(self: asyncio.BaseEventLoop) -> None:
        try:
            run_forever(self)
        finally:
            interrupted.update(_own_tasks(self))

    asyncio.BaseEventLoop.run_forever = watched  # type: ignore[method-assign]
    try:
        yield interrupted
    finally:
        asyncio.BaseEventLoop.run_forever = run_forever  # type: ignore[method-assign]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _own_tasks(loop: asyncio.AbstractEventLoop | None) -> set[Task]:
    """The tasks of `loop` that run code of ours, but for the current one."""
    if loop is None:
        return set()
    current = asyncio.current_task(loop)
    return {task for task in asyncio.all_tasks(loop) if task is not current and _is_ours(task)}


def _is_ours(task: Task) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename.startswith(_CODE)


def _name(task: Task) -> str:
    return f"{task.get_name()} of {getattr(task.get_coro(), '__qualname__', task.get_coro())}"


def _outlives(thread: threading.Thread) -> bool:
    """Whether a thread of ours goes on; one that was told to end gets a moment for it."""
    if not thread.name.startswith("seawall"):
        return False
    thread.join(1.0)
    return thread.is_alive()
