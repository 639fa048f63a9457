"""The engine with the real model: what an application sees."""

from __future__ import annotations

import asyncio
import gc
import threading

import anyio
import pytest

from seawall import Bulkhead, BulkheadFullError, CallTimeoutError, CircuitBreaker, CircuitOpenError, Engine, Timeout
from seawall.engine import EngineClosedError
from seawall.inference.errors import (
    EmptyPromptError,
    InvalidSettingError,
    ModelError,
    PromptTooLongError,
    RuntimeFailure,
    UnknownModelError,
    UnknownPrecisionError,
)

pytestmark = [pytest.mark.anyio, pytest.mark.model]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class Held:
    """The real decoder, kept open between engines, whose steps can be held up or broken."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.error = None
        self.stepping = threading.Event()
        self.released = threading.Event()
        self.holding = False

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def close(self):
        """Left open for the next test."""

    def start(self, *args, **kwargs):
        if self.error:
            raise self.error
        sequence = self._decoder.start(*args, **kwargs)
        return HeldSequence(self, sequence) if self.holding else sequence


class HeldSequence:
    speculation = None

    def __init__(self, held, sequence):
        self.held, self.sequence = held, sequence
        self.prompt_tokens, self.tokens = sequence.prompt_tokens, sequence.tokens
        self.close = sequence.close

    def step(self):
        self.held.stepping.set()
        assert self.held.released.wait(30)
        return self.sequence.step()

    def cancel(self):
        self.held.released.set()
        self.sequence.cancel()


@pytest.fixture
def held(decoder):
    held = Held(decoder)
    yield held
    gc.collect()
    assert decoder.active_sequences == 0


async def test_a_stream_and_a_whole_answer_are_the_same_and_repeatable(held):
    async with Engine(lambda: held) as engine:
        whole = await engine.generate("What is the capital of France?", max_tokens=24)
        pieces = [piece async for piece in engine.stream("What is the capital of France?", max_tokens=24)]
    assert "Paris" in whole.text
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token for piece in pieces] == list(whole.tokens)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason
    assert whole.time_to_first_token > 0
    assert whole.tokens_per_second > 0


async def test_concurrent_answers_take_turns_and_equal_those_given_alone(held):
    prompts = ["Say hello.", "Name a colour.", "Count to five."]
    answers = {}

    async def ask(engine, prompt):
        answers[prompt] = (await engine.generate(prompt, max_tokens=12)).text

    async with Engine(lambda: held) as engine:
        alone = [(await engine.generate(prompt, max_tokens=12)).text for prompt in prompts]
        async with anyio.create_task_group() as tasks:
            for prompt in prompts:
                tasks.start_soon(ask, engine, prompt)
    assert [answers[prompt] for prompt in prompts] == alone


async def test_a_cancelled_consumer_stops_the_step_and_gives_everything_back(held):
    held.holding = True
    bulkhead = Bulkhead("answers", max_concurrent=1)
    async with Engine(lambda: held, policies=[bulkhead]) as engine:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.generate, "Say hello.")
            await anyio.to_thread.run_sync(held.stepping.wait)
            assert bulkhead.snapshot().active == 1
            tasks.cancel_scope.cancel()
        assert bulkhead.snapshot().active == 0
        held.holding = False
        assert (await engine.generate("Say hello.", max_tokens=4)).text


async def test_a_piece_that_takes_too_long_is_a_timeout_and_a_failure_of_the_breaker(held):
    held.holding = True
    breaker = CircuitBreaker("model", consecutive_failures=1)
    async with Engine(lambda: held, policies=[breaker, Timeout("piece", 0.05)]) as engine:
        with pytest.raises(CallTimeoutError):
            await engine.generate("Say hello.")
        with pytest.raises(CircuitOpenError):
            await engine.generate("Say hello.")


async def test_a_failing_model_raises_its_own_error_and_opens_the_breaker(held):
    held.error = RuntimeFailure("decoding", "broken")
    async with Engine(lambda: held, policies=[CircuitBreaker("model", consecutive_failures=1)]) as engine:
        with pytest.raises(RuntimeFailure):
            await engine.generate("Say hello.")
        with pytest.raises(CircuitOpenError):
            await engine.generate("Say hello.")


async def test_a_full_bulkhead_refuses_at_once(held):
    held.holding = True
    full = Engine(lambda: held, policies=[Bulkhead("answers", max_concurrent=1)])
    async with full as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(engine.generate, "Say hello.")
        await anyio.to_thread.run_sync(held.stepping.wait)
        with pytest.raises(BulkheadFullError):
            await engine.generate("Say hello.")
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("prompt", "settings", "error"),
    [
        ("", {}, EmptyPromptError),
        ("word " * 5000, {}, PromptTooLongError),
        ("hello", {"max_tokens": 0}, InvalidSettingError),
        ("hello", {"temperature": -1.0}, InvalidSettingError),
        ("hello", {"temperature": 1.0, "top_p": 0.0}, InvalidSettingError),
    ],
)
async def test_a_bad_request_says_so_and_is_not_held_against_the_model(held, prompt, settings, error):
    async with Engine(lambda: held) as engine:
        with pytest.raises(error):
            await engine.generate(prompt, **settings)
        breaker = next(policy for policy in engine.policies if isinstance(policy, CircuitBreaker))
        assert breaker.snapshot().failures == 0


async def test_an_engine_that_is_not_open_says_so(held):
    engine = Engine(lambda: held)
    with pytest.raises(EngineClosedError, match="async with"):
        await engine.generate("Say hello.")
    async with engine:
        pass
    with pytest.raises(EngineClosedError):
        await engine.generate("Say hello.")


@pytest.mark.parametrize(
    ("model", "precision", "error"),
    [("smollm9", "int8", UnknownModelError), ("smollm2-135m", "int7", UnknownPrecisionError)],
)
async def test_what_can_not_be_loaded_is_an_error_at_opening_that_leaves_no_thread(model, precision, error):
    before = threading.active_count()
    with pytest.raises(error) as caught:
        await Engine.load(model, precision=precision).open()
    assert isinstance(caught.value, ModelError)
    assert threading.active_count() == before


async def test_closing_leaves_no_worker_thread(held):
    async with Engine(lambda: held, name="leak-check"):
        assert any(thread.name == "seawall-leak-check" for thread in threading.enumerate())
    assert not any(thread.name == "seawall-leak-check" for thread in threading.enumerate())


def test_the_event_loop_runs_while_a_step_does(held):
    held.holding = True

    async def main():
        async with Engine(lambda: held, policies=()) as engine:
            answer = asyncio.ensure_future(engine.generate("Say hello.", max_tokens=2))
            await asyncio.to_thread(held.stepping.wait)
            turns = 0
            for _ in range(100):  # the step is held up all the while
                await asyncio.sleep(0)
                turns += 1
            held.released.set()
            await answer
            return turns

    assert asyncio.run(main()) == 100
