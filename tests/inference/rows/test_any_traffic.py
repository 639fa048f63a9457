"""Requests of all kinds in any order: each is answered as if it were alone, and the books balance after every step."""

import gc
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from seawall.inference import Sampling, Speculation
from seawall.inference.errors import GenerationCancelledError, NoRoomError
from seawall.inference.generate.rows import ContinuousBatch
from seawall.inference.runtime import ort

from .conftest import ask, content, guessed, text


class Traffic(RuleBasedStateMachine):
    """Whatever requests come, go, pause, fail and begin alike: each answers as alone, and no byte too many is held."""

    model = alone = None  # set below, once for each kind of cache

    @initialize(rows=st.integers(1, 4), chunk=st.sampled_from([None, 4, 20, 100]), pages=st.integers(2, 12))
    def begin(self, rows, chunk, pages):
        token = self.model.cache_bytes_per_token
        page = 4096 // (token // (2 * 2 * 2))
        self.batch = ContinuousBatch(
            self.model,
            rows=rows,
            prefill_chunk=chunk,
            cache_bytes=pages * page * token,
            prefix_cache_bytes=3 * page * token,
        )
        self.found = {}

    @rule(
        drafts=st.sampled_from([False, False, Speculation(), {"length": 3}, {"length": 9, "wrong": 3}, {}]),
        seed=st.integers(0, 2),
        common=st.integers(0, 300),
        more=st.integers(1, 60),
        tokens=st.integers(1, 25),
        drawn=st.booleans(),
        salt=st.sampled_from([b"", b"one"]),
    )
    def join(self, drafts, seed, common, more, tokens, drawn, salt):
        prompt = [*text(300, 7)[:common], *text(more, seed)]
        sampling = {"sampling": Sampling(seed=seed)} if drawn else {}
        request = ask(prompt, tokens, salt=salt, logprobs=1, **sampling)
        if isinstance(drafts, dict):
            request = guessed(type(self).alone, request, **drafts)
        else:
            request = replace(request, speculation=drafts)
        if self.batch.fits(request):
            self.found[self.batch.join(request)] = []
        else:
            with pytest.raises(NoRoomError):
                self.batch.join(request)

    @rule(options=st.sampled_from(["go", "go", "go", "stop"]))
    def step(self, options):
        given = ort.run_options()
        given.terminate = options == "stop"
        try:
            done = self.batch.step(given)
        except GenerationCancelledError:
            return
        self.take(done)

    def take(self, done):
        for row, steps, error in done:
            assert error is None
            self.found[row] += steps
            if row.finished:
                assert content(self.found.pop(row)) == content(type(self).alone(replace(row.request, salt=b"")))

    @rule(which=st.integers(0, 3))  # nothing drawn may depend on who is left: drafts and parts follow the clock
    def leave(self, which):
        for row in list(self.found)[which : which + 1]:
            self.batch.leave(row)
            del self.found[row]

    @rule(which=st.integers(0, 3))
    def pause(self, which):
        for row in list(self.found)[which : which + 1]:
            row.paused = not row.paused

    @invariant()
    def books_balance(self):
        if not hasattr(self, "batch"):
            return
        batch = self.batch
        assert batch.rows_in_use == len(self.found)
        assert batch.used_bytes <= batch.committed_bytes <= batch.promised_bytes <= batch.cache_bytes
        assert batch.cached_bytes == batch.prefix.bytes <= batch.cache_bytes

    def teardown(self):
        if not hasattr(self, "batch"):
            return
        for row in self.found:
            row.paused = False
        while self.batch.rows_in_use:
            self.take(self.batch.step())
        assert self.batch.used_bytes == self.batch.committed_bytes == 0
        assert self.batch.promised_bytes == self.batch.cached_bytes
        self.batch.close()


def test_any_traffic(model, alone):
    Traffic.model, Traffic.alone = model, staticmethod(alone)
    try:
        run_state_machine_as_test(
            Traffic,
            settings=settings(
                max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        Traffic.model = Traffic.alone = None
    gc.collect()
