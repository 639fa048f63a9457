"""What callers hand in by mistake: refused at once, with the cure, and not held against the model."""

from __future__ import annotations

import enum
import os
import subprocess
import sys

import pytest

from seawall import Engine
from seawall.engine import AnswerSettings
from seawall.inference import Regex
from seawall.inference.errors import InvalidPromptError, InvalidSettingError, PromptTooLongError

from .fake_rows import Decoder, Rows

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"stop": "END"}, r"such as \['END'\], got 'END'"),
        ({"stop": 5}, "stop must be a list of strings"),
        ({"constraint": "yes|no"}, "such as Regex.*, got 'yes|no'"),
        ({"constraint": Regex}, "constraint must be"),
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"top_p": 5}, "top_p must be .*, got 5"),
        ({"seed": 1.5}, "seed must be .*, got 1.5"),
        ({"seed": "a"}, "seed must be .*, got 'a'"),
        ({"top_k": -1, "temperature": 1.0}, "top_k must be .*, got -1"),
    ],
)
def test_a_wrong_setting_is_refused_when_it_is_given_greedy_or_not(setting, says):
    with pytest.raises(InvalidSettingError, match=says):
        AnswerSettings(**setting)


def test_a_tenant_is_the_same_whatever_kind_of_string_it_comes_as():
    class Tenant(enum.StrEnum):  # whose hashes are not those of the strings
        ACME = "acme"

    assert type(AnswerSettings(tenant=Tenant.ACME).tenant) is str
    assert AnswerSettings(tenant=Tenant.ACME).tenant == "acme"


def test_each_sample_draws_with_a_seed_of_its_own():
    settings = AnswerSettings(temperature=0.5, seed=0)
    assert [0, 1, 2] == [settings.sampling(index).seed for index in range(3)]
    assert AnswerSettings(temperature=0.5).sampling(1).seed is None


@pytest.mark.parametrize("prompt", [None, 3, b"bytes", bytearray(b"bytes"), {"role": "user"}, iter([1])])
@pytest.mark.parametrize("chat", [True, False])
async def test_what_is_no_prompt_is_refused_and_not_held_against_the_model(prompt, chat):
    async with Engine(lambda: Decoder(Rows(1)), name="asking") as engine:
        with pytest.raises(InvalidPromptError, match="a prompt must be a text or chat messages"):
            await engine.generate(prompt, chat=chat)
        assert engine.policies[0].snapshot().failures == 0


async def test_far_too_many_tokens_are_refused_by_their_number_alone():
    async with Engine(lambda: Decoder(Rows(1)), name="asking") as engine:
        with pytest.raises(PromptTooLongError, match="has 1000000000000 tokens"):
            await engine.generate(range(10**12), chat=False)


async def test_a_setting_that_does_not_exist_is_a_type_error_at_the_call():
    with pytest.raises(TypeError, match="temprature"):
        Engine(lambda: Decoder(Rows(1))).stream("why", temprature=0.5)


async def nothing(*settings):
    """Is no plain function."""


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"load": 3}, "load must be a plain function, got 3"),
        ({"load": nothing}, "load must be a plain function"),
        ({"adjust": 3}, "adjust must be a plain function of AnswerSettings"),
        ({"adjust": nothing}, "its answer would never be awaited"),
    ],
)
def test_what_is_no_function_is_refused_when_the_engine_is_made(setting, says):
    with pytest.raises(TypeError, match=says):
        Engine(**{"load": lambda: Decoder(Rows(1)), **setting})


@pytest.mark.parametrize("given", [None, 5, "smollm2-135m"])
async def test_a_load_that_gives_no_decoder_hears_so_as_the_engine_is_opened(given):
    engine = Engine(lambda: given, name="asking")
    for _ in range(2):
        with pytest.raises(TypeError, match=f"what load returns must be a model, which has close.., got {given!r}"):
            await engine.open()
    engine.close()


async def test_a_hook_that_forgets_to_return_the_settings_hears_so():
    async with Engine(lambda: Decoder(Rows(1)), name="asking", adjust=lambda settings: None) as engine:
        with pytest.raises(TypeError, match="adjust must return AnswerSettings, got None"):
            await engine.generate("why")


FORK = """
import asyncio, os, sys
from seawall import Engine
from seawall.inference.errors import ForkedBackendError
from tests.engine.fake_rows import Decoder, Rows
from seawall.engine import opening
opening.stepper_for = lambda decoder, *sizes: decoder.stepper
engine = Engine(lambda: Decoder(Rows(1)), name="forked")

async def used():
    await engine.open()
    return (await engine.generate("ab", max_tokens=2)).text

asyncio.run(used())
child = os.fork()
if child == 0:
    try:
        asyncio.run(asyncio.wait_for(engine.generate("ab", max_tokens=2), 10))
    except ForkedBackendError as error:
        print("refused", flush=True)
    engine.close()
    print(asyncio.run(used()), flush=True)  # opened again, it has threads of its own
    engine.close()
    sys.exit(0)
print(os.waitpid(child, 0)[1], asyncio.run(used()), flush=True)
engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_at_once_and_may_open_the_engine_anew():
    """Its threads stayed in the parent, so nobody would ever read the child's prompt."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ["refused", "ab", "0 ab"] == done.stdout.splitlines(), done.stderr
    assert "" == done.stderr


@pytest.mark.parametrize(("name", "error"), [("", ValueError), ("a\nb", ValueError), (3, TypeError)])
def test_a_name_that_labels_nothing_is_refused_whatever_the_policies(name, error):
    for policies in (None, ()):
        with pytest.raises(error, match="a model's name must be"):
            Engine(lambda: None, name=name, policies=policies)
