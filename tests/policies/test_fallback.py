from __future__ import annotations

import asyncio
import functools
import gc
import sys
from contextlib import aclosing, suppress

import pytest

from seawall import CircuitBreaker, CircuitOpenError, Pipeline
from seawall.policies.fallback import NOTHING, Fallback, FallbackFailed, FallbackSnapshot, FallbackUsed
from seawall.testing import AsyncScript, Script, after, run


def outcome(policy, *outcomes):
    script = AsyncScript(*outcomes)

    async def main():
        try:
            return await policy(script)()
        except Exception as exc:
            return exc

    return run(main())


def outcome_sync(policy, *outcomes):
    try:
        return policy(Script(*outcomes))()
    except Exception as exc:
        return exc


both = pytest.mark.parametrize("end", [outcome, outcome_sync])


def broken(replaced):
    raise KeyError("step")


async def later(replaced):
    await asyncio.sleep(1)
    return f"later, for {replaced}"


def hidden(replaced):
    return later(replaced)


def told(replaced):
    return f"told of {replaced}"


@both
def test_a_call_that_goes_well_is_left_alone(end):
    policy = Fallback("f", value="other")
    assert end(policy, "well") == "well"
    assert end(policy, None) is None
    assert policy.snapshot() == FallbackSnapshot(succeeded=2, replaced=0, failed=0, used=(0,))


@both
def test_a_value_answers_for_a_call_that_failed(end):
    for value in ("other", None, [], NotImplemented, dict):
        assert end(Fallback("f", value=value), ConnectionError()) is value


@both
def test_a_callable_value_is_a_value_and_is_not_called(end):
    assert end(Fallback("f", value=broken), ConnectionError()) is broken


@both
def test_a_step_is_given_what_it_replaces(end):
    assert end(Fallback("f", told), ConnectionError("down")) == "told of down"
    assert end(Fallback("f", told, on_result=lambda result: result < 0), -1) == "told of -1"


@both
def test_steps_are_tried_in_order_and_the_value_is_the_last(end):
    assert end(Fallback("f", (broken, told, broken), value=0), OSError(1)) == "told of 1"
    assert end(Fallback("f", (broken, broken), value=0), OSError(1)) == 0


def test_steps_may_be_async():
    assert outcome(Fallback("f", (broken, later)), OSError(1)) == "later, for 1"
    assert outcome(Fallback("f", hidden), OSError(1)) == "later, for 1"


@both
def test_only_what_it_is_meant_for_is_replaced(end):
    error = ValueError()
    assert end(Fallback("f", told, on=OSError), error) is error
    assert end(Fallback("f", told, on=lambda error: error.args), error) is error
    assert end(Fallback("f", told, on=lambda error: error.args), OSError(1)) == "told of 1"
    assert end(Fallback("f", told, on_result=lambda result: False), 5) == 5


@both
def test_if_every_step_fails_the_call_keeps_its_own_error_with_a_note(end):
    error = OSError("mine")
    policy = Fallback("f", (broken, broken))
    for _ in range(2):
        assert end(policy, error) is error
    assert (error.__context__, error.__cause__) == (None, None)
    (note,) = error.__notes__
    assert note.startswith("fallback 'f': ")
    assert note.endswith("broken failed too: KeyError: 'step'")
    assert policy.counters() == {"succeeded": 0, "replaced": 0, "failed": 2}


def test_a_note_says_why_a_step_failed_even_if_its_own_error_has_notes():
    def noted(replaced):
        error = KeyError("step")
        error.add_note("a hint")
        raise error

    error = OSError("mine")
    assert outcome_sync(Fallback("f", noted), error) is error
    assert error.__notes__[0].endswith("noted failed too: KeyError: 'step'")


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


def test_a_step_whose_error_can_not_be_shown_has_failed_like_any_other():
    def mute(replaced):
        raise Mute

    error = OSError("mine")
    assert outcome_sync(Fallback("f", mute), error) is error
    assert "Mute: <exception str() failed>" in error.__notes__[0]


@both
def test_if_every_step_fails_a_call_keeps_its_own_result(end):
    assert end(Fallback("f", broken, on_result=lambda result: True), "poor") == "poor"


@both
def test_a_step_knows_which_error_is_being_handled(end):
    seen = []
    error = OSError("down")
    end(Fallback("f", lambda replaced: seen.append(sys.exc_info()[1])), error)
    assert seen == [error]


@both
def test_which_step_answered_and_which_failed_is_told(end):
    heard = []
    error = OSError("down")
    end(Fallback("f", (broken, told), listeners=[heard.append]), error)
    end(Fallback("g", value=1, on_result=lambda result: True, listeners=[heard.append]), "poor")
    failed, used, value = heard
    assert isinstance(failed, FallbackFailed)
    assert (failed.policy, failed.index, failed.step, repr(failed.error)) == (
        "f",
        0,
        f"{__name__}.broken",
        "KeyError('step')",
    )
    assert isinstance(used, FallbackUsed)
    assert (used.index, used.step, used.error) == (1, f"{__name__}.told", error)
    assert (value.policy, value.index, value.step, value.error) == ("g", 0, "value", None)


def test_what_happened_is_counted():
    policy = Fallback("f", (functools.partial(lambda replaced: {1: "one"}[replaced.args[0]]),), value="other")
    outcome(policy, "well")
    outcome(policy, OSError(1))
    outcome(policy, OSError(2))
    outcome_sync(policy, OSError(1))
    assert policy.snapshot() == FallbackSnapshot(succeeded=1, replaced=3, failed=0, used=(2, 1))
    assert policy.counters() == {"succeeded": 1, "replaced": 3, "failed": 0}
    assert policy.gauges() == {}


@both
def test_a_refusal_by_a_policy_further_in_is_replaced(end):
    breaker = CircuitBreaker("b", consecutive_failures=1)
    breaker.force_open() if hasattr(breaker, "force_open") else breaker.admit().failure(OSError())
    seen = []
    policy = Pipeline(Fallback("f", lambda error: seen.append(type(error)) or "other"), breaker)
    assert end(policy) == "other"
    assert seen == [CircuitOpenError]


def test_a_cancellation_is_never_replaced():
    async def main():
        for steps, cancel_at in ((told, 0.5), (later, 1.5)):
            task = asyncio.create_task(Fallback("f", steps)(AsyncScript(after(1, OSError())))())
            asyncio.get_running_loop().call_later(cancel_at, task.cancel)
            await asyncio.wait([task])
            assert task.cancelled()

    run(main())
    with pytest.raises(KeyboardInterrupt):
        outcome_sync(Fallback("f", told), KeyboardInterrupt())
    with pytest.raises(TypeError, match="nothing replaces it"):
        Fallback("f", told, on=BaseException)


@both
def test_a_predicate_that_fails_harms_no_call(end, caplog):
    error = OSError()
    assert end(Fallback("f", told, on=lambda error: 1 / 0), error) is error
    assert end(Fallback("f", told, on_result=lambda result: 1 / 0), "well") == "well"
    assert "division by zero" in caplog.text


def test_a_plain_function_refuses_an_async_step_when_it_is_decorated():
    with pytest.raises(TypeError, match=r"later is async, and .*plain, a plain function, can't await it"):

        @Fallback("f", later)
        def plain(): ...

    with pytest.raises(TypeError, match="needs an event loop"):
        Pipeline(Fallback("f", later))(Script("well"))


def test_a_step_of_a_plain_function_that_returns_a_coroutine_has_failed():
    error = OSError("mine")
    assert outcome_sync(Fallback("f", hidden), error) is error
    assert "can't await" in error.__notes__[0]
    assert outcome_sync(Fallback("f", hidden, value=1), error) == 1


def nothing():
    return 1


def generator(replaced):
    yield 1


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), {}, "nothing to fall back to"),
        ((nothing,), {}, "must take one argument"),
        ((lambda one, other: 1,), {}, "must take one argument"),
        (("other",), {}, "a constant goes in value="),
        (([told],), {}, "a constant goes in value="),
        ((dict,), {}, "must be a function"),
        ((generator,), {}, "is a generator"),
        ((told,), {"on": 5}, "on must be"),
        ((told,), {"on": (OSError, 5)}, "on must be"),
        ((told,), {"on": later}, "on must be a plain function"),
        ((told,), {"on_result": 5}, "on_result must be a plain function, got"),
        ((told,), {"on_result": later}, "on_result must be a plain function"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(arguments, settings, message):
    with pytest.raises(TypeError, match=message):
        Fallback("f", *arguments, **settings)


def test_methods_partials_and_objects_may_be_steps():
    class Cache:
        def __call__(self, replaced):
            return "object"

        def get(self, replaced):
            return "method"

    for step, answer in (
        (Cache(), "object"),
        (Cache().get, "method"),
        (functools.partial(lambda prefix, replaced: prefix, "partial"), "partial"),
        (str, None),
        (repr, "OSError(1)"),
    ):
        if answer is not None:
            assert outcome(Fallback("f", step), OSError(1)) == answer


def test_it_decorates_methods_of_every_kind():
    class Client:
        @Fallback("f", told)
        def method(self):
            raise OSError(1)

        @Fallback("f", told)
        @staticmethod
        def static():
            raise OSError(2)

        @Fallback("f", told)
        @classmethod
        def of_class(cls):
            raise OSError(3)

    assert [Client().method(), Client.static(), Client.of_class()] == ["told of 1", "told of 2", "told of 3"]


def test_settings_change_while_it_is_used():
    policy = Fallback("f", told)
    guarded = policy(Script(then=OSError(1)))
    assert guarded() == "told of 1"
    policy.update(steps=(), value="other")
    assert guarded() == "other"
    assert (policy.steps, policy.value) == ((), "other")
    policy.update(value=NOTHING, steps=told, on=ValueError)
    with pytest.raises(OSError, match="1"):
        guarded()
    with pytest.raises(TypeError, match="nothing to fall back to"):
        policy.update(steps=())
    assert policy.counters() == {"succeeded": 0, "replaced": 2, "failed": 1}


def test_how_often_each_step_answered_outlives_an_update():
    policy = Fallback("f", (broken, told), value="other")
    guarded = policy(Script(then=OSError(1)))
    guarded()
    policy.update(on=OSError)
    guarded()
    assert policy.snapshot().used == (0, 2, 0)
    policy.update(steps=(broken, nothing_told))
    assert policy.snapshot().used == (0, 0, 0)


def nothing_told(replaced):
    raise KeyError


# streams


def streaming(*opens, items=(1, 2)):
    log, script = [], AsyncScript(*opens)

    async def stream():
        try:
            await script()
            for item in items:
                log.append((yield item))
                if item == "late failure":
                    raise OSError(item)
        finally:
            log.append("closed")

    return stream, log


async def other(replaced):
    yield f"instead of {replaced}"
    yield "more"


async def never(replaced):
    raise KeyError
    yield


async def empty(replaced):
    for item in ():
        yield item


async def collect(stream):
    return [item async for item in stream]


def test_a_stream_that_fails_before_its_first_item_is_replaced_by_another():
    heard = []
    stream, log = streaming(OSError("down"))
    policy = Fallback("f", (never, other), listeners=[heard.append])
    assert run(collect(policy(stream)())) == ["instead of down", "more"]
    assert log == ["closed"]
    assert [type(event) for event in heard] == [FallbackFailed, FallbackUsed]
    assert policy.counters() == {"succeeded": 0, "replaced": 1, "failed": 0}


@pytest.mark.parametrize(
    ("steps", "value", "items"), [(told, NOTHING, ["told of 1"]), (later, NOTHING, ["later, for 1"]), ((), 5, [5])]
)
def test_other_steps_and_the_value_give_one_item(steps, value, items):
    stream, _ = streaming(OSError(1))
    assert run(collect(Fallback("f", steps, value=value)(stream)())) == items


def test_an_empty_stream_is_an_answer():
    stream, _ = streaming("well", items=())
    assert run(collect(Fallback("f", other)(stream)())) == []
    stream, _ = streaming(OSError(1))
    assert run(collect(Fallback("f", (empty, other))(stream)())) == []


def test_a_stream_that_has_begun_is_on_its_own():
    stream, _ = streaming("well", items=(1, "late failure"))
    policy = Fallback("f", other)
    with pytest.raises(OSError, match="late failure"):
        run(collect(policy(stream)()))


def test_a_stream_keeps_its_own_error_if_every_step_fails_or_none_is_meant_for_it():
    error = OSError("mine")
    for policy in (Fallback("f", never), Fallback("f", other, on=KeyError)):
        with pytest.raises(OSError, match="mine") as caught:
            run(collect(policy(streaming(error)[0])()))
        assert caught.value is error
        assert policy.counters()["failed"] == 1


def test_what_is_sent_and_thrown_reaches_the_stream_and_it_is_closed_at_once():
    stream, log = streaming("well")

    async def main():
        async with aclosing(Fallback("f", other)(stream)()) as items:
            assert await items.__anext__() == 1
            assert await items.asend("sent") == 2
        assert log == ["sent", "closed"]
        again = Fallback("f", other)(streaming("well")[0])()
        await again.__anext__()
        with pytest.raises(KeyError):
            await again.athrow(KeyError())

    run(main())


def test_an_async_generator_can_answer_only_for_another():
    with pytest.raises(TypeError, match="async generator, which can't answer for"):
        Fallback("f", other)(AsyncScript("well"))
    error = OSError("mine")
    assert run(swallowed(Pipeline(Fallback("f", other))(AsyncScript(error)))) is error
    assert "async generator" in error.__notes__[0]


async def swallowed(call):
    try:
        return await call()
    except Exception as exc:
        return exc


@pytest.mark.parametrize("ending", ["well", "replaced", "failed", "refused result"])
def test_b38_a_call_leaves_no_reference_cycle(ending):
    def step(replaced):
        if ending == "failed":
            raise KeyError
        return 1

    policy = Fallback("f", step, on_result=lambda result: ending == "refused result")
    made = {"well": "well", "refused result": "poor"}.get(ending, OSError)

    def plain():
        for _ in range(20):
            with suppress(OSError):
                policy(Script(made))()

    async def main():
        gc.collect()
        for _ in range(20):
            with suppress(OSError):
                await policy(AsyncScript(made))()
        return gc.collect()

    gc.disable()
    try:
        gc.collect()
        plain()
        assert gc.collect() == 0
        assert run(main()) == 0
    finally:
        gc.enable()


def test_it_works_on_trio():
    import trio

    async def step(replaced):
        await trio.lowlevel.checkpoint()
        return f"told of {replaced}"

    assert trio.run(Fallback("f", step)(AsyncScript(OSError(1)))) == "told of 1"


def test_a_result_that_was_looked_at_and_is_fine_counts_once():
    policy = Fallback("f", value="instead", on_result=lambda result: result is None)
    assert [outcome(policy, 1), outcome(policy, 2), outcome(policy, None)] == [1, 2, "instead"]
    assert [outcome_sync(policy, 1), outcome_sync(policy, 2), outcome_sync(policy, None)] == [1, 2, "instead"]
    assert policy.counters() == {"succeeded": 4, "replaced": 2, "failed": 0}
