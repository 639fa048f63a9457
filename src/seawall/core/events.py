"""Rare facts as frozen records, queued under the gate's lock and delivered after it is released.

A policy calls `emit` only when somebody listens; frequent facts are counters instead, which exporters read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

from seawall.core.errors import Rejected
from seawall.core.locking import held, lock

logger = logging.getLogger("seawall")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a policy. `at` is the gate's monotonic clock, in seconds."""

    errand: ClassVar[bool] = False  # of a policy to itself, to run code where no lock is held

    policy: str
    at: float


@dataclass(frozen=True, slots=True)
class CallRejected(Event):
    """A policy refused a call."""

    error: Rejected


Listener: TypeAlias = Callable[[Event], object]

pending: deque[tuple[tuple[Listener, ...], Event]] = deque()  # filled under the gate's lock
_listeners: tuple[Listener, ...] = ()  # of every policy; copied on write
_in_context: tuple[Listener, ...] = ()  # those of them that run in the context of the call it happened to
_delivering = threading.Lock()


def listen(listener: Listener) -> Callable[[], None]:
    """Hear the events of every policy, in order; returns a function that stops it.

    A listener runs after the lock is released and in the thread of some call, so it should be quick; one that
    raises is logged and the call goes on unharmed.

    Examples:
        >>> stop = listen(lambda event: None)
        >>> stop()
    """
    global _listeners
    if not callable(listener):
        raise TypeError(f"a listener must be a function of the event, got {listener!r}")
    with lock:
        _listeners = (*_listeners, listener)

    def stop() -> None:
        global _listeners
        with lock:
            _listeners = tuple(one for one in _listeners if one is not listener)

    return stop


def listen_in_context(listener: Listener) -> Callable[[], None]:
    """Like `listen`, in a copy of the context in which an event happened: for spans and context variables.

    The one who delivers may be another call, in another thread.
    """
    global _in_context
    with lock:
        _in_context = (*_in_context, listener)

    def stop() -> None:
        global _in_context
        with lock:
            _in_context = tuple(one for one in _in_context if one is not listener)

    return stop


def audience(own: tuple[Listener, ...]) -> tuple[Listener, ...]:
    """Everybody who hears a policy with these listeners of its own. To be asked where the event happens."""
    if _in_context:
        here = copy_context()
        own += tuple([_within(here, listener) for listener in _in_context])
    return own + _listeners if _listeners else own


def _within(context: Context, listener: Listener) -> Listener:
    return lambda event: context.run(listener, event)


def deliver() -> None:
    """Hand over what is queued. One thread delivers at a time, so events arrive in the order they happened.

    Under the lock it does nothing: a finaliser runs there, and whom it interrupted delivers.
    """
    while pending and not held() and _delivering.acquire(blocking=False):
        # A second thread, or a listener that calls a policy, leaves its events to this loop.
        try:
            while pending:
                listeners, event = pending.popleft()
                for listener in listeners:
                    _notify(listener, event)
        finally:
            _delivering.release()


def _forget() -> None:
    """In a forked child: what is queued for others belongs to the parent, and so does the thread that delivers it."""
    global _delivering
    _delivering = threading.Lock()
    errands = [entry for entry in pending if entry[1].errand]
    pending.clear()
    pending.extend(errands)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def ask(predicate: Callable[..., R], *values: object, otherwise: R) -> R:
    """What a predicate of the user's says; one that raises is logged and counts as `otherwise`, the call unharmed."""
    try:
        return predicate(*values)
    except Exception:
        logger.exception("%r failed; the call goes on", predicate)
        return otherwise


def _notify(listener: Listener, event: Event) -> None:
    try:
        listener(event)
    except (Exception, asyncio.CancelledError):  # a cancelled future's, which a listener may have looked at
        logger.exception("listener %r failed on %r; the call goes on", listener, event)
