"""What goes wrong in a row ends that row alone; a run that fails costs nobody anything."""

import errno
import math

import numpy as np
import pytest

from seawall.inference import Sampling
from seawall.inference.errors import GenerationCancelledError, NotFiniteOutputError, RuntimeExhaustedError
from seawall.inference.generate.rows import ContinuousBatch, memory
from seawall.inference.runtime import ort
from tests.inference import tiny

from .conftest import REQUESTS, answers, ask, batch_page, content, drain, text


def poisoned(model, batch, monkeypatch, row):
    """The logits of one row become NaN."""
    run = batch._stepping._batch._run

    def bad(parts, options, *, every):
        found = run(parts, options, every=every)
        for part, logits in zip(parts, found, strict=True):
            if part.row == row.index:
                logits[..., 3] = math.nan
        return found

    monkeypatch.setattr(batch._stepping._batch, "_run", bad)


def test_a_row_whose_logits_are_not_numbers_ends_alone_and_nobody_begins_with_what_it_read(model, alone, monkeypatch):
    prompt = text(batch_page(model) + 20)
    with ContinuousBatch(model, rows=2) as batch:
        row, other = batch.join(ask(prompt)), batch.join(REQUESTS[4])
        poisoned(model, batch, monkeypatch, row)
        found = drain(batch, [row, other])
        assert isinstance(found[0][-1], NotFiniteOutputError)
        assert row.error is found[0][-1]
        assert content(found[1]) == content(alone(REQUESTS[4]))
        monkeypatch.undo()
        assert batch.join(ask(prompt)).cached_tokens == 0


@pytest.mark.skipif(not memory.SHARES, reason="nothing is mapped there")
def test_a_row_for_which_the_system_maps_nothing_has_not_joined(model, alone, monkeypatch):
    def refused(*where):
        raise OSError(errno.EPERM, "no")

    prompt = text(2 * batch_page(model))
    with ContinuousBatch(model, rows=2) as batch:
        answers(batch, [ask(prompt)])
        monkeypatch.setattr(memory, "_map_fixed", refused)
        with pytest.raises(OSError, match="no"):
            batch.join(ask(prompt))
        assert batch.rows_in_use == 0
        monkeypatch.undo()
        assert content(answers(batch, [ask(prompt)])[0]) == content(alone(ask(prompt)))


class Breaks:
    """A user's constraint that fails at the third token."""

    def __init__(self):
        self.told = 0

    def matcher(self, vocabulary):
        return self

    def allowed(self):
        if self.told == 2:
            raise ZeroDivisionError("a bug in somebody's grammar")
        return np.arange(len(tiny.TOKENS)) > 2  # no end token

    def consume(self, token):
        self.told += 1
        return True

    def rollback(self, tokens):
        self.told -= tokens

    def forced(self):
        return ()


def test_a_constraint_that_raises_ends_its_row_with_that_very_exception(model, alone):
    with ContinuousBatch(model, rows=2) as batch:
        asked = [ask(text(4, 3), 20, sampling=Sampling(seed=1), constraint=Breaks()), REQUESTS[4]]
        found = answers(batch, asked)
        assert isinstance(found[0][-1], ZeroDivisionError)
        assert len(found[0]) == 3
        assert content(found[1]) == content(alone(REQUESTS[4]))


class Failing:
    """Lets every so many runs of a batch fail, before or after ONNX Runtime has written into the caches."""

    def __init__(self, batch, monkeypatch, every):
        self.calls = 0
        run = batch._stepping._batch._run

        def sometimes(parts, options, **how):
            self.calls += 1
            found = run(parts, options, **how)
            if self.calls % every == 0:
                raise RuntimeExhaustedError("running the model", "out of memory")
            return found

        monkeypatch.setattr(batch._stepping._batch, "_run", sometimes)


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_fails_is_raised_and_the_next_step_does_it_again(model, alone, monkeypatch, every):
    with ContinuousBatch(model, rows=len(REQUESTS), prefill_chunk=64) as batch:
        rows = [batch.join(request) for request in REQUESTS]
        Failing(batch, monkeypatch, every)
        found = {row.number: [] for row in rows}
        failures = 0
        while batch.rows_in_use:
            try:
                done = batch.step()
            except RuntimeExhaustedError:
                failures += 1
                assert batch.last_run
                continue
            for advance in done:
                found[advance.row.number] += advance.steps
        for row in rows:
            assert content(found[row.number]) == content(alone(row.request))
        assert failures > 10


def test_a_row_that_is_shed_after_a_failure_takes_its_undelivered_steps_with_it(model, monkeypatch):
    with ContinuousBatch(model, rows=2, prefill_chunk=16) as batch:
        row = batch.join(ask(text(4, 3), 30, sampling=Sampling(seed=3)))
        batch.step()
        late = batch.join(ask(text(100)))
        Failing(batch, monkeypatch, 2)  # decoding succeeds, reading fails
        with pytest.raises(RuntimeExhaustedError):
            batch.step()
        assert batch.last_run == (late,)
        batch.leave(row)
        assert all(advance.row is not row for advance in batch.step())


def test_a_step_that_is_told_to_stop_changes_nothing(model, alone):
    with ContinuousBatch(model, rows=2) as batch:
        rows = [batch.join(request) for request in REQUESTS[:2]]
        found = {row.number: [] for row in rows}
        number = 0
        while batch.rows_in_use:
            options = ort.run_options()
            options.terminate = number % 2 == 0
            number += 1
            try:
                done = batch.step(options)
            except GenerationCancelledError:
                assert options.terminate
                continue
            assert not options.terminate
            for advance in done:
                found[advance.row.number] += advance.steps
        for row in rows:
            assert content(found[row.number]) == content(alone(row.request))
