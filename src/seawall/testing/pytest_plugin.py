"""Fixtures and a marker for pytest, which finds them by itself where seawall is installed.

It loads this in every run, so each fixture imports what it needs when it is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from seawall.core.events import Event
    from seawall.testing.virtual_clock import VirtualClock

MARKER = "virtual_time"


def pytest_configure(config: pytest.Config) -> None:
    """Explain the marker to `pytest --markers`."""
    config.addinivalue_line(
        "markers", f"{MARKER}: run an async test on an event loop whose time passes only when everybody waits"
    )


@pytest.fixture
def virtual_clock() -> Iterator[VirtualClock]:
    """The clock of every policy while a plain test runs: it stands still until `advance` or `sleep`."""
    from seawall.core.gate import use_clock
    from seawall.testing.virtual_clock import VirtualClock

    clock = VirtualClock()
    with use_clock(clock):
        yield clock


@pytest.fixture
def captured_events() -> Iterator[list[Event]]:
    """Every event of every policy during the test, in order."""
    from seawall.testing.capture import capture_events

    with capture_events() as events:
        yield events


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail the test if it leaves a permit, a queue place, a task or a thread of seawall behind."""
    from seawall.testing.leaks import no_leaks

    with no_leaks():
        yield


class _VirtualLoops:
    """Tells pytest-asyncio to run a test on virtual time. Registered only while it collects one that is marked."""

    @pytest.hookimpl(tryfirst=True, optionalhook=True)
    def pytest_asyncio_loop_factories(self, config: pytest.Config, item: pytest.Item) -> Mapping[str, Any]:
        """The one kind of loop."""
        from seawall.testing.virtual_time import VirtualTimeLoop

        return {MARKER: VirtualTimeLoop}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None, object, object]:
    """Let pytest-asyncio know of a marked test, where it will run it."""
    if metafunc.definition.get_closest_marker(MARKER) is None:
        return (yield)
    with _registered(metafunc.config, _VirtualLoops()):
        return (yield)


@contextmanager
def _registered(config: pytest.Config, plugin: object) -> Iterator[None]:
    config.pluginmanager.register(plugin)
    try:
        yield
    finally:
        config.pluginmanager.unregister(plugin)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a marked test, unless pytest-asyncio does."""
    test = pyfuncitem.obj
    if pyfuncitem.get_closest_marker(MARKER) is None or _is_pytest_asyncios(pyfuncitem):
        return (yield)
    from seawall.testing.virtual_time import run

    pyfuncitem.obj = lambda **arguments: run(test(**arguments))
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


def _is_pytest_asyncios(item: pytest.Function) -> bool:
    """Whether pytest-asyncio runs this marked test, on the loop it was told to use. Fails what nobody can run."""
    if not inspect.iscoroutinefunction(inspect.unwrap(item.obj)):
        pytest.fail(
            f"@pytest.mark.{MARKER} is for `async def`; a plain test takes the fixture virtual_clock", pytrace=False
        )
    if "anyio_backend" in item.fixturenames:
        pytest.fail(
            f"anyio's plugin runs this test: leave @pytest.mark.{MARKER} away and let the fixture anyio_backend "
            'return ("asyncio", {"loop_factory": VirtualTimeLoop})',
            pytrace=False,
        )
    wrapped = not inspect.iscoroutinefunction(item.obj)
    if wrapped and not hasattr(item.config.hook, "pytest_asyncio_loop_factories"):
        pytest.fail(
            "this pytest-asyncio can't run a test on a loop of ours: upgrade it to 1.4 or later, or let "
            f"@pytest.mark.{MARKER} be the test's only marker",
            pytrace=False,
        )
    return wrapped
