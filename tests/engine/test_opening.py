"""Opening, closing and dropping an engine, with a decoder that only pretends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import anyio
import pytest

from seawall import Engine
from seawall.engine import EngineClosedError
from seawall.engine.worker import Worker
from seawall.inference.errors import DecoderClosedError
from tests.cancelling import CancelAt

NAME = "pretended"


class Decoder:
    """Says "a b c" to everything."""

    context = 64
    words = "abc"

    def __init__(self):
        self.closed = False
        self.sequences = 0

    def encode_chat(self, prompt):
        return [1]

    def start(self, tokens, **settings):
        if self.closed:
            raise DecoderClosedError("this decoder is closed")
        self.sequences += 1
        return Sequence(self)

    def close(self):
        self.closed, self.closed_in = True, threading.current_thread()


class Sequence:
    speculation = None

    def __init__(self, decoder):
        self.decoder, self.words = decoder, list(decoder.words)

    def step(self):
        if self.decoder.closed:
            raise DecoderClosedError("this sequence is closed")
        word = self.words.pop(0)
        finish = None if self.words else "stop"
        return SimpleNamespace(text=word, token=ord(word), finish=finish, read=0, logprobs=None)

    def cancel(self):
        """Nothing runs for long here."""

    def close(self):
        self.decoder.sequences -= 1


class Loader:
    """Loads decoders, and can be held up or told to fail."""

    def __init__(self, *outcomes):
        self.outcomes, self.loaded, self.calls = list(outcomes), [], 0
        self.begun, self.released = threading.Event(), threading.Event()
        self.released.set()

    def __call__(self):
        self.calls += 1
        self.begun.set()
        assert self.released.wait(30)
        if self.outcomes:
            raise self.outcomes.pop(0)
        self.loaded.append(Decoder())
        return self.loaded[-1]

    def hold(self):
        self.begun.clear()
        self.released.clear()


def engine_of(loader):
    return Engine(loader, name=NAME, policies=())


def threads():
    return [thread for thread in threading.enumerate() if thread.name == f"seawall-{NAME}"]


def gone():
    """Whether the threads of dropped engines end."""
    for thread in threads():
        thread.join(30)
    return not threads()


async def on_thread(event):
    assert await asyncio.to_thread(event.wait, 30)


async def started(coroutine):
    """A task, as far as its first await."""
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    return task


async def everyone_waits(engine, count):
    while engine._model is None or engine._model.openers < count:  # noqa: ASYNC110 - they are in other threads
        await asyncio.sleep(0)


def test_tasks_that_open_one_engine_at_once_share_one_load():
    async def main():
        loader = Loader()
        engine = engine_of(loader)
        assert await asyncio.gather(*(engine.open() for _ in range(10))) == [engine] * 10
        assert (loader.calls, len(threads())) == (1, 1)
        assert (await engine.generate("hello")).text == "abc"
        engine.close()
        assert loader.loaded[0].closed

    asyncio.run(main())
    assert not threads()


def test_opening_an_open_engine_loads_nothing():
    async def main():
        loader = Loader()
        async with engine_of(loader) as engine:
            assert await engine is engine
        assert loader.calls == 1

    asyncio.run(main())


def test_loops_in_eight_threads_that_open_one_engine_share_one_load():
    loader = Loader()
    engine = engine_of(loader)
    loader.hold()
    answers = []

    def user():
        async def main():
            await engine.open()
            answers.append((await engine.generate("hello")).text)

        asyncio.run(main())

    users = [threading.Thread(target=user) for _ in range(8)]
    for one in users:
        one.start()
    asyncio.run(everyone_waits(engine, 8))
    loader.released.set()
    for one in users:
        one.join(30)
    assert answers == ["abc"] * 8
    assert loader.calls == 1
    engine.close()
    assert not threads()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_opener_that_is_cancelled_does_not_take_the_load_from_the_others(which):
    async def main():
        loader = Loader()
        engine = engine_of(loader)
        loader.hold()
        tasks = [await started(engine.open()) for _ in range(3)]
        await on_thread(loader.begun)
        tasks[which].cancel()
        await asyncio.sleep(0)
        loader.released.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results.pop(which), asyncio.CancelledError)
        assert results == [engine, engine]
        assert loader.calls == 1
        assert (await engine.generate("hello")).text == "abc"
        engine.close()

    asyncio.run(main())
    assert not threads()


def test_when_every_opener_is_cancelled_nothing_stays_and_the_engine_can_be_opened_again():
    async def main():
        loader = Loader()
        engine = engine_of(loader)
        loader.hold()
        tasks = [await started(engine.open()) for _ in range(3)]
        await on_thread(loader.begun)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks), "the load must not go on behind their backs"
        loader.released.set()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert not threads()
        assert loader.loaded[0].closed
        with pytest.raises(EngineClosedError):
            await engine.generate("hello")
        async with engine:
            assert (await engine.generate("hello")).text == "abc"

    asyncio.run(main())
    assert not threads()


def test_a_load_that_fails_is_told_to_all_who_wait_and_may_be_tried_again():
    async def main():
        error = OSError("no space")
        loader = Loader(error)
        engine = engine_of(loader)
        loader.hold()
        tasks = [await started(engine.open()) for _ in range(3)]
        await on_thread(loader.begun)
        loader.released.set()
        assert await asyncio.gather(*tasks, return_exceptions=True) == [error] * 3
        assert loader.calls == 1
        assert not threads()
        async with engine:
            assert loader.calls == 2

    asyncio.run(main())
    assert not threads()


def test_who_comes_after_a_load_has_failed_tries_again_though_others_have_yet_to_hear_of_it():
    async def main():
        loader = Loader(OSError("no space"))
        engine = engine_of(loader)
        first = await started(engine.open())
        while engine._model.error is None:  # the loop sees nothing of it meanwhile
            pass
        await engine.open()
        assert isinstance((await asyncio.wait([first]))[0].pop().exception(), OSError)
        assert (loader.calls, len(threads())) == (2, 1)
        engine.close()

    asyncio.run(main())
    assert not threads()


def test_a_failed_load_leaves_no_reference_cycle():
    async def main():
        loader = Loader(OSError("no space"))
        engine = engine_of(loader)
        with pytest.raises(OSError, match="no space"):
            await engine.open()
        return weakref.ref(engine)

    gc.collect()
    gc.disable()
    try:
        left = asyncio.run(main())
        assert left() is None
    finally:
        gc.enable()


def test_closing_while_it_opens_is_told_to_all_who_wait():
    async def main():
        loader = Loader()
        engine = engine_of(loader)
        loader.hold()
        tasks = [await started(engine.open()) for _ in range(3)]
        await on_thread(loader.begun)
        engine.close()  # does not wait for the load
        again = await started(engine.open())
        loader.released.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineClosedError] * 3
        assert await again is engine
        assert sorted(decoder.closed for decoder in loader.loaded) == [False, True]
        assert len(threads()) == 1
        engine.close()

    asyncio.run(main())
    assert not threads()


async def opened_and_closed(engine):
    async with engine:
        pass


async def a_whole_life(engine):
    async with engine:
        async for _ in engine.stream("hello"):
            await asyncio.sleep(0)
        await engine.generate("hello")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("life", [opened_and_closed, a_whole_life])
def test_a_cancellation_at_every_await_in_turn_leaves_no_thread_no_sequence_and_a_closed_engine(life, at_once):
    async def main():
        reached, step = True, 0
        while reached:
            loader = Loader()
            engine = engine_of(loader)
            life_of_it = CancelAt(life(engine), step, at_once=at_once)
            task = asyncio.ensure_future(_awaiting(life_of_it))
            await asyncio.wait([task])
            assert task.cancelled() or not life_of_it.reached
            assert await asyncio.to_thread(gone)
            while not all(decoder.closed for decoder in loader.loaded):  # noqa: ASYNC110 - closing goes on in a thread
                await asyncio.sleep(0.001)
            assert all(decoder.closed and not decoder.sequences for decoder in loader.loaded)
            with pytest.raises(EngineClosedError):
                await engine.generate("hello")
            reached, step = life_of_it.reached, step + 1
        return step

    assert asyncio.run(main()) > 3


async def _awaiting(awaitable):
    return await awaitable


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_scope_around_an_engine_closes_it(backend):
    loader = Loader()

    async def main():
        with anyio.CancelScope() as scope:
            async with engine_of(loader):
                scope.cancel()

    anyio.run(main, backend=backend)
    assert loader.loaded[0].closed
    assert loader.loaded[0].closed_in is not threading.main_thread(), "closing waits for a step, off the loop"
    assert not threads()


def closed_and_opened_again(engine):
    """As another task could, at any moment of this one."""
    engine.close()
    thread = threading.Thread(target=lambda: asyncio.run(engine.open()))
    thread.start()
    thread.join(30)


MOMENTS = ["before the prompt is encoded", "before the answer starts", "before a step", "between two steps"]


@pytest.mark.parametrize("after", [Engine.close, closed_and_opened_again])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_answer_whose_engine_is_closed_meanwhile_ends_with_engine_closed_error(moment, after, monkeypatch):
    async def main():
        loader = Loader()
        engine = await engine_of(loader)
        decoder = loader.loaded[0]
        decoder.words = "abc" * 10  # more than is read ahead
        if moment == MOMENTS[0]:
            running = engine._running
            monkeypatch.setattr(engine, "_running", lambda: (running(), after(engine))[0])
        elif moment == MOMENTS[1]:
            start = decoder.start
            decoder.start = lambda tokens, **settings: (after(engine), start(tokens, **settings))[1]
        elif moment == MOMENTS[2]:
            start = decoder.start
            decoder.start = lambda tokens, **settings: (start(tokens, **settings), after(engine))[0]
        async with contextlib.aclosing(engine.stream("hello")) as pieces:
            with pytest.raises(EngineClosedError):
                async for _ in pieces:
                    if moment == MOMENTS[3]:
                        after(engine)
        assert decoder.sequences == 0
        engine.close()

    asyncio.run(main())
    assert not threads()


def test_answers_while_an_engine_is_closed_and_opened_by_another_thread_know_no_other_error():
    loader = Loader()
    engine = engine_of(loader)
    done = threading.Event()

    def restless():
        while not done.is_set():
            asyncio.run(engine.open())
            engine.close()

    async def main():
        ends = {"answered": 0, "closed": 0}
        while sum(ends.values()) < 300:
            try:
                assert (await engine.generate("hello")).text == "abc"
                ends["answered"] += 1
            except EngineClosedError:
                ends["closed"] += 1

    other = threading.Thread(target=restless)
    other.start()
    try:
        asyncio.run(main())
    finally:
        done.set()
        other.join(30)
    assert not threads()
    assert all(decoder.sequences == 0 for decoder in loader.loaded)


def test_an_engine_dropped_without_close_says_so_and_its_thread_ends_without_the_collector():
    async def used(engine):
        await engine.open()
        assert (await engine.generate("hello")).text == "abc"

    loader = Loader()
    engine = engine_of(loader)
    asyncio.run(used(engine))
    dropped = weakref.ref(engine)
    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match="'pretended' was dropped without close"):
            del engine
        assert gone()
        assert loader.loaded[0].closed
    finally:
        gc.enable()
    gc.collect()
    assert dropped() is None


def test_an_engine_that_was_closed_or_never_opened_is_dropped_in_silence():
    async def main():
        async with engine_of(Loader()):
            pass

    asyncio.run(main())
    engine_of(Loader())
    with pytest.raises(TypeError):
        Engine(Loader(), policies=(None,))
    gc.collect()


def test_an_answer_holds_its_engine():
    async def main():
        loader = Loader()
        engine = await engine_of(loader)
        loader.loaded[0].words = "abc" * 10  # more than is read ahead
        pieces, held = engine.stream("hello"), weakref.ref(engine)
        del engine
        assert [(await anext(pieces)).text, (await anext(pieces)).text] == ["a", "b"]
        held().close()
        with pytest.raises(EngineClosedError):
            async for _ in pieces:
                pass

    asyncio.run(main())
    assert not threads()


def test_a_process_that_ends_with_an_open_engine_ends_quietly():
    script = """
import asyncio
from seawall import Engine

class Decoder:
    def close(self): pass

engine = Engine(Decoder, policies=())
asyncio.run(engine.open())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_load_may_close_the_engine_it_is_for():
    async def main():
        engine = engine_of(lambda: (engine.close(), Decoder())[1])
        with pytest.raises(EngineClosedError):
            await engine.open()

    asyncio.run(main())
    assert not threads()


def test_a_worker_can_be_closed_from_its_own_thread():
    async def main():
        worker = Worker(f"seawall-{NAME}")
        await worker.run(worker.close)

    asyncio.run(main())
    assert gone()


def test_a_worker_whose_thread_can_not_start_says_so_each_time(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    async def main():
        worker = Worker(f"seawall-{NAME}")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    await worker.run(list)
        assert await worker.run(lambda: 1) == 1
        worker.close()

    asyncio.run(main())
    assert not threads()
