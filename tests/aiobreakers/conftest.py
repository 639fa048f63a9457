from __future__ import annotations

import datetime as dt

import pytest

from seawall import use_clock
from seawall.testing import VirtualClock

BASE = dt.datetime(2026, 1, 1)  # noqa: DTZ001 - without a zone, like theirs


@pytest.fixture
def clock(monkeypatch):
    """One virtual time for both packages, in a place where local time is universal time."""
    clock = VirtualClock(1000.0)

    class Datetime(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            moment = BASE + dt.timedelta(seconds=clock())
            return moment if tz is None else moment.replace(tzinfo=tz)

        utcnow = now

    for module in ("aiobreaker.circuitbreaker", "aiobreaker.state", "seawall.aiobreakers.view"):
        monkeypatch.setattr(f"{module}.datetime", Datetime)
    with use_clock(clock):
        yield clock
