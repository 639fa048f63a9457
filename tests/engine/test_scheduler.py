"""Many callers and one thread of steps: what the engine promises each of them, with a model that only pretends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import anyio
import pytest

from seawall import CircuitBreaker, Deadline, Priority, priority
from seawall.core import gate
from seawall.core.events import CallRejected, listen_in_context
from seawall.engine import (
    AnswerShed,
    DeadlineUnmeetableError,
    Engine,
    EngineClosedError,
    EngineDrainingError,
    QueueFullError,
    QueueTimeoutError,
    StepStuck,
    StepStuckError,
    opening,
)
from seawall.engine.calls import READ_AHEAD, Call, Sample
from seawall.engine.stepping import Together
from seawall.inference.errors import (
    EmptyPromptError,
    InvalidSettingError,
    NotFiniteOutputError,
    PromptTooLongError,
    RuntimeExhaustedError,
    RuntimeFailure,
)
from tests.cancelling import CancelAt

from .fake_rows import Decoder, Rows

pytestmark = pytest.mark.anyio
NAME = "fake"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith(f"seawall-{NAME}")] == []


@pytest.fixture
def build(monkeypatch):
    monkeypatch.setattr(opening, "stepper_for", lambda decoder, *sizes: decoder.stepper)

    def build(rows, **settings):
        settings = {"policies": (), "rows": rows.rows, **settings}
        return Engine(lambda: Decoder(rows), name=NAME, **settings)

    return build


class Clock:
    """The gate's, moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    clock = Clock()
    with gate.use_clock(clock):
        yield clock


async def until(predicate):
    """Another thread gets there."""
    with anyio.fail_after(20):
        while not predicate():  # noqa: ASYNC110 - a thread can't set our event
            await anyio.sleep(0.001)


async def held(rows, tasks, engine, *prompts, **settings):
    """Start calls that have their rows, and a step that does not end before `rows.go`."""
    rows.hold()
    ends = {}
    for prompt in prompts:
        tasks.start_soon(ask, engine, ends, prompt, settings)
    await until(rows.stepping.is_set)
    return ends


async def ask(engine, ends, prompt, settings):
    """A call; what becomes of it is in `ends`."""
    try:
        ends[prompt] = (await engine.generate(prompt, **settings)).text
    except Exception as error:
        ends[prompt] = error


async def test_many_callers_advance_together_and_each_has_its_own_answer(build):
    rows = Rows(4)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "ab", "cd", "ef", "gh", "ij", "kl", max_tokens=5)
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 6)
        rows.go.set()
    assert ends == {"ab": "ababa", "cd": "cdcdc", "ef": "efefe", "gh": "ghghg", "ij": "ijiji", "kl": "klklk"}
    assert rows.most == 4
    assert rows.steps < 6 * 5


def test_loops_in_several_threads_and_of_both_kinds_share_one_engine(build):
    rows, answers = Rows(4), {}
    engine = build(rows)

    def user(number):
        async def main():
            await engine.open()
            for one in range(5):
                prompt = f"{number}{one}"
                answers[prompt] = (await engine.generate(prompt, max_tokens=4)).text

        anyio.run(main, backend="trio" if number % 2 else "asyncio")

    users = [threading.Thread(target=user, args=(number,)) for number in range(6)]
    for one in users:
        one.start()
    for one in users:
        one.join(30)
    engine.close()
    assert answers == {f"{user}{one}": f"{user}{one}" * 2 for user in range(6) for one in range(5)}


async def test_a_slow_reader_slows_its_own_row_only_and_misses_nothing(build):
    rows = Rows(2)
    async with build(rows) as engine:
        async with contextlib.aclosing(engine.stream("slow", max_tokens=50)) as pieces:
            first = await anext(pieces)
            quick = await engine.generate("q", max_tokens=50)
            await until(lambda: len(rows.active) == 1 and rows.active[0].paused)
            assert rows.active[0].written <= READ_AHEAD + 1
            rest = [piece.text async for piece in pieces]
        assert quick.text == "q" * 50
        assert first.text + "".join(rest) == ("slow" * 13)[:50]


async def test_one_that_reads_nothing_for_long_costs_no_steps(build):
    rows = Rows(2)
    async with build(rows) as engine, contextlib.aclosing(engine.stream("slow", max_tokens=50)) as pieces:
        await anext(pieces)
        await until(lambda: rows.active[0].paused and rows.steps == READ_AHEAD + 1)
        await anyio.sleep(0.01)
        assert rows.steps == READ_AHEAD + 1


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_stream_that_is_left_frees_its_row_within_a_step(build, how):
    rows = Rows(2)
    async with build(rows) as engine:
        if how == "closed":
            pieces = engine.stream("left", max_tokens=50)
            await anext(pieces)
            await pieces.aclose()
        else:
            with anyio.CancelScope() as scope:
                async for _ in engine.stream("left", max_tokens=50):
                    scope.cancel()
        steps = rows.steps
        await until(lambda: not rows.active)
        assert rows.steps <= steps + 1
        assert engine.snapshot().cancelled == 1
        assert engine.snapshot().running == 0


async def test_a_run_for_nobody_is_stopped_at_once_and_one_for_others_is_not(build):
    rows = Rows(2)
    async with build(rows) as engine:
        async with anyio.create_task_group() as tasks:
            ends = await held(rows, tasks, engine, "stays", max_tokens=3)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as others:
                    others.start_soon(ask, engine, ends, "leaves", {"max_tokens": 3})
                    await until(lambda: engine.snapshot().running + engine.snapshot().waiting == 2)
                    scope.cancel()
            assert rows.interrupts == 0
            tasks.cancel_scope.cancel()
        assert rows.interrupts == 1
        await until(lambda: not rows.active)


@pytest.mark.parametrize(("paused", "stopped"), [(True, True), (False, False)])
def test_a_run_is_for_nobody_else_where_all_others_are_paused(paused, stopped):
    class Batch:
        active = left, _ = SimpleNamespace(name="left", paused=False), SimpleNamespace(name="stays", paused=paused)

        def step(self, options):
            together.interrupt([self.left])
            return options.terminate

    together = Together(Batch())
    assert together.step() is stopped


async def test_who_is_cancelled_in_the_queue_leaves_it(build):
    rows = Rows(1)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "runs", max_tokens=3)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as others:
                others.start_soon(ask, engine, ends, "waits", {})
                await until(lambda: engine.snapshot().waiting == 1)
                scope.cancel()
        rows.go.set()
        await until(lambda: "runs" in ends)
        assert (engine.snapshot().waiting, rows.most) == (0, 1)


async def test_a_row_that_breaks_every_run_ends_alone(build):
    rows = Rows(4)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "good", "bad!", "fine", max_tokens=4)
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 3)
        rows.go.set()
    assert isinstance(ends.pop("bad!"), RuntimeFailure)
    assert ends == {"good": "good", "fine": "fine"}
    assert engine.snapshot().failed == 1


async def test_a_model_that_is_broken_ends_all_and_is_asked_again_by_the_next(build):
    rows = Rows(4)
    async with build(rows) as engine:
        async with anyio.create_task_group() as tasks:
            ends = await held(rows, tasks, engine, "one!", "two!", max_tokens=4)
            rows.go.set()
        assert {type(error) for error in ends.values()} == {RuntimeFailure}
        assert (await engine.generate("ok", max_tokens=2)).text == "ok"


async def test_logits_that_are_not_numbers_end_one_row(build):
    rows = Rows(4)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "good", "nan?", max_tokens=4)
        rows.go.set()
    assert isinstance(ends.pop("nan?"), NotFiniteOutputError)
    assert ends == {"good": "good"}


async def test_without_memory_the_newest_goes_back_to_the_queue_and_fewer_run_for_a_while(build, clock):
    rows, heard = Rows(3, memory=2), []
    async with build(rows, listeners=[heard.append]) as engine:
        async with anyio.create_task_group() as tasks:
            ends = await held(rows, tasks, engine, "ab", "cd", "ef", max_tokens=4)
            await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 3)
            rows.go.set()
        assert ends == {"ab": "abab", "cd": "cdcd", "ef": "efef"}
        assert engine.snapshot().rows == 2
        assert [event for event in heard if isinstance(event, AnswerShed)]
        clock.now += 5.0
        await engine.generate("gh", max_tokens=2)
        assert engine.snapshot().rows == 3


async def test_without_memory_the_least_important_ends_if_some_of_it_was_read(build):
    rows = Rows(3, memory=3)
    rows.stop_after = 1
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        pieces, ends = engine.stream("low", max_tokens=40), {}
        with priority(Priority.LOW):
            await anext(pieces)
        tasks.start_soon(ask, engine, ends, "high%", {"max_tokens": 5})  # takes all there is
        await until(lambda: engine.snapshot().running + engine.snapshot().waiting == 2)
        rows.go.set()
        with pytest.raises(RuntimeExhaustedError):
            async for _ in pieces:
                pass
    assert ends == {"high%": "high%"}


async def test_without_memory_one_that_nobody_saw_anything_of_goes_before_a_newer_one_that_was_read(build):
    rows = Rows(3, memory=2)
    rows.stop_after = 1
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "old~", "new", max_tokens=4)
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 2)
        rows.go.set()
        await until(lambda: rows.steps >= 1 and not rows.go.is_set())
        rows.stop_after, rows.memory_rows = None, 1
        rows.go.set()
    assert ends == {"old~": "old~", "new": "newn"}
    assert engine.snapshot().shed > 0


async def test_python_s_own_lack_of_memory_is_told_as_the_model_s_and_the_next_call_is_served(build):
    rows = Rows(2)
    async with build(rows) as engine:
        rows.broken = MemoryError("no more")
        with pytest.raises(RuntimeExhaustedError, match="no more") as told:
            await engine.generate("ab", max_tokens=2)
        assert isinstance(told.value.__cause__, MemoryError)
        rows.broken = None
        assert (await engine.generate("ab", max_tokens=2)).text == "ab"


async def test_where_two_rows_hang_alone_the_others_are_not_tried(build, clock):
    rows = Rows(4)
    async with build(rows, step_timeout=30.0) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "a", max_tokens=40)
        for prompt in ("b@", "c@", "d@"):  # later, for a first run of one of them would end it there
            tasks.start_soon(ask, engine, ends, prompt, {"max_tokens": 40})
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 4)
        rows.go.set()
        scheduler = engine._running()[2]
        while len(ends) < 4:
            await until(lambda: len(ends) == 4 or (rows.runs and "@" in "".join(rows.runs[-1]) and _runs(scheduler)))
            clock.now += 30.0
            scheduler.watch()
    assert sum(isinstance(end, StepStuckError) for end in ends.values()) >= 3
    assert sum(run in (["b@"], ["c@"], ["d@"]) for run in rows.runs) == 2


def _runs(scheduler):
    """Whether a step runs that was not told to stop."""
    step = scheduler._steps._running
    return step is not None and not step.overdue


async def test_one_that_finds_no_room_after_all_waits_again(build):
    rows = Rows(2)
    async with build(rows) as engine:
        assert (await engine.generate("$a", max_tokens=2)).text == "$a"


async def test_a_step_that_hangs_is_stopped_and_ends_only_whom_it_is_about(build, clock):
    rows, heard = Rows(4), []
    async with build(rows, step_timeout=30.0, listeners=[heard.append]) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "good", "hangs@", max_tokens=4)
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 2)
        rows.go.set()
        scheduler = engine._running()[2]
        for _ in range(2):  # the shared run, and its own
            await until(lambda: rows.runs and "hangs@" in rows.runs[-1] and not rows.interrupted.is_set())
            runs = len(rows.runs)
            clock.now += 29.0
            scheduler.watch()
            assert len(rows.runs) == runs
            clock.now += 1.0
            scheduler.watch()
            await until(lambda: len(rows.runs) > runs or "hangs@" in ends)  # noqa: B023
    assert isinstance(ends.pop("hangs@"), StepStuckError)
    assert ends == {"good": "good"}
    assert [event.seconds for event in heard if isinstance(event, StepStuck)] == [30.0, 30.0]


async def test_an_engine_whose_step_can_not_even_be_stopped_is_given_up(build, clock):
    rows = Rows(4)
    async with build(rows, step_timeout=30.0) as engine:
        async with anyio.create_task_group() as tasks:
            ends = await held(rows, tasks, engine, "hangs#", max_tokens=4)
            clock.now += 30.0
            engine._running()[2].watch()
            clock.now += 30.0
            with pytest.raises(StepStuckError, match="could not be stopped"):
                engine._running()[2].watch()
        assert isinstance(ends["hangs#"], StepStuckError)
        with pytest.raises(StepStuckError):
            await engine.generate("no use")
        rows.go.set()  # or the thread stays for ever, and closing takes a second


async def test_draining_an_engine_that_is_given_up_ends_though_its_thread_never_does(build, clock):
    rows = Rows(4)
    async with build(rows, step_timeout=30.0) as engine:
        async with anyio.create_task_group() as tasks:
            await held(rows, tasks, engine, "hangs#", max_tokens=4)
            clock.now += 30.0
            engine._running()[2].watch()
            clock.now += 30.0
            with pytest.raises(StepStuckError):
                engine._running()[2].watch()
            with anyio.fail_after(20):
                assert await engine.drain()
        rows.go.set()


async def test_draining_watches_a_step_that_nobody_else_waits_for(build):
    rows = Rows(4)
    async with build(rows, step_timeout=0.02) as engine:
        async with anyio.create_task_group() as tasks:
            await held(rows, tasks, engine, "hangs#", max_tokens=4)
            tasks.cancel_scope.cancel()
        with anyio.fail_after(20):
            assert await engine.drain()
        rows.go.set()


async def test_a_thread_that_dies_is_told_to_all(build):
    rows = Rows(4)
    rows.broken = SystemExit("out")
    async with build(rows) as engine:
        for _ in range(2):
            with pytest.raises(StepStuckError, match="thread died of SystemExit") as caught:
                await engine.generate("one")
        assert caught.value.__cause__ is rows.broken


async def test_waiting_callers_watch_the_step_that_they_wait_for(build):
    rows = Rows(4)
    async with build(rows, step_timeout=0.02) as engine:
        with pytest.raises(StepStuckError):
            await engine.generate("hangs@", max_tokens=4)
        assert (await engine.generate("ok", max_tokens=2)).text == "ok"


async def test_a_full_queue_refuses_and_the_refusal_is_heard_in_the_caller_s_context(build):
    rows, heard, whose = Rows(1), [], contextvars.ContextVar("whose", default="nobody")
    stop = listen_in_context(lambda event: heard.append((type(event), whose.get())))
    try:
        async with build(rows, max_queued=0) as engine, anyio.create_task_group() as tasks:
            await held(rows, tasks, engine, "runs", max_tokens=3)
            whose.set("mine")
            with pytest.raises(QueueFullError):
                await engine.generate("too many")
            rows.go.set()
    finally:
        stop()
    assert (CallRejected, "mine") in heard
    assert engine.snapshot().rejected == 1


async def test_who_is_pushed_out_of_the_queue_hears_it(build):
    rows = Rows(1)
    async with build(rows, max_queued=1) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "runs", max_tokens=3)
        with priority(Priority.LOW):
            tasks.start_soon(ask, engine, ends, "low", {"max_tokens": 3})
        await until(lambda: engine.snapshot().waiting == 1)
        tasks.start_soon(ask, engine, ends, "normal", {"max_tokens": 3})
        await until(lambda: "low" in ends)
        assert isinstance(ends.pop("low"), QueueFullError)
        rows.go.set()
    assert ends == {"runs": "run", "normal": "nor"}


async def test_who_waits_too_long_is_refused(build, clock):
    rows = Rows(1)
    async with build(rows, max_wait=10.0) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "runs", max_tokens=30)
        tasks.start_soon(ask, engine, ends, "waits", {})
        await until(lambda: engine.snapshot().waiting == 1)
        clock.now += 10.0
        rows.go.set()
    assert isinstance(ends["waits"], QueueTimeoutError)


async def test_a_deadline_around_the_call_that_has_passed_refuses_it(build, clock):
    rows = Rows(1)
    async with build(rows) as engine, Deadline("page", 5.0).scope():
        clock.now += 6.0
        with pytest.raises(DeadlineUnmeetableError):
            await engine.generate("late")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_priority_of_the_caller_decides_who_is_next(build):
    rows = Rows(1)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "runs", max_tokens=2)
        for prompt, level in (("low", Priority.LOW), ("high", Priority.HIGH)):
            with priority(level):
                tasks.start_soon(ask, engine, ends, prompt, {"max_tokens": 2})
            await until(lambda: engine.snapshot().waiting >= len(ends) + 1)
        await until(lambda: engine.snapshot().waiting == 2)
        rows.go.set()
    assert list(ends) == ["runs", "high", "low"]


async def test_samples_share_a_call_and_each_says_what_it_took(build):
    rows = Rows(2)
    async with build(rows) as engine:
        pieces = [piece async for piece in engine.stream("abc", n=3, max_tokens=4)]
        assert [sum(piece.index == index for piece in pieces) for index in range(3)] == [4, 4, 4]
        last = [piece for piece in pieces if piece.finish_reason]
        assert [(piece.usage.prompt_tokens, piece.usage.completion_tokens) for piece in last] == [(3, 4)] * 3
        assert [one.text for one in await engine.generate_many("abc", n=3, max_tokens=4)] == ["abca"] * 3


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [
        ("", {}, EmptyPromptError),
        ("x" * 64, {}, PromptTooLongError),
        ("x" * 60, {}, InvalidSettingError),  # the fake's `could_fit`
        ("hi", {"max_tokens": 0}, InvalidSettingError),
        ("hi", {"n": 0}, InvalidSettingError),
        ("hi", {"n": 100}, InvalidSettingError),
        ("hi", {"tenant": None}, InvalidSettingError),
        ("hi", {"tenant": "\udcff"}, None),
    ],
)
async def test_a_bad_request_is_refused_before_it_queues(build, prompt, settings, error):
    async with build(Rows(2)) as engine:
        with pytest.raises(error) if error else contextlib.nullcontext():
            await engine.generate(prompt, **{"max_tokens": 2, **settings})
        assert engine.snapshot().failed == 0


async def test_the_hook_changes_settings_and_may_refuse(build):
    rows = Rows(2)
    engine = build(rows, adjust=lambda settings: replace(settings, max_tokens=min(2, settings.max_tokens), n=1))
    async with engine:
        assert [one.text for one in await engine.generate_many("abcdef", n=2)] == ["ab"]

    def refuse(settings):
        raise QueueFullError("brown-out")

    async with build(rows, adjust=refuse) as engine:
        with pytest.raises(QueueFullError, match="brown-out"):
            await engine.generate("abc")
        assert rows.most == 1


async def test_draining_finishes_what_is_there_and_refuses_the_rest(build):
    rows = Rows(1)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        ends = await held(rows, tasks, engine, "runs", "waits", max_tokens=3)
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 2)
        assert not await engine.drain(0.01)
        with pytest.raises(EngineDrainingError):
            await engine.generate("late")
        rows.go.set()
        assert await engine.drain()
        assert not rows.active
    assert ends == {"runs": "run", "waits": "wai"}


@pytest.mark.parametrize(
    ("seconds", "error"), [(float("nan"), ValueError), (-1, ValueError), ("5", TypeError), (True, TypeError)]
)
async def test_a_drain_of_no_seconds_is_refused_and_has_not_begun(build, seconds, error):
    async with build(Rows(1)) as engine:
        with pytest.raises(error, match="timeout must be"):
            await engine.drain(seconds)
        assert (await engine.generate("ab", max_tokens=2)).text == "ab"
        assert await engine.drain(timedelta(seconds=20))


async def test_drains_that_were_cut_short_leave_nothing_behind(build):
    rows = Rows(1)
    async with build(rows) as engine, anyio.create_task_group() as tasks:
        await held(rows, tasks, engine, "runs", max_tokens=3)
        for _ in range(3):
            assert not await engine.drain(0)
        assert engine._running()[2]._idle._sleepers == []
        rows.go.set()


async def test_a_step_timeout_of_centuries_closes_too(build):
    rows = Rows(1)
    async with anyio.create_task_group() as tasks, build(rows, step_timeout=1e10) as engine:
        ends = await held(rows, tasks, engine, "runs", max_tokens=3)
    assert isinstance(ends["runs"], EngineClosedError)


async def test_a_row_that_can_not_be_let_go_harms_no_other(build, caplog):
    class Sticky(Rows):
        def leave(self, row):
            super().leave(row)
            raise LookupError("a bug in somebody's drafter, as it closes")

    async with build(Sticky(2)) as engine:
        async with contextlib.aclosing(engine.stream("left", max_tokens=100)) as pieces:
            await anext(pieces)
        assert (await engine.generate("next", max_tokens=4)).text == "next"
        assert engine.snapshot().running == 0
    assert "somebody's drafter" in caplog.text


async def test_one_that_can_not_be_looked_at_for_lack_of_memory_ends_alone(build):
    class Short(Rows):
        def fits(self, wanted):
            if "big" in "".join(map(chr, wanted.prompt)):
                raise MemoryError
            return super().fits(wanted)

    async with build(Short(2)) as engine:
        with pytest.raises(MemoryError):
            await engine.generate("big")
        assert (await engine.generate("ok", max_tokens=2)).text == "ok"


def test_a_piece_that_fills_its_row_up_while_one_is_taken_does_not_leave_it_paused():
    class Racing(Sample):
        def __setattr__(self, name, value):
            if name == "taken" and value == 1:  # now the scheduler's thread pushes, and looks
                self.call.push(self, "last")
                paused.append(self.full)
            super().__setattr__(name, value)

    paused, resumed = [], []
    call = Call(lambda: resumed.append(True), lambda call: None)
    sample = Racing(call, None, None)
    for _ in range(READ_AHEAD - 1):
        call.push(sample, "piece")
    call.take()
    assert paused == [True]
    assert resumed


@pytest.mark.parametrize("finalise", ["close", "snapshot"])
def test_a_finaliser_may_close_the_engine_or_look_at_it_at_any_moment(build, finalise):
    def live(every):
        engine = build(Rows(2))
        running = []

        def collected(phase, info):
            if phase == "stop" and not running:  # no finaliser interrupts itself
                running.append(True)
                getattr(engine, finalise)()
                running.clear()

        async def main():
            async with engine:
                await engine.generate("abc", max_tokens=3)

        kept = gc.get_threshold()
        gc.callbacks.append(collected)
        gc.set_threshold(every)
        try:
            with contextlib.suppress(EngineClosedError):
                asyncio.run(main())
        finally:
            gc.set_threshold(*kept)
            gc.callbacks.remove(collected)

    for every in [*range(1, 13)] * 5:
        life = threading.Thread(target=live, args=(every,), daemon=True)
        life.start()
        life.join(20)
        assert not life.is_alive(), "it waits for itself"


async def test_closing_ends_all_calls_wherever_they_are(build):
    rows = Rows(1)
    async with anyio.create_task_group() as tasks, build(rows) as engine:
        ends = await held(rows, tasks, engine, "runs", "waits", max_tokens=3)
        await until(lambda: engine.snapshot().waiting + engine.snapshot().running == 2)
    assert {type(error) for error in ends.values()} == {EngineClosedError}
    assert rows.closed


async def test_the_breaker_of_the_usual_policies_counts_a_broken_model_and_no_refusal(build):
    rows = Rows(1)
    async with build(rows, policies=None, max_queued=0) as engine:
        [breaker] = engine.policies
        assert isinstance(breaker, CircuitBreaker)
        async with anyio.create_task_group() as tasks:
            await held(rows, tasks, engine, "runs", max_tokens=3)
            for prompt, settings in (("full", {}), ("x", {"n": 100}), ("", {})):
                with pytest.raises((QueueFullError, InvalidSettingError, EmptyPromptError)):
                    await engine.generate(prompt, **settings)
            assert breaker.snapshot().failures == 0
            rows.go.set()
        with pytest.raises(RuntimeFailure):
            await engine.generate("bad!")
        assert breaker.snapshot().failures == 1


async def test_warming_up_answers_a_token_past_the_policies(build):
    rows, breaker = Rows(1), CircuitBreaker("model")
    async with build(rows, policies=[breaker]) as engine:
        await engine.warm_up()
    assert rows.steps == 1
    assert breaker.snapshot().successes == 0


def test_a_stream_whose_event_loop_is_gone_gives_its_row_back(build):
    rows = Rows(2)
    engine = build(rows)

    async def begin():
        await engine.open()
        pieces = engine.stream("gone", max_tokens=50)
        await anext(pieces)
        return pieces

    loop = asyncio.new_event_loop()
    pieces = loop.run_until_complete(begin())
    loop.close()
    assert len(rows.active) == 1
    del pieces
    gc.collect()
    anyio.run(until, lambda: not rows.active)
    engine.close()


def test_a_reader_whose_event_loop_is_gone_gives_its_row_back_though_somebody_holds_its_stream(build):
    rows = Rows(2)
    engine = build(rows)

    async def begin():
        await engine.open()
        pieces = engine.stream("gone", max_tokens=50)
        await anext(pieces)
        rows.hold()
        for _ in range(READ_AHEAD + 2):  # until it sleeps
            step = anext(pieces)
            with contextlib.suppress(StopIteration):  # one was there
                return pieces, step, step.send(None)
        raise AssertionError("it never slept")

    loop = asyncio.new_event_loop()
    held = loop.run_until_complete(begin())
    loop.close()
    assert len(rows.active) == 1
    rows.go.set()
    anyio.run(until, lambda: not rows.active)
    engine.close()
    del held


def test_a_cancellation_at_every_await_in_turn_leaves_no_row_and_no_place_in_the_queue(build):
    async def awaiting(awaitable):
        return await awaitable

    async def main():
        rows = Rows(1)
        async with build(rows) as engine:
            await engine.warm_up()
            reached, step = True, 0
            while reached:
                call = CancelAt(engine.generate_many("abc", n=2, max_tokens=3), step)
                task = asyncio.ensure_future(awaiting(call))
                await asyncio.wait([task])
                assert task.cancelled() or not call.reached
                await until(lambda: not engine._running()[2]._calls)
                snapshot = engine.snapshot()
                assert (snapshot.running, snapshot.waiting, len(rows.active)) == (0, 0, 0)
                reached, step = call.reached, step + 1
            return step

    assert asyncio.run(main()) > 2
