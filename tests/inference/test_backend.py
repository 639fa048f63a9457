"""A backend serves any ONNX model, checks what it is given, and leaves nothing behind."""

import asyncio
import gc
import threading
import time
from datetime import timedelta

import anyio
import anyio.lowlevel
import ml_dtypes
import numpy as np
import onnx
import psutil
import pytest
from onnx.parser import parse_model

from seawall.inference import Backend
from seawall.inference.errors import (
    BackendClosedError,
    InvalidInputError,
    InvalidSettingError,
    ModelError,
    NotFiniteOutputError,
    RunDeadlineError,
)
from seawall.testing import no_leaks
from tests.inference import onnx_models as models


@pytest.fixture
def backend():
    with Backend.load(models.linear().SerializeToString(), threads=1) as loaded:
        yield loaded


@pytest.fixture
def endless():
    with Backend.load(models.endless().SerializeToString(), threads=1) as loaded:
        yield loaded


def in_flight(backend):
    """Wait until a run is at work, and not only queued."""
    while not any(call.thread for call in list(backend._calls)):
        time.sleep(0)


async def until(condition):
    while not condition():
        await anyio.lowlevel.checkpoint()


async def at_work(backend, calls=1):
    await until(lambda: backend.calls >= calls and any(call.thread for call in list(backend._calls)))


def test_a_file_and_its_external_data_and_bytes_serve_the_same(tmp_path):
    path, _ = models.with_external_data(tmp_path)
    feed = {"x": np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)}
    for model in (path, str(path), models.linear().SerializeToString()):
        with Backend.load(model) as backend:
            np.testing.assert_array_equal(feed["x"], backend.run_sync(feed)["y"])
            assert ["x"] == [port.name for port in backend.inputs]
            assert ("batch", 64) == backend.outputs[0].shape


def test_outputs_have_names_and_nan_passes_as_the_models_answer(backend):
    outputs = backend.run_sync({"x": np.full((1, 64), np.nan, np.float32)})
    assert ["y"] == list(outputs)
    assert np.isnan(outputs["y"]).all()


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_coroutines_get_the_outputs_on_any_event_loop(backend, library):
    async def main():
        first = await backend.run(models.rows(2), deadline=timedelta(seconds=60))
        results = []

        async def one(count):
            results.append((await backend.run(models.rows(count)))["y"].shape)

        async with anyio.create_task_group() as group:
            for count in range(1, 9):
                group.start_soon(one, count)
        return first["y"].shape, sorted(results)

    with no_leaks():
        first, results = anyio.run(main, backend=library)
        backend.close()
    assert (2, 64) == first
    assert [(count, 64) for count in range(1, 9)] == results


def test_several_loops_and_threads_share_a_backend():
    expected, found = [], []
    with Backend.load(models.linear().SerializeToString(), threads=1, workers=3) as backend:

        async def on_a_loop(number):
            for count in range(1, 20):
                found.append((number, (await backend.run(models.rows(count)))["y"].shape[0]))

        def in_a_thread(number):
            for count in range(1, 20):
                found.append((number, backend.run_sync(models.rows(count))["y"].shape[0]))

        threads = [
            *(threading.Thread(target=lambda n=n: asyncio.run(on_a_loop(n))) for n in range(3)),
            *(threading.Thread(target=in_a_thread, args=(n,)) for n in range(3, 6)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = [(number, count) for number in range(6) for count in range(1, 20)]
        assert expected == sorted(found)
        assert 0 == backend.calls


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_a_model_runs(endless):
    run = asyncio.create_task(endless.run(models.FOREVER))
    await at_work(endless)
    for _ in range(100):
        await asyncio.sleep(0)
    assert not run.done()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


@pytest.mark.asyncio
async def test_as_many_runs_are_at_work_at_once_as_there_are_workers():
    async with Backend.load(models.endless().SerializeToString(), threads=1, workers=2) as backend:
        runs = [asyncio.create_task(backend.run(models.FOREVER)) for _ in range(3)]
        await until(lambda: sum(call.thread is not None for call in list(backend._calls)) == 2)
        assert 3 == backend.calls
        assert 2 == sum(call.thread is not None for call in backend._calls)
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert [BackendClosedError] * 3 == [type(outcome) for outcome in outcomes]


X = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    ("inputs", "name", "value", "rule"),
    [
        ({}, "x", "nothing", "the model needs 'x'"),
        ({"x": X, "z": X}, "z", "an unknown name", "the model takes 'x'"),
        ({"x": X.astype(np.float64)}, "x", "an array of float64 [2, 64]", "an array of float32"),
        ({"x": X.astype(">f4")}, "x", "an array of >f4 [2, 64]", "an array of float32"),
        ({"x": X.astype(object)}, "x", "an array of object [2, 64]", "an array of float32"),
        ({"x": X[0]}, "x", "an array of float32 [64]", "2 dimensions [batch, 64]"),
        ({"x": X[:, :63]}, "x", "an array of float32 [2, 63] with gaps", "a C-contiguous array"),
        ({"x": X[:, :63].copy()}, "x", "an array of float32 [2, 63]", "dimension 1 of [batch, 64] is 64"),
        ({"x": np.asfortranarray(X)}, "x", "an array of float32 [2, 64] with gaps", "a C-contiguous array"),
        ({"x": X.tolist()}, "x", "list", "a numpy array"),
        ({"x": None}, "x", "NoneType", "a numpy array"),
        ([X], "*", "list", "inputs are a mapping of names to arrays"),
    ],
)
def test_a_wrong_input_is_refused_before_the_runtime_sees_it(backend, monkeypatch, inputs, name, value, rule):
    monkeypatch.setattr(backend, "_session", None)  # the runtime cannot be reached
    with pytest.raises(InvalidInputError) as caught:
        backend.run_sync(inputs)
    assert (name, value) == (caught.value.input, caught.value.value)
    assert caught.value.rule.startswith(rule)
    assert all(part in str(caught.value) for part in (name, value, rule))
    assert not caught.value.retryable
    with pytest.raises(InvalidInputError):
        asyncio.run(backend.run(inputs))
    assert 0 == backend.calls


def test_strings_are_arrays_of_str():
    text = models.model(
        [models.make.make_node("Identity", ["x"], ["y"])],
        [models.tensor("x", ["n"], onnx.TensorProto.STRING)],
        [models.tensor("y", ["n"], onnx.TensorProto.STRING)],
    )
    with Backend.load(text.SerializeToString(), threads=1) as backend:
        backend.warm_up()
        for words in (np.array(["a", "bc"]), np.array(["a", "bc"], dtype=object)):
            assert ["a", "bc"] == backend.run_sync({"x": words})["y"].tolist()
        for wrong in (np.array([b"a"]), np.array(["a", 1], dtype=object), np.array([1.0])):
            with pytest.raises(InvalidInputError, match="an array of str"):
                backend.run_sync({"x": wrong})


def test_an_input_that_has_a_value_in_the_model_may_be_left_out():
    made = models.linear()
    made.graph.input.append(models.tensor("w", [64, 64]))
    with Backend.load(made.SerializeToString(), threads=1) as backend:
        assert (backend.run_sync({"x": X})["y"] == X).all()
        assert (backend.run_sync({"x": X, "w": np.zeros((64, 64), np.float32)})["y"] == 0).all()
        with pytest.raises(InvalidInputError, match="'w'"):
            backend.run_sync({"x": X, "w": np.zeros((64, 63), np.float32)})


def test_a_model_without_inputs_and_one_with_empty_arrays_run(backend):
    constant = models.model([models.make.make_node("Identity", ["w"], ["y"])], [], [models.tensor("y", [1])],
                            [("w", np.ones(1, np.float32))])  # fmt: skip
    with Backend.load(constant.SerializeToString(), threads=1) as without:
        assert [1] == without.run_sync({})["y"].tolist()
    assert (0, 64) == backend.run_sync(models.rows(0))["y"].shape


def test_warming_up_runs_the_smallest_inputs_or_those_it_is_given(backend):
    seen = []
    check = backend._rules.check
    backend._rules.check = lambda inputs: seen.append(inputs["x"].shape) or check(inputs)
    assert backend.warm_up() >= 0
    backend.warm_up(models.rows(7))
    assert [(1, 64), (7, 64)] == seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, got 0"),
        ({"threads": True}, "got True"),
        ({"memory_limit": 1000}, "memory_limit must be bytes, at least 1048576, got 1000"),
        ({"memory_limit": 1e9}, "got 1000000000.0"),
        ({"workers": 0}, "workers must be a whole number from 1 to 1024, got 0"),
        ({"providers": "CPUExecutionProvider"}, "got 'CPUExecutionProvider'"),
        ({"providers": ()}, "at least one name"),
        ({"providers": ["CPUExecutionProvider"] * 2}, "must be different names"),
    ],
)
def test_a_setting_outside_its_range_is_refused_with_its_value(settings, message):
    with pytest.raises(InvalidSettingError, match=message.replace("(", r"\(")):
        Backend.load(models.linear().SerializeToString(), **settings)


@pytest.mark.parametrize("deadline", ["1", True, float("nan"), None.__class__])
def test_a_deadline_is_seconds(backend, deadline):
    with pytest.raises(InvalidSettingError, match="deadline must be a number of seconds"):
        backend.run_sync(models.rows(1), deadline=deadline)
    assert 0 == backend.calls


def test_neither_a_path_nor_bytes_is_refused():
    for model in (None, 3, bytearray(b"x")):
        with pytest.raises(InvalidSettingError, match="path or bytes"):
            Backend.load(model)


def test_a_closed_backend_refuses_and_closing_again_does_nothing(backend):
    backend.close()
    backend.close()
    assert backend.closed
    assert "closed" in repr(backend)
    for use in (lambda: backend.run_sync(models.rows(1)), backend.warm_up, backend.report, backend.shrink,
                lambda: asyncio.run(backend.run(models.rows(1)))):  # fmt: skip
        with pytest.raises(BackendClosedError, match="'model' is closed"):
            use()


def test_closing_ends_runs_in_flight_within_one_node(endless):
    outcomes = []

    def use():
        try:
            endless.run_sync(models.FOREVER)
        except ModelError as error:
            outcomes.append(error)

    async def use_async():
        with pytest.raises(BackendClosedError, match="closed"):
            await endless.run(models.FOREVER)

    threads = [threading.Thread(target=use), *(threading.Thread(target=lambda: asyncio.run(use_async())) for _ in "ab")]
    for thread in threads:
        thread.start()
    while endless.calls < 3:
        time.sleep(0)
    with no_leaks():
        endless.close()
    assert 0 == endless.calls
    for thread in threads:
        thread.join()
    assert [BackendClosedError] == [type(outcome) for outcome in outcomes]


@pytest.mark.asyncio
async def test_closing_on_the_loop_whose_tasks_are_in_flight_does_not_block_for_ever(endless):
    runs = [asyncio.create_task(endless.run(models.FOREVER)) for _ in range(3)]
    await at_work(endless, 3)
    endless.close()
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert [BackendClosedError] * 3 == [type(outcome) for outcome in outcomes]


def test_draining_refuses_new_calls_and_waits_for_those_in_flight(endless):
    done = []
    thread = threading.Thread(target=lambda: done.append(endless.run_sync(models.counting(300_000))))
    thread.start()
    in_flight(endless)
    assert not endless.drain(timeout=0)
    with pytest.raises(BackendClosedError):
        endless.run_sync(models.counting(1))
    assert endless.drain()
    thread.join()
    assert [300_000] == done[0]["y"].tolist()


def test_a_backend_that_is_dropped_gives_its_threads_back_and_says_so():
    with no_leaks():
        kept = [Backend.load(models.linear().SerializeToString(), threads=1)]
        asyncio.run(kept[0].run(models.rows(1), deadline=60))
        threads = [*kept[0]._workers._threads, kept[0]._watchdog._thread]
        assert all(thread.is_alive() for thread in threads)
        with pytest.warns(ResourceWarning, match="'model' was dropped without close"):
            kept.clear()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_a_block_closes_the_backend_even_when_it_is_cancelled(library):
    async def main():
        with anyio.CancelScope() as scope:
            async with Backend.load(models.endless().SerializeToString(), threads=1) as backend:
                scope.cancel()
                await backend.run(models.FOREVER)
        return backend

    with no_leaks():
        assert anyio.run(main, backend=library).closed


def test_thirty_loads_and_closes_leave_no_thread_no_file_and_no_memory():
    process = psutil.Process()
    model = models.chain(8, columns=512).SerializeToString()  # 1 MB of weights

    def cycle():
        with Backend.load(model, threads=2, memory_limit=64 << 20) as backend:
            asyncio.run(backend.run(models.rows(256, 512), deadline=60))

    for _ in range(5):
        cycle()
    gc.collect()
    before = process.num_fds(), process.num_threads(), process.memory_info().rss
    for _ in range(30):
        cycle()
    gc.collect()
    assert before[:2] == (process.num_fds(), process.num_threads())
    assert process.memory_info().rss - before[2] < 15 << 20  # a leak of the weights alone would be 30 MB


def test_a_deadline_that_is_never_reached_costs_nothing_that_stays(backend):
    for _ in range(300):
        backend.run_sync(models.rows(1), deadline=3600)
    assert len(backend._watchdog._heap) <= 130
    with pytest.raises(RunDeadlineError):
        backend.run_sync(models.rows(1), deadline=0)


@pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn"])
def test_an_input_of_a_type_that_numpy_has_not_is_refused_with_its_cure(kind):
    text = f'<ir_version: 10, opset_import: ["" : 21]> cast ({kind}[n] x) => (float[n] y) {{ y = Cast<to = 1>(x) }}'
    with Backend.load(parse_model(text).SerializeToString(), threads=1) as backend:
        for value in (np.ones(2, getattr(ml_dtypes, kind.replace("8e", "8_e"))), np.ones(2, np.float32)):
            with pytest.raises(InvalidInputError, match=f"tensor\\({kind}\\).*let the model cast from float"):
                backend.run_sync({"x": value})


NARROW = {
    onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    onnx.TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    onnx.TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2,
    onnx.TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
}


@pytest.mark.parametrize(("kind", "dtype"), NARROW.items())
def test_outputs_of_types_that_numpy_has_not_are_those_of_ml_dtypes(kind, dtype):
    cast = models.make.make_node("Cast", ["x"], ["y"], to=kind)
    other = models.make.make_node("Add", ["x", "x"], ["z"])
    ports = [models.tensor("x", ["n"])], [models.tensor("y", ["n"], kind), models.tensor("z", ["n"])]
    with Backend.load(models.model([cast, other], *ports).SerializeToString(), threads=1, finite=True) as backend:
        given = np.array([1, -2.5, 0, 13], np.float32)
        found = backend.run_sync({"x": given})
        assert (dtype, given.astype(dtype).tolist()) == (found["y"].dtype, found["y"].tolist())
        assert (2 * given).tolist() == found["z"].tolist()
        assert (0,) == backend.run_sync({"x": given[:0]})["y"].shape
        with pytest.raises(NotFiniteOutputError, match="1 NaN"):
            backend.run_sync({"x": np.array([1, np.nan], np.float32)})


def sequence():
    """How long a sequence of float tensors is."""
    kind = models.make.make_sequence_type_proto(models.make.make_tensor_type_proto(models.FLOAT, None))
    nodes = [models.make.make_node("SequenceLength", ["s"], ["n"])]
    return models.model(nodes, [models.make.make_value_info("s", kind)], [models.tensor("n", [], models.INT64)])


def optional():
    """Whether an optional float tensor is there."""
    kind = models.make.make_optional_type_proto(models.make.make_tensor_type_proto(models.FLOAT, None))
    nodes = [models.make.make_node("OptionalHasElement", ["o"], ["n"])]
    return models.model(nodes, [models.make.make_value_info("o", kind)],
                        [models.tensor("n", [], onnx.TensorProto.BOOL)])  # fmt: skip


def dictionary():
    """The values under "a" and "b"."""
    kind = models.make.make_map_type_proto(
        onnx.TensorProto.STRING, models.make.make_tensor_type_proto(models.FLOAT, [])
    )
    node = models.make.make_node("DictVectorizer", ["m"], ["n"], domain="ai.onnx.ml", string_vocabulary=["a", "b"])
    made = models.model([node], [models.make.make_value_info("m", kind)], [models.tensor("n", [None, None])])
    made.opset_import.append(models.make.make_opsetid("ai.onnx.ml", 3))
    return made


ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("model", "name", "value", "answer"),
    [
        (sequence(), "s", [ONE, ONE], 2),
        (sequence(), "s", [], 0),
        (optional(), "o", ONE, True),
        (optional(), "o", None, False),
        (dictionary(), "m", {"b": 2.0}, [[0.0, 2.0]]),
        (dictionary(), "m", {"a": np.float32(1)}, [[1.0, 0.0]]),
    ],
)
def test_sequences_optionals_and_maps_are_served(model, name, value, answer):
    with Backend.load(model.SerializeToString(), threads=1) as backend:
        assert answer == backend.run_sync({name: value})["n"].tolist()


@pytest.mark.parametrize(
    ("model", "name", "value", "rule"),
    [
        (sequence(), "s", (ONE,), "a list, for a seq"),
        (sequence(), "s", ONE, "a list, for a seq"),
        (sequence(), "s", [ONE, ONE.astype(np.float64)], "an array of float32, got an array of float64"),
        (sequence(), "s", [1.0], "an array of float32, got float"),
        (sequence(), "s", [np.ones((2, 4), np.float32)[:, ::2]], "C-contiguous"),
        (optional(), "o", ONE.astype(np.float64), "an array of float32"),
        (optional(), "o", 5, "an array of float32"),
        (dictionary(), "m", [("a", 1.0)], "a dict, for a map"),
        (dictionary(), "m", {1: 1.0}, "float under int"),
        (dictionary(), "m", {"a": "x"}, "str under str"),
        (dictionary(), "m", {"a": True}, "bool under str"),
    ],
)
def test_a_wrong_sequence_optional_or_map_is_refused_before_the_runtime_sees_it(model, name, value, rule, monkeypatch):
    with Backend.load(model.SerializeToString(), threads=1) as backend:
        monkeypatch.setattr(backend, "_session", None)
        with pytest.raises(InvalidInputError, match=rule) as caught:
            backend.run_sync({name: value})
        assert name == caught.value.input


def test_only_the_outputs_that_are_wanted_are_given_and_in_their_order():
    nodes = [models.make.make_node("Add", ["x", "x"], ["twice"]), models.make.make_node("Neg", ["x"], ["less"])]
    ports = [models.tensor("x", ["n"])], [models.tensor("twice", ["n"]), models.tensor("less", ["n"])]
    made = models.model(nodes, *ports).SerializeToString()
    for names in (None, ["less"], ("less", "twice"), ["twice", "twice"]):
        with Backend.load(made, threads=1, outputs=names) as backend:
            expected = ["twice", "less"] if names is None else list(dict.fromkeys(names))
            assert expected == list(backend.run_sync({"x": ONE})) == [port.name for port in backend.outputs]


@pytest.mark.parametrize("names", ["less", [], ["none"], [3]])
def test_outputs_that_there_are_not_are_refused(names):
    with pytest.raises(InvalidSettingError, match="outputs must be some of 'y'"):
        Backend.load(models.linear().SerializeToString(), threads=1, outputs=names)


@pytest.mark.parametrize("timeout", [float("nan"), -1, "1", True])
def test_a_drain_for_no_number_of_seconds_is_refused_before_it_begins(endless, timeout):
    with pytest.raises(InvalidSettingError, match="timeout must be"):
        endless.drain(timeout)
    assert not endless.closed


def test_a_drain_may_last_for_ever(endless):
    assert endless.drain(float("inf"))
    assert endless.drain(timedelta(seconds=1))
