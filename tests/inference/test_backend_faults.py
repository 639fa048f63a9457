"""What goes wrong around a model is a typed error, ends in time, prints nothing, and the next request is served."""

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import anyio
import numpy as np
import onnxruntime
import pytest

from seawall.inference import Backend, errors
from seawall.inference.runtime import memory, ort, providers
from seawall.testing import no_leaks
from tests.inference import onnx_models as models
from tests.inference.test_backend import at_work, in_flight, until

SOURCE = Path(errors.__file__).parents[2]
STATE = onnxruntime.capi.onnxruntime_pybind11_state
CPU, AZURE, CUDA = "CPUExecutionProvider", "AzureExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def endless():
    with Backend.load(models.endless().SerializeToString(), threads=1) as loaded:
        yield loaded


def python(code, **environment):
    path = os.pathsep.join([str(SOURCE), str(SOURCE.parent)])
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Errors


def test_every_exception_class_of_the_runtime_has_a_typed_error_that_says_whether_to_retry():
    classes = {n for n, found in vars(STATE).items() if isinstance(found, type) and issubclass(found, Exception)}
    assert classes <= set(ort.KINDS)
    retryable = {"DeviceReset", "EPFail", "EngineError", "ModelLoadCanceled"}
    for name in classes:
        error = ort.typed("running", getattr(STATE, name)("something"))
        assert isinstance(error, errors.RuntimeFailure)
        assert name == error.kind
        assert (name in retryable) == error.retryable


def test_no_memory_in_any_of_the_runtimes_words_is_exhaustion():
    for error in (
        STATE.Fail("Available memory of 1 is smaller than requested bytes of 2"),
        STATE.RuntimeException("Failed to allocate memory for requested buffer of size 4398046511104"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ):
        assert isinstance(ort.typed("running", error), errors.RuntimeExhaustedError)


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_model_that_is_cut_short_is_corrupt(tmp_path, capfd, size):
    content = models.linear().SerializeToString()[:size]
    (tmp_path / "cut.onnx").write_bytes(content)
    for model in (tmp_path / "cut.onnx", content):
        with pytest.raises(errors.CorruptModelError) as caught:
            Backend.load(model)
        assert not caught.value.retryable
        assert caught.value.__cause__ is not None
    assert ("", "") == capfd.readouterr()


def test_a_graph_that_makes_no_sense_is_corrupt():
    made = models.linear()
    made.graph.node[0].input[0] = "nowhere"
    with pytest.raises(errors.CorruptModelError, match="nowhere"):
        Backend.load(made.SerializeToString())


@pytest.mark.parametrize("left", [0, 1000, None])
def test_external_data_that_is_missing_or_cut_short_makes_the_model_corrupt(tmp_path, capfd, left):
    path, weights = models.with_external_data(tmp_path)
    if left is None:
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(errors.CorruptModelError, match=r"model\.onnx"):
        Backend.load(path)
    assert ("", "") == capfd.readouterr()


def test_a_file_that_is_not_there_and_an_operator_that_is_unknown_are_misuse(tmp_path):
    with pytest.raises(errors.RuntimeMisuseError, match=r"missing\.onnx"):
        Backend.load(tmp_path / "missing.onnx")
    made = models.linear()
    made.graph.node[0].domain, made.graph.node[0].op_type = "com.microsoft", "GemmFloat8"  # has no CPU kernel
    with pytest.raises(errors.ModelError):
        Backend.load(made.SerializeToString())


def test_shapes_that_do_not_fit_inside_the_graph_are_a_typed_error_and_print_nothing(capfd):
    made = models.model(
        [models.make.make_node("Add", ["a", "b"], ["y"])],
        [models.tensor("a", ["n"]), models.tensor("b", ["m"])],
        [models.tensor("y", ["k"])],
    )
    with Backend.load(made.SerializeToString(), threads=1) as backend:
        with pytest.raises(errors.RuntimeFailure, match="running model") as caught:
            backend.run_sync({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
        assert type(caught.value.__cause__).__name__ == caught.value.kind
        assert [2, 2] == backend.run_sync({"a": np.ones(2, np.float32), "b": np.ones(1, np.float32)})["y"].tolist()
    assert ("", "") == capfd.readouterr()


# Memory


MB = 1 << 12  # rows of 64 floats


def test_a_run_beyond_the_memory_limit_is_exhausted_and_the_next_one_is_served():
    with Backend.load(models.chain(4).SerializeToString(), threads=1, memory_limit=64 << 20) as backend:
        for _ in range(2):
            with pytest.raises(errors.RuntimeExhaustedError) as caught:
                backend.run_sync(models.rows(100 * MB))
            assert caught.value.retryable
            assert (10 * MB, 64) == backend.run_sync(models.rows(10 * MB))["h4"].shape


def test_free_memory_in_pieces_does_not_exhaust_a_limit_that_is_large_enough():
    with Backend.load(models.chain(4).SerializeToString(), threads=1, memory_limit=64 << 20) as backend:
        for size in (5, 10, 12, 14, 25, 5, 28):
            assert size * MB == backend.run_sync(models.rows(size * MB))["h4"].shape[0]


def test_each_backend_has_a_limit_of_its_own():
    model = models.chain(4).SerializeToString()
    with (
        Backend.load(model, threads=1, memory_limit=16 << 20) as small,
        Backend.load(model, threads=1, memory_limit=64 << 20) as large,
        Backend.load(model, threads=1) as free,
    ):
        for backend, fits in ((small, False), (large, True), (free, True)):
            if fits:
                backend.run_sync(models.rows(12 * MB))
            else:
                with pytest.raises(errors.RuntimeExhaustedError):
                    backend.run_sync(models.rows(12 * MB))


def wide(megabytes):
    """One matrix product with `megabytes` of weights, and for 64 rows as large an output."""
    return models.model([models.make.make_node("MatMul", ["x", "w"], ["y"])], [models.tensor("x", ["b", 64])],
                        [models.tensor("y", ["b", megabytes << 12])],
                        [("w", np.zeros((64, megabytes << 12), np.float32))]).SerializeToString()  # fmt: skip


def test_weights_count_and_what_they_leave_is_known():
    with Backend.load(wide(32), threads=1, memory_limit=48 << 20) as backend:
        assert 15 << 20 < backend.room <= 16 << 20
        backend.run_sync(models.rows(16))  # 8 MB
        with pytest.raises(errors.RuntimeExhaustedError):
            backend.run_sync(models.rows(40))  # 20 MB
        backend.run_sync(models.rows(16))


@pytest.mark.parametrize("megabytes", [1, 8, 31])
def test_a_limit_that_the_weights_alone_fill_is_refused_for_it_would_limit_nothing(megabytes):
    with pytest.raises(errors.InvalidSettingError, match="which the weights of a model of"):
        Backend.load(wide(32), threads=1, memory_limit=megabytes << 20)


def test_the_probe_for_free_memory_is_the_model_that_it_says():
    made = models.onnx.load_from_string(ort._PROBE)
    models.onnx.checker.check_model(made)
    assert ["ConstantOfShape"] == [node.op_type for node in made.graph.node]


def test_more_memory_than_there_is_is_exhaustion_without_a_limit_as_well():
    size = models.tensor("n", [1], models.onnx.TensorProto.INT64)
    made = models.model([models.make.make_node("ConstantOfShape", ["n"], ["y"])], [size], [models.tensor("y", ["n"])])
    with Backend.load(made.SerializeToString(), threads=1) as backend:
        with pytest.raises(errors.RuntimeExhaustedError):
            backend.run_sync({"n": np.array([1 << 44], np.int64)})
        assert 3 == len(backend.run_sync({"n": np.array([3], np.int64)})["y"])


GROWING = """  # in a process of its own: memory that earlier tests freed would hide the growth
import gc, psutil
from seawall.inference import Backend
from tests.inference import onnx_models as models
def rss():
    return psutil.Process().memory_info().rss
with Backend.load(models.chain(4).SerializeToString(), threads=1) as backend:
    backend.warm_up()
    before = rss()
    for size in (30, 40, 50):
        backend.run_sync(models.rows(size << 12))
    grown = rss() - before
    if HOW == "shrink":
        backend.shrink()
        left = rss() - before
if HOW == "close":
    gc.collect()
    left = rss() - before
print(grown > 90 << 20, left < grown / 10, grown, left)
"""


@pytest.mark.parametrize("how", ["shrink", "close"])
def test_shrinking_and_closing_give_memory_back_to_the_system_without_another_load(how):
    done = python(f"HOW = {how!r}\n{GROWING}")
    assert done.stdout.startswith("True True"), done


EXHAUSTED = """
import gc, psutil
from seawall.inference import Backend, errors
from tests.inference import onnx_models as models
def rss():
    return psutil.Process().memory_info().rss
with Backend.load(models.chain(4).SerializeToString(), threads=1, memory_limit=64 << 20) as backend:
    backend.warm_up()
    before = rss()
    for size in (24, 31, 40) * 3:  # MB of inputs, and of each product
        try:
            backend.run_sync(models.rows(size << 12))
        except errors.RuntimeExhaustedError:
            pass
    gc.collect()
    backend.shrink()
    left = rss() - before
print(left < 10 << 20, left)
"""


@pytest.mark.skipif(memory._TRIM is None, reason="this C library has no malloc_trim")
def test_after_runs_beyond_the_limit_shrinking_gives_back_what_the_c_library_kept():
    done = python(EXHAUSTED)
    assert done.stdout.startswith("True"), done


# Cancellation and deadlines; a run of `endless` ends only if somebody ends it


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_a_cancelled_caller_leaves_once_its_run_has_ended_and_the_worker_is_free(endless, library):
    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(endless.run, models.FOREVER)
            await at_work(endless)
            group.cancel_scope.cancel()
        assert 0 == endless.calls
        return await endless.run(models.counting(3))

    assert [3] == anyio.run(main, backend=library)["y"].tolist()


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_a_caller_cancelled_before_it_waits_starts_nothing_that_stays(endless, library):
    async def main():
        with anyio.CancelScope() as scope:
            scope.cancel()
            await endless.run(models.FOREVER)
        assert scope.cancelled_caught
        assert 0 == endless.calls

    anyio.run(main, backend=library)


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_a_caller_cancelled_in_the_queue_leaves_without_waiting_for_the_run_before_it(endless, library):
    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(endless.run, models.FOREVER)
            await at_work(endless)
            async with anyio.create_task_group() as queued:
                queued.start_soon(endless.run, models.FOREVER)
                await at_work(endless, 2)
                queued.cancel_scope.cancel()
            assert 1 == endless.calls
            group.cancel_scope.cancel()

    anyio.run(main, backend=library)


@pytest.mark.asyncio
async def test_a_caller_cancelled_again_and_again_still_waits_for_its_run(endless):
    run = asyncio.create_task(endless.run(models.FOREVER))
    await at_work(endless)
    while not run.done():
        run.cancel()
        await asyncio.sleep(0)
    assert run.cancelled()
    assert 0 == endless.calls


@pytest.mark.asyncio
async def test_cancelled_at_any_moment_a_run_leaves_nothing_and_the_next_one_is_served():
    with no_leaks():
        async with Backend.load(models.chain(30).SerializeToString(), threads=1) as backend:
            ended = {"finished": 0, "cancelled": 0}
            for moment in range(150):
                run = asyncio.create_task(backend.run(models.rows(64)))
                at = time.perf_counter() + moment * 20e-6
                await until(lambda at=at: time.perf_counter() >= at)
                run.cancel()
                try:
                    assert (64, 64) == (await run)["h30"].shape
                    ended["finished"] += 1
                except asyncio.CancelledError:
                    ended["cancelled"] += 1
                assert 0 == backend.calls
            assert ended["cancelled"]
            assert (1, 64) == (await backend.run(models.rows(1)))["h30"].shape


@pytest.mark.asyncio
async def test_at_any_deadline_a_run_ends_or_answers():
    async with Backend.load(models.chain(30).SerializeToString(), threads=1) as backend:
        late = []
        for moment in range(100):
            for ask in (backend.run, lambda *args, **kwargs: asyncio.to_thread(backend.run_sync, *args, **kwargs)):
                try:
                    assert (64, 64) == (await ask(models.rows(64), deadline=moment * 20e-6))["h30"].shape
                except errors.RunDeadlineError as error:
                    late.append(error.deadline)
        assert set(late) <= {moment * 20e-6 for moment in range(100)}
        assert 0.0 in late
        assert 0 == backend.calls


def test_a_deadline_ends_a_run_in_a_thread_and_is_a_timeout(endless):
    with pytest.raises(TimeoutError, match=r"within its deadline of 0\.02 s") as caught:
        endless.run_sync(models.FOREVER, deadline=0.02)
    assert isinstance(caught.value, errors.RunDeadlineError)
    assert caught.value.retryable
    assert [3] == endless.run_sync(models.counting(3), deadline=60)["y"].tolist()


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_a_deadline_passes_in_the_queue_as_well(endless, library):
    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(endless.run, models.FOREVER)
            await at_work(endless)
            with pytest.raises(errors.RunDeadlineError):
                await endless.run(models.counting(1), deadline=0.01)
            with pytest.raises(errors.RunDeadlineError):
                await endless.run(models.counting(1), deadline=-1)
            assert 1 == endless.calls
            group.cancel_scope.cancel()

    anyio.run(main, backend=library)


def test_the_terminate_flag_sticks_so_every_run_has_options_of_its_own(endless):
    options = ort.run_options()
    options.terminate = True
    for _ in range(2):
        with pytest.raises(Exception, match="terminate flag"):
            endless._session.run(None, models.counting(1), options)
    first, _ = endless._enter(None)
    second, _ = endless._enter(None)
    assert first.options is not second.options
    endless._leave(first)
    endless._leave(second)


# Workers, loops, processes


@pytest.mark.asyncio
async def test_a_worker_that_is_told_to_die_in_a_run_gives_a_typed_error_and_serves_on(endless):
    run = asyncio.create_task(endless.run(models.counting(300_000)))
    await at_work(endless)
    (thread,) = endless._workers._threads
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    with pytest.raises(errors.RuntimeInterruptedError) as caught:
        await run
    assert caught.value.retryable
    assert [2] == (await endless.run(models.counting(2)))["y"].tolist()
    assert 0 == endless.calls


@pytest.mark.asyncio
async def test_a_worker_that_is_gone_is_replaced(endless):
    await endless.run(models.counting(1))
    (thread,) = endless._workers._threads
    endless._workers._jobs.put(None)
    thread.join()
    assert [2] == (await endless.run(models.counting(2)))["y"].tolist()


def test_a_loop_that_stops_with_a_run_in_flight_ends_the_run(endless):
    loop = asyncio.new_event_loop()
    task = loop.create_task(endless.run(models.FOREVER))
    while not endless.calls:
        loop.run_until_complete(asyncio.sleep(0))
    in_flight(endless)
    task.get_coro().close()
    while endless.calls:
        time.sleep(0)
    task._log_destroy_pending = False
    loop.close()
    assert [2] == endless.run_sync(models.counting(2))["y"].tolist()


FORK = """
import os, sys, warnings
from tests.inference import onnx_models as models
from seawall.inference import Backend, errors
import asyncio
model = models.endless().SerializeToString()
backend = Backend.load(model, threads=2)
asyncio.run(backend.run(models.counting(5), deadline=60))
child = os.fork()
if child == 0:
    for use in (lambda: backend.run_sync(models.counting(1)), backend.warm_up, backend.drain, backend.report,
                lambda: asyncio.run(backend.run(models.counting(1)))):
        try:
            use()
            os._exit(2)
        except errors.ForkedBackendError as error:
            text = str(error)
    print(text.replace(str(os.getppid()), 'P').replace(str(os.getpid()), 'C'), flush=True)
    backend.close()
    del backend
    with Backend.load(model, threads=1) as own:
        print(own.run_sync(models.counting(4))['y'], flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
print(status, backend.run_sync(models.counting(6))['y'])
backend.close()
"""


def test_a_backend_in_a_forked_child_is_refused_at_once_and_one_loaded_there_serves():
    done = python(FORK)
    refused = "backend 'model' was loaded in process P and used in its fork C: load it in each worker process, after"
    refused += " the fork, or start workers with spawn"
    assert [refused, "[4.]", "0 [6.]"] == done.stdout.splitlines(), done.stderr
    assert "" == done.stderr


SPAWN = """
import multiprocessing
from tests.inference import onnx_models as models
from seawall.inference import Backend

def served(model):
    with Backend.load(model, threads=1) as backend:
        return backend.run_sync(models.counting(4))["y"].tolist()

if __name__ == "__main__":
    model = models.endless().SerializeToString()
    with Backend.load(model, threads=1) as backend, multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(served, [model]))
        try:
            pool.apply(served, [backend])
        except TypeError as error:
            print(error)
"""


def test_a_spawned_process_loads_its_own_and_nobody_sends_it_one(tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(SPAWN, encoding="utf-8")
    done = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    sent = "backend 'model' belongs to this process: load it in each worker, instead of sending it"
    assert ["[4.0]", sent] == done.stdout.splitlines(), done.stderr


EXIT = """
import asyncio, threading
from tests.inference import onnx_models as models
from tests.inference.test_backend import in_flight
from seawall.inference import Backend
backend = Backend.load(models.endless().SerializeToString(), threads=2)
for use in (lambda: asyncio.run(backend.run(models.FOREVER)), lambda: backend.run_sync(models.FOREVER)):
    threading.Thread(target=use, daemon=True).start()
while backend.calls < 2:
    pass
in_flight(backend)
print('leaving')
"""


def test_a_process_that_exits_with_runs_in_flight_ends_them_and_does_not_abort():
    done = python(EXIT)
    assert (0, "leaving\n") == (done.returncode, done.stdout), done.stderr


SHARED = """
import os
from tests.inference import onnx_models as models
from seawall.inference import Backend, errors, share_threads
threads = lambda: len(os.listdir('/proc/self/task'))
print(share_threads(4), share_threads(4))
before = threads()
backends = [Backend.load(models.linear().SerializeToString()) for _ in range(5)]
for backend in backends:
    backend.warm_up()
print(threads() - before, backend.threads, backend.report().shared_pool)
for use in (lambda: share_threads(3), lambda: Backend.load(b'', threads=2)):
    try:
        use()
    except errors.ModelError as error:
        print(error)
for backend in backends:
    backend.close()
"""


def test_all_models_share_one_pool_of_threads_where_the_process_asks_for_it():
    done = python(SHARED)
    assert [
        "4 4",
        "0 4 True",
        "threads must be 4, the size that the shared pool has already, got 3",
        "threads is 2, but share_threads made a pool of 4 for all",
    ] == done.stdout.splitlines(), done.stderr
    assert "" == done.stderr


# Providers


def test_a_provider_that_this_build_does_not_have_is_refused(capfd):
    with pytest.raises(errors.ProviderError, match="CUDAExecutionProvider is not in this build") as caught:
        Backend.load(models.linear().SerializeToString(), providers=[CUDA, CPU])
    assert (CUDA, CPU) == caught.value.requested
    assert CPU in caught.value.serving
    assert not caught.value.retryable
    assert ("", "") == capfd.readouterr()


def test_a_provider_that_takes_no_node_is_refused():
    with pytest.raises(errors.ProviderError, match="AzureExecutionProvider takes none"):
        Backend.load(models.linear().SerializeToString(), providers=[AZURE, CPU])


def test_nodes_on_a_cpu_that_was_not_asked_for_are_refused():
    with pytest.raises(errors.ProviderError, match="would run on the CPU"):
        Backend.load(models.linear().SerializeToString(), providers=[AZURE])


def test_a_session_that_came_up_without_a_provider_is_refused(monkeypatch):
    monkeypatch.setattr(ort, "available_providers", lambda: [CUDA, CPU])
    opened = ort.open_session
    monkeypatch.setattr(ort, "open_session", lambda *a, providers, **k: opened(*a, providers=[(CPU, {})], **k))
    with pytest.raises(errors.ProviderError, match="CUDAExecutionProvider did not start"):
        Backend.load(models.linear().SerializeToString(), providers=[CUDA, CPU])


def test_a_backend_that_is_not_strict_warns_and_serves():
    with pytest.warns(RuntimeWarning, match="CUDAExecutionProvider did not start"):
        backend = Backend.load(models.linear().SerializeToString(), providers=[CUDA, CPU], threads=1, strict=False)
    with backend:
        assert (2, 64) == backend.run_sync(models.rows(2))["y"].shape


def test_what_serves_is_compared_with_what_was_asked_for():
    providers.check_serving([CUDA, CPU], [CUDA, CPU], [(CUDA, "a"), (CPU, "b")])
    providers.check_serving([CUDA], [CUDA, CPU], [(CUDA, "a")])
    providers.check_serving([CUDA, CPU], [CUDA, CPU], [])
    with pytest.raises(errors.ProviderError, match="node 'b' would run on CPUExecutionProvider"):
        providers.check_serving([CUDA], [CUDA, CPU], [(CUDA, "a"), (CPU, "b")])
    with pytest.raises(errors.ProviderError, match="CUDAExecutionProvider takes none"):
        providers.check_serving([CUDA, CPU], [CUDA, CPU], [(CPU, "a")])


def test_a_skewed_installation_is_refused():
    ort.check_no_skew(["onnxruntime 1.32.0"], "1.32.0", "1.32.0")
    ort.check_no_skew([], "1.32.0", "1.32.0")
    for installed, module, library in (
        (["onnxruntime 1.32.0"], "1.31.1", "1.31.1"),
        (["onnxruntime-gpu 1.31.1"], "1.31.1", "1.32.0"),
    ):
        with pytest.raises(errors.RuntimeMisuseError, match="uninstall every onnxruntime distribution"):
            ort.check_no_skew(installed, module, library)


def test_a_run_never_falls_back_to_another_provider_in_the_middle(monkeypatch, capfd):
    with Backend.load(models.linear().SerializeToString(), threads=1) as backend:

        class Broken:
            def is_webgpu_graph_capture_enabled(self):
                return False

            def run(self, *args):
                raise STATE.EPFail("the device is lost")

        backend._session._sess, kept = Broken(), backend._session._sess
        with pytest.raises(errors.RuntimeDeviceError, match="the device is lost") as caught:
            backend.run_sync(models.rows(1))
        assert caught.value.retryable
        backend._session._sess = kept
    assert ("", "") == capfd.readouterr()


def test_many_threads_load_with_limits_of_their_own_at_once():
    model = models.chain(4).SerializeToString()
    wrong = []

    def use(megabytes):
        with Backend.load(model, threads=1, memory_limit=megabytes << 20) as backend:
            try:
                backend.run_sync(models.rows(12 * MB))
                served = True
            except errors.RuntimeExhaustedError:
                served = False
            if served != (megabytes == 64):
                wrong.append(megabytes)

    threads = [threading.Thread(target=use, args=(limit,)) for limit in (16, 64) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == wrong


def test_a_wall_clock_that_jumps_moves_no_deadline(endless, monkeypatch):
    for jump in (0.0, 1e12):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        monkeypatch.setattr(time, "time_ns", lambda jump=jump: int(jump * 1e9))
        with pytest.raises(errors.RunDeadlineError):
            endless.run_sync(models.FOREVER, deadline=0.01)
        with pytest.raises(errors.RunDeadlineError):
            asyncio.run(endless.run(models.FOREVER, deadline=0.01))
        assert [3] == endless.run_sync(models.counting(3), deadline=3600)["y"].tolist()
