"""Requests share runs and nothing else: not errors, not deadlines, not memory; and each gets what it would alone."""

import asyncio
import ctypes
import gc
import os
import threading
import time

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from seawall.inference import Backend, MicroBatcher, Padding, errors
from seawall.testing import no_leaks
from tests.inference import onnx_models as models
from tests.inference.test_backend import until
from tests.inference.test_backend_faults import STATE, python

LIBRARIES = pytest.mark.parametrize("library", ["asyncio", "trio"])
NEVER = 3600.0  # a delay that no test waits for: its batches run because they are full


def load(model, **settings):
    return Backend.load(model.SerializeToString(), threads=1, **settings)


@pytest.fixture
def backend():
    with load(models.linear()) as loaded:
        yield loaded


@pytest.fixture
def endless():
    with (
        load(models.endless_rows()) as backend,
        MicroBatcher(backend, max_size=2, max_delay=NEVER, eager=False) as batcher,
    ):
        yield batcher


def row(value, rows=1):
    return {"x": np.full((rows, 64), value, np.float32)}


def turns(*numbers):
    return {"n": np.array(numbers)}


FOREVER = 1 << 60


async def together(batcher, requests, **settings):
    """The answers, or errors, of requests that are made at once."""
    answers = [None] * len(requests)

    async def ask(index, request):
        try:
            answers[index] = await batcher.run(request, **settings)
        except errors.ModelError as error:
            answers[index] = error

    async with anyio.create_task_group() as group:
        for index, request in enumerate(requests):
            group.start_soon(ask, index, request)
    return answers


def running(batcher):
    return batcher.counts().running


@LIBRARIES
def test_requests_that_come_together_share_a_run_and_each_gets_its_own_rows(backend, library):
    async def main():
        async with MicroBatcher(backend, max_size=10, max_delay=NEVER, eager=False) as batcher:
            answers = await together(batcher, [row(n, rows=n) for n in (1, 2, 3, 4)])
            return answers, batcher.counts()

    with no_leaks():
        answers, counts = anyio.run(main, backend=library)
    for number, answer in zip((1, 2, 3, 4), answers, strict=True):
        np.testing.assert_array_equal(np.full((number, 64), number, np.float32), answer["y"])
    assert (4, 1, 10, 10, 0) == (counts.requests, counts.batches, counts.rows, counts.positions, counts.padding)
    assert (0, 0) == (counts.queued, counts.running)


def test_a_request_without_company_runs_once_its_delay_is_over(backend):
    with MicroBatcher(backend, max_delay=0.001, eager=False) as batcher:
        assert (1, 64) == batcher.run_sync(row(1))["y"].shape
        assert batcher.counts().waited >= 0.001


@LIBRARIES
def test_a_request_that_comes_to_an_idle_batcher_does_not_wait_and_one_that_comes_during_a_run_does(library):
    async def main():
        with load(models.endless_rows()) as backend:
            async with MicroBatcher(backend, max_size=2, max_delay=NEVER) as batcher:
                for number in range(3):
                    assert [number] == (await batcher.run(turns(number)))["y"].tolist()
                assert 3 == batcher.counts().batches
                async with anyio.create_task_group() as group:
                    group.start_soon(batcher.run, turns(FOREVER))
                    await until(lambda: running(batcher))
                    group.start_soon(batcher.run, turns(1))
                    await until(lambda: batcher.counts().queued)
                    assert (1, 1) == (batcher.counts().queued, batcher.counts().running)
                    group.cancel_scope.cancel()
                assert 0 == batcher.calls

    with no_leaks():
        anyio.run(main, backend=library)


def test_several_loops_and_threads_share_a_batcher():
    found = []
    with load(models.encoder()) as backend, MicroBatcher(
        backend, max_delay=0.001, padding=Padding({"ids": 0}, buckets=(8, 16), mask="mask"), workers=2
    ) as batcher:  # fmt: skip

        def expected(number, count):
            return {"ids": np.full((1, 1 + count % 10), number)}

        async def on_a_loop(number):
            for count in range(20):
                answer = await batcher.run(expected(number, count))
                found.append((number, count, answer["states"].shape[1], answer["pooled"].tobytes()))

        def in_a_thread(number):
            for count in range(20):
                answer = batcher.run_sync(expected(number, count))
                found.append((number, count, answer["states"].shape[1], answer["pooled"].tobytes()))

        threads = [
            threading.Thread(target=lambda: asyncio.run(on_a_loop(0))),
            threading.Thread(target=lambda: anyio.run(on_a_loop, 1, backend="trio")),
            *(threading.Thread(target=in_a_thread, args=(n,)) for n in (2, 3)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(number, count) for number in range(4) for count in range(20)] == sorted(one[:2] for one in found)
        assert all(length == 1 + count % 10 for _, count, length, _ in found)
        assert 0 == batcher.calls
        for number, count, _, pooled in found:
            mask = np.ones((1, 1 + count % 10), np.int64)
            alone = backend.run_sync({**expected(number, count), "mask": mask})["pooled"]
            np.testing.assert_allclose(alone, np.frombuffer(pooled, np.float32).reshape(alone.shape), rtol=1e-4)


def test_what_was_padded_is_counted():
    with load(models.encoder()) as backend, MicroBatcher(
        backend, max_size=2, max_delay=NEVER, eager=False, padding=Padding({"ids": 0}, buckets=(8,), mask="mask")
    ) as batcher:  # fmt: skip
        anyio.run(together, batcher, [{"ids": np.ones((1, 3), np.int64)}, {"ids": np.ones((1, 8), np.int64)}])
        counts = batcher.counts()
    assert (2, 16, 5) == (counts.rows, counts.positions, counts.padding)


# One bad request


def test_a_wrong_request_is_refused_alone_before_it_joins(backend):
    async def main():
        with MicroBatcher(backend, max_size=2, max_delay=NEVER, eager=False) as batcher:
            wrong = {"x": np.zeros((1, 63), np.float32)}
            answers = await together(batcher, [row(1), wrong, row(2), row(0, rows=3)])
            assert [False, True, False, True] == [isinstance(a, errors.InvalidInputError) for a in answers]
            assert "at most 2 rows, got 3 rows" in str(answers[3])
            assert (2, 1, 0) == (batcher.counts().requests, batcher.counts().batches, batcher.counts().failed)

    anyio.run(main)


def test_a_request_that_makes_a_batch_fail_fails_alone_and_the_others_are_answered():
    with load(models.encoder(words=50)) as backend, MicroBatcher(
        backend, max_size=8, max_delay=NEVER, eager=False, padding=Padding({"ids": 0}, buckets=(8,), mask="mask")
    ) as batcher:  # fmt: skip
        requests = [{"ids": np.full((1, 4), 99 if number == 5 else number)} for number in range(8)]
        answers = anyio.run(together, batcher, requests)
        counts = batcher.counts()
        for number, answer in enumerate(answers):
            if number == 5:
                assert isinstance(answer, errors.RuntimeFailure)
                assert "running model" in str(answer)
            else:
                alone = backend.run_sync({**requests[number], "mask": np.ones((1, 4), np.int64)})
                np.testing.assert_allclose(alone["pooled"], answer["pooled"], rtol=1e-4)
    assert (1, 3, 3, 7) == (counts.failed, counts.repeated, counts.batches, counts.rows)  # 4, then 2, then 1 go well


def test_a_row_that_ends_in_nan_fails_alone_where_answers_must_be_finite():
    with (
        load(models.linear(), finite=True) as backend,
        MicroBatcher(backend, max_size=4, max_delay=NEVER, eager=False) as batcher,
    ):
        answers = anyio.run(together, batcher, [row(1), row(np.nan), row(2), row(np.inf)])
    kinds = [type(answer).__name__ for answer in answers]
    assert ["dict", "NotFiniteOutputError", "dict", "NotFiniteOutputError"] == kinds
    assert "64 NaN or infinite values in 'y'" in str(answers[1])


def test_a_batch_that_is_too_much_for_the_memory_limit_runs_in_halves():
    rows = 4 << 12  # 4 MB
    with load(models.chain(4), memory_limit=24 << 20) as backend:
        most = {"max_size": 4 * rows, "max_queued": 4 * rows, "max_delay": NEVER, "eager": False}
        with MicroBatcher(backend, **most, samples=[row(1)], tolerance=0.1) as batcher:
            answers = anyio.run(together, batcher, [row(n, rows=rows) for n in range(4)])
            assert batcher.counts().repeated
    for number, answer in enumerate(answers):
        assert np.float32(number) == answer["h4"][0, 0]
        assert (rows, 64) == answer["h4"].shape


def test_a_lost_device_is_everybodys_error_and_is_not_tried_again(backend):
    class Broken:
        runs = 0

        def is_webgpu_graph_capture_enabled(self):
            return False

        def run(self, *args):
            Broken.runs += 1
            raise STATE.EPFail("the device is lost")

    with MicroBatcher(backend, max_size=4, max_delay=NEVER, eager=False) as batcher:
        backend._session._sess, kept = Broken(), backend._session._sess
        answers = anyio.run(together, batcher, [row(n) for n in range(4)])
        backend._session._sess = kept
        assert [errors.RuntimeDeviceError] * 4 == [type(answer) for answer in answers]
        assert 4 == len({id(answer) for answer in answers})
        assert all("the device is lost" in str(answer) and answer.kind == "EPFail" for answer in answers)
        assert 1 == Broken.runs


# Giving up


@LIBRARIES
def test_a_request_cancelled_while_it_waits_leaves_the_batch_at_once(backend, library):
    async def main():
        async with MicroBatcher(backend, max_size=2, max_delay=NEVER, eager=False) as batcher:
            async with anyio.create_task_group() as group:
                group.start_soon(batcher.run, row(1))
                await until(lambda: batcher.calls == 1)
                group.cancel_scope.cancel()
            assert (0, 0, 1) == (batcher.calls, batcher.counts().queued, batcher.counts().left)
            await together(batcher, [row(2), row(3)])
            assert 2 == batcher.counts().rows

    with no_leaks():
        anyio.run(main, backend=library)


@LIBRARIES
def test_a_request_cancelled_in_its_run_leaves_the_others_alone_and_the_last_one_ends_the_run(endless, library):
    async def main():
        async with anyio.create_task_group() as outer:
            outer.start_soon(endless.run, turns(FOREVER))
            async with anyio.create_task_group() as inner:
                inner.start_soon(endless.run, turns(1))
                await until(lambda: running(endless) == 2)
                inner.cancel_scope.cancel()
            assert (1, 1) == (running(endless), endless.backend.calls)
            outer.cancel_scope.cancel()
        await until(lambda: endless.backend.calls == 0)  # within one node: nobody else would end it
        answers = await together(endless, [turns(1), turns(2)])
        assert [[1], [2]] == [answer["y"].tolist() for answer in answers]

    anyio.run(together, endless, [turns(1), turns(1)])  # its thread starts with the first request, and stays
    with no_leaks():
        anyio.run(main, backend=library)


@LIBRARIES
def test_a_deadline_passes_in_the_queue_and_in_a_run(endless, library):
    async def main():
        with pytest.raises(errors.RunDeadlineError, match=r"0\.01 s"):
            await endless.run(turns(1), deadline=0.01)
        with pytest.raises(errors.RunDeadlineError):
            await endless.run(turns(1), deadline=0)
        late = await together(endless, [turns(FOREVER), turns(FOREVER)], deadline=0.05)
        assert [errors.RunDeadlineError] * 2 == [type(error) for error in late]
        await until(lambda: endless.backend.calls == 0)

    anyio.run(main, backend=library)


def test_a_deadline_holds_for_a_thread_too(endless):
    with pytest.raises(TimeoutError):
        endless.run_sync(turns(FOREVER), deadline=0.01)
    with pytest.raises(errors.InvalidSettingError, match="deadline must be a number of seconds"):
        endless.run_sync(turns(1), deadline="soon")
    assert 0 == endless.calls


def test_a_thread_that_is_interrupted_leaves_its_batch(endless):
    """As by Ctrl-C: whatever is raised where the thread waits."""

    class Interrupting:
        def wait(self):
            raise KeyboardInterrupt

        def ring(self): ...

    request = endless._submit(turns(1), Interrupting(), None)
    try:
        request.bell.wait()
    except KeyboardInterrupt:
        request.end("cancelled")
    assert 0 == endless.calls


@pytest.mark.asyncio
async def test_cancelled_at_any_moment_a_request_leaves_nothing_and_the_next_one_is_served():
    with no_leaks():
        async with load(models.chain(30)) as backend, MicroBatcher(backend, max_delay=0.0005) as batcher:
            ended = {"finished": 0, "cancelled": 0}
            for moment in range(150):
                runs = [asyncio.create_task(batcher.run(row(n, rows=16))) for n in range(2)]
                at = time.perf_counter() + moment * 20e-6
                await until(lambda at=at: time.perf_counter() >= at)
                runs[moment % 2].cancel()
                for number, outcome in enumerate(await asyncio.gather(*runs, return_exceptions=True)):
                    if isinstance(outcome, asyncio.CancelledError):
                        assert number == moment % 2
                        ended["cancelled"] += 1
                    else:
                        assert (16, 64) == outcome["h30"].shape
                        ended["finished"] += 1
                assert 0 == batcher.calls
            assert ended["cancelled"]
            assert (1, 64) == (await batcher.run(row(1)))["h30"].shape


# Bounds


def test_a_full_queue_refuses_with_a_typed_error_that_says_when_to_come_back(endless):
    async def main():
        endless._line.max_queued = 3
        await together(endless, [turns(0), turns(0)])  # now it knows how long a run takes
        async with anyio.create_task_group() as group:
            for number in (FOREVER, 0):
                group.start_soon(endless.run, turns(number))
            await until(lambda: running(endless) == 2)
            for _ in range(3):
                group.start_soon(endless.run, turns(1))
            await until(lambda: endless.counts().queued == 3)
            with pytest.raises(errors.BatchQueueFullError, match="3 rows wait for a batch") as caught:
                await endless.run(turns(1))
            group.cancel_scope.cancel()
        assert caught.value.retryable
        assert caught.value.retry_after > 0
        assert (3, 1) == (caught.value.queued, endless.counts().refused)

    anyio.run(main)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_size": 0}, "max_size must be a whole number from 1 to 1000000, got 0"),
        ({"max_queued": 1.5}, "max_queued must be a whole number"),
        ({"workers": True}, "workers must be a whole number"),
        ({"max_delay": -1}, "max_delay must be seconds, at least 0, got -1"),
        ({"max_delay": "1"}, "max_delay must be a number of seconds"),
        ({"max_tokens": 100}, "give padding too, got 100"),
        ({"tolerance": 1.5}, r"tolerance must be a share in \[0, 1\), got 1\.5"),
        ({"tolerance": "1e-4"}, "tolerance must be a share"),
        ({"padding": 16}, "padding must be a Padding, or None, got 16"),
        ({"watch": "spans"}, "watch must be a function"),
    ],
)
def test_a_setting_outside_its_range_is_refused_with_its_value(backend, settings, message):
    with no_leaks(), pytest.raises(errors.InvalidSettingError, match=message):
        MicroBatcher(backend, **settings)


def test_what_is_no_backend_is_refused():
    with pytest.raises(errors.InvalidSettingError, match="backend must be a Backend, got 'model"):
        MicroBatcher("model.onnx")


def test_a_token_budget_that_not_even_one_row_fits_in_is_refused():
    with load(models.encoder()) as backend, pytest.raises(errors.InvalidSettingError, match="the last bucket, 16"):
        MicroBatcher(backend, max_tokens=15, padding=Padding({"ids": 0}, buckets=(8, 16), mask="mask"))


# Closing


def test_closing_ends_waiting_and_running_requests_within_one_node(endless):
    outcomes = []

    def use(number):
        try:
            endless.run_sync(turns(number))
        except errors.ModelError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=use, args=(n,)) for n in (FOREVER, FOREVER, 1)]
    for thread in threads:
        thread.start()
    while running(endless) + endless.counts().queued < 3:
        time.sleep(0)
    with no_leaks():
        endless.close()
    for thread in threads:
        thread.join()
    assert [errors.BackendClosedError] * 3 == [type(outcome) for outcome in outcomes]
    assert 0 == endless.backend.calls
    endless.close()
    with pytest.raises(errors.BackendClosedError, match="make a new one"):
        endless.run_sync(turns(1))
    assert endless.closed
    assert "closed" in repr(endless)


def test_draining_runs_what_waits_at_once_and_refuses_the_rest(backend):
    with MicroBatcher(backend, max_size=100, max_delay=NEVER, eager=False) as batcher:
        answers = []
        threads = [threading.Thread(target=lambda n=n: answers.append(batcher.run_sync(row(n)))) for n in range(3)]
        for thread in threads:
            thread.start()
        while batcher.calls < 3:
            time.sleep(0)
        assert batcher.drain()
        for thread in threads:
            thread.join()
        assert [0, 1, 2] == sorted(answer["y"][0, 0] for answer in answers)
        with pytest.raises(errors.BackendClosedError):
            batcher.run_sync(row(1))
    assert (1, 64) == backend.run_sync(row(1))["y"].shape


def test_draining_gives_up_when_its_time_is_over(endless):
    def ask():
        with pytest.raises(errors.BackendClosedError):
            endless.run_sync(turns(1, FOREVER))

    thread = threading.Thread(target=ask)
    thread.start()
    while not running(endless):
        time.sleep(0)
    assert not endless.drain(timeout=0)
    endless.close()
    thread.join()


def test_one_that_owns_its_backend_closes_it():
    backend = load(models.linear())
    with MicroBatcher(backend, owns=True) as batcher:
        batcher.warm_up()
    assert backend.closed


def test_a_backend_that_is_closed_under_its_batcher_is_each_requests_error(backend):
    with MicroBatcher(backend, max_size=2, max_delay=NEVER, eager=False) as batcher:
        backend.close()
        answers = anyio.run(together, batcher, [row(1), row(2)])
        assert [errors.BackendClosedError] * 2 == [type(answer) for answer in answers]


def test_a_batcher_that_is_dropped_ends_its_threads_and_says_so(backend):
    with no_leaks():
        kept = [MicroBatcher(backend, max_delay=0)]
        kept[0].run_sync(row(1), deadline=60)
        threads = [*kept[0]._threads, kept[0]._watchdog._thread]
        with pytest.warns(ResourceWarning, match="the batcher of 'model' was dropped without close"):  # noqa: PT031
            kept.clear()
            gc.collect()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


# Threads and processes


@pytest.mark.asyncio
async def test_a_thread_that_is_told_to_die_in_a_run_gives_typed_errors_and_serves_on(endless):
    runs = [asyncio.create_task(endless.run(turns(300_000))) for _ in range(2)]
    await until(lambda: running(endless) == 2)
    (thread,) = endless._threads
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert [errors.RuntimeInterruptedError] * 2 == [type(outcome) for outcome in outcomes]
    assert all(outcome.retryable for outcome in outcomes)
    answers = await together(endless, [turns(1), turns(2)])
    assert [[1], [2]] == [answer["y"].tolist() for answer in answers]


def test_a_thread_that_cannot_be_started_is_the_callers_error_and_nothing_waits(backend, monkeypatch):
    with MicroBatcher(backend, max_delay=0) as batcher:

        def refuse(self):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                batcher.run_sync(row(1))
        assert 0 == batcher.calls
        assert (1, 64) == batcher.run_sync(row(1))["y"].shape


FORK = """
import os
from tests.inference import onnx_models as models
from tests.inference.batching.test_batcher import row
from seawall.inference import Backend, MicroBatcher, errors
model = models.linear().SerializeToString()
backend = Backend.load(model, threads=1)
batcher = MicroBatcher(backend, max_delay=0)
batcher.run_sync(row(1))
child = os.fork()
if child == 0:
    for use in (lambda: batcher.run_sync(row(1)), batcher.drain):
        try:
            use()
            os._exit(2)
        except errors.ForkedBackendError as error:
            pass
    batcher.close()
    with Backend.load(model, threads=1) as own, MicroBatcher(own, max_delay=0) as mine:
        print(mine.run_sync(row(2))['y'][0, 0], flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status, batcher.run_sync(row(3))['y'][0, 0])
batcher.close()
backend.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_batcher_in_a_forked_child_is_refused_and_one_made_there_serves():
    done = python(FORK)
    assert ["2.0", "0 3.0"] == done.stdout.splitlines(), done.stderr


def test_a_wall_clock_that_jumps_moves_no_deadline(endless, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(errors.RunDeadlineError):
        endless.run_sync(turns(FOREVER), deadline=0.01)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert [[1], [1]] == [a["y"].tolist() for a in anyio.run(together, endless, [turns(1), turns(1)])]
