"""The plugin in runs of pytest of its own, where it is loaded as in a user's."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from seawall.testing import pytest_plugin

pytest_plugins = ["pytester"]


@pytest.fixture
def pytest_run(pytester, monkeypatch):
    """Run pytest on `source`, with the plugin and those named."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run_source(source, *arguments, plugins=(), conftest=""):
        pytester.makepyfile(source)
        pytester.makeconftest(conftest)
        named = [argument for plugin in plugins for argument in ("-p", plugin)]
        options = ["--strict-markers", "-Werror", *named, *arguments]
        return pytester.runpytest_inprocess(*options, plugins=[pytest_plugin])

    return run_source


ASYNCIO = ("pytest_asyncio.plugin",)
STRICT = ("-o", "asyncio_default_fixture_loop_scope=function")


def test_virtual_clock_is_the_clock_of_every_policy_and_the_real_one_is_back_afterwards(pytest_run):
    result = pytest_run("""
        from seawall import CircuitBreaker
        from seawall.core import gate

        bank = CircuitBreaker("bank", consecutive_failures=1, reset_timeout=3600)

        def test_it(virtual_clock):
            bank.admit().failure(OSError())
            virtual_clock.advance(3600)
            bank.admit().success()

        def test_afterwards():
            import time
            assert gate.clock is time.monotonic
    """)
    result.assert_outcomes(passed=2)


def test_captured_events_are_those_of_the_test(pytest_run):
    result = pytest_run("""
        import pytest
        from seawall import CircuitBreaker

        @pytest.mark.parametrize("number", [1, 2])
        def test_it(captured_events, number):
            CircuitBreaker(f"bank {number}", consecutive_failures=1).admit().failure(OSError())
            assert [event.policy for event in captured_events] == [f"bank {number}"]
    """)
    result.assert_outcomes(passed=2)


def test_no_leaks_fails_a_test_that_leaves_a_permit_out(pytest_run):
    result = pytest_run("""
        from seawall import Bulkhead

        places = Bulkhead("places", max_concurrent=2)
        held = []

        def test_good(no_leaks):
            places.admit().success()

        def test_bad(no_leaks):
            held.append(places.admit())

        def test_next(no_leaks):
            held.pop().cancel()
    """)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_bad*", "*left behind: Bulkhead 'places' has 1 active*"])


@pytest.mark.parametrize("fixtures", ["no_leaks", "no_leaks, other", "other, no_leaks"])
def test_no_leaks_sees_a_call_left_running_by_a_test_of_pytest_asyncio(pytest_run, fixtures):
    result = pytest_run(
        f"""
        import asyncio, pytest, pytest_asyncio
        from seawall import Pipeline

        @pytest_asyncio.fixture
        async def other():
            yield 1

        @pytest.mark.asyncio
        async def test_bad({fixtures}):
            test_bad.task = asyncio.ensure_future(Pipeline()(asyncio.sleep)(3600))
            await asyncio.sleep(0)

        @pytest.mark.asyncio
        async def test_good({fixtures}):
            await asyncio.ensure_future(Pipeline()(asyncio.sleep)(0))
        """,
        *STRICT,
        plugins=ASYNCIO,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_bad*", "*left behind: task*"])


HOUR = """
import asyncio, time, pytest
from seawall import Timeout

@pytest.mark.virtual_time
async def test_an_hour(tmp_path, request):
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        async with Timeout("search", 1800):
            await asyncio.sleep(3600)
    assert asyncio.get_running_loop().time() == 1800.0
    assert time.monotonic() - begun < 60

class TestMethods:
    @pytest.mark.virtual_time
    @pytest.mark.parametrize("hours", [1, 2])
    async def test_hours(self, hours):
        await asyncio.sleep(3600 * hours)
        assert asyncio.get_running_loop().time() == 3600 * hours
"""


def test_a_marked_test_runs_on_virtual_time_with_no_other_plugin(pytest_run):
    pytest_run(HOUR).assert_outcomes(passed=3)


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_a_marked_test_runs_on_virtual_time_beside_pytest_asyncio(pytest_run, mode):
    pytest_run(HOUR, *STRICT, f"--asyncio-mode={mode}", plugins=ASYNCIO).assert_outcomes(passed=3)


def test_a_marked_test_of_pytest_asyncio_shares_virtual_time_with_its_fixtures(pytest_run):
    result = pytest_run(
        """
        import asyncio, pytest, pytest_asyncio

        @pytest_asyncio.fixture
        async def rested():
            await asyncio.sleep(100)
            yield asyncio.get_running_loop()
            await asyncio.sleep(100)

        @pytest.mark.asyncio
        @pytest.mark.virtual_time
        async def test_it(rested):
            assert rested is asyncio.get_running_loop()
            assert rested.time() == 100.0

        @pytest.mark.asyncio
        async def test_real_time():
            assert type(asyncio.get_running_loop()).__name__ != "VirtualTimeLoop"
        """,
        "-v",
        *STRICT,
        plugins=ASYNCIO,
    )
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::test_it PASSED*"])


def test_the_loop_factories_of_a_users_conftest_hold_for_tests_that_are_not_marked(pytest_run):
    result = pytest_run(
        """
        import asyncio, pytest

        @pytest.mark.asyncio
        async def test_theirs():
            assert type(asyncio.get_running_loop()).__name__ == "Theirs"

        @pytest.mark.asyncio
        @pytest.mark.virtual_time
        async def test_ours():
            await asyncio.sleep(3600)
        """,
        *STRICT,
        plugins=ASYNCIO,
        conftest="""
        import asyncio
        class Theirs(asyncio.SelectorEventLoop): pass
        def pytest_asyncio_loop_factories(config, item): return {"theirs": Theirs}
        """,
    )
    result.assert_outcomes(passed=2)


def test_a_whole_folder_runs_on_virtual_time_where_its_conftest_says_so(pytest_run):
    result = pytest_run(
        """
        import asyncio, pytest
        from seawall.core import gate

        @pytest.mark.asyncio
        async def test_it():
            await asyncio.sleep(3600)
            assert gate.now() == 3600.0
        """,
        *STRICT,
        plugins=ASYNCIO,
        conftest="""
        from seawall.testing import VirtualTimeLoop
        def pytest_asyncio_loop_factories(config, item): return {"virtual": VirtualTimeLoop}
        """,
    )
    result.assert_outcomes(passed=1)


ANYIO = """
import asyncio, pytest
from seawall.core import gate
from seawall.testing import VirtualTimeLoop

@pytest.fixture
def anyio_backend():
    return "asyncio", {"loop_factory": VirtualTimeLoop}

@pytest.fixture
async def rested():
    await asyncio.sleep(100)

@pytest.mark.anyio
async def test_it(rested):
    await asyncio.sleep(3600)
    assert gate.now() == 3700.0
"""


def test_a_test_of_anyios_plugin_runs_on_virtual_time_through_its_backend(pytest_run):
    pytest_run(ANYIO, plugins=["anyio.pytest_plugin"]).assert_outcomes(passed=1)


def test_the_marker_on_a_test_of_anyios_plugin_says_how_it_is_done_there(pytest_run):
    source = ANYIO.replace("@pytest.mark.anyio", "@pytest.mark.anyio\n@pytest.mark.virtual_time")
    result = pytest_run(source, plugins=["anyio.pytest_plugin"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*anyio_backend return*loop_factory*"])


def test_the_marker_on_a_plain_test_is_a_mistake_that_is_told(pytest_run):
    result = pytest_run("""
        import pytest

        @pytest.mark.virtual_time
        def test_it(): ...
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*takes the fixture virtual_clock*"])


def test_a_failing_async_test_fails(pytest_run):
    result = pytest_run("""
        import pytest

        @pytest.mark.virtual_time
        async def test_it():
            assert 1 == 2
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_an_unmarked_async_test_is_still_pytests_to_refuse(pytest_run):
    pytest_run("async def test_it(): ...").assert_outcomes(failed=1)


def test_pytest_finds_the_plugin_by_itself():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"seawall": pytest_plugin.__name__}


LOADED = """
import json, sys
import pytest, seawall
before = set(sys.modules)
import seawall.testing.pytest_plugin
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_a_run_that_asks_for_nothing_loads_the_plugin_and_its_small_neighbours_alone():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert all(name.startswith("seawall.testing") for name in json.loads(done.stdout))
