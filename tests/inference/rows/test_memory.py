"""Rows commit what they use, share what they begin with, and give everything back."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from seawall.inference.generate.rows import memory as module
from seawall.inference.generate.rows.memory import SHARES, Layout, Piece, RowMemory

LAYOUT = Layout(layers=2, heads=3, width=64)
PAGE = LAYOUT.page_tokens
SMALL = Layout(layers=1, heads=2, width=16, dtype=np.dtype(np.int8))


def write(rows, row, start, stop, seed):
    values = np.random.default_rng(seed).standard_normal((2, 2, 3, stop - start, 64)).astype(np.float32)
    rows.array[:, :, row, :, start:stop] = values
    rows.lengths[row] = stop
    return values


@pytest.fixture(params=["copy-on-write", "copied"])
def rows(request, monkeypatch):
    if request.param == "copied":
        monkeypatch.setattr(module, "SHARES", False)
    elif not SHARES:
        pytest.skip("copy-on-write needs Linux")
    return RowMemory(LAYOUT, 4, 10 * PAGE)


def test_a_page_holds_sixteen_vectors_of_sixty_four_floats():
    assert LAYOUT.page_tokens * LAYOUT.vector_bytes % 4096 == 0
    assert SMALL.page_tokens * SMALL.vector_bytes % 4096 == 0
    assert LAYOUT.token_bytes == 2 * 2 * 3 * 64 * 4


def test_a_context_is_rounded_up_to_whole_pages():
    assert RowMemory(LAYOUT, 1, PAGE + 1).positions == 2 * PAGE


def test_a_row_that_adopts_a_prompt_reads_it_and_writes_for_itself(rows):
    prompt = write(rows, 0, 0, 2 * PAGE, seed=1)
    segment = rows.share(0, 0, 2 * PAGE)
    for row in (1, 2):
        rows.adopt(row, (Piece(segment, 0, 2 * PAGE),))
        assert np.array_equal(rows.array[:, :, row, :, : 2 * PAGE], prompt)
    rows.array[:, :, 1, :, 5] = 7.0
    assert np.array_equal(rows.array[:, :, 2, :, : 2 * PAGE], prompt)
    assert np.array_equal(segment.array, prompt)
    assert np.array_equal(rows.array[:, :, 0, :, : 2 * PAGE], prompt)


def test_a_row_can_adopt_the_beginning_of_a_prompt_and_pieces_of_several(rows):
    first = write(rows, 0, 0, 3 * PAGE, seed=1)
    second = write(rows, 1, 0, 2 * PAGE, seed=2)
    pieces = (
        Piece(rows.share(0, 0, 3 * PAGE), 0, PAGE),
        Piece(rows.share(1, 0, 2 * PAGE), PAGE, 2 * PAGE),
    )
    rows.adopt(2, pieces)
    assert np.array_equal(rows.array[:, :, 2, :, :PAGE], first[:, :, :, :PAGE])
    assert np.array_equal(rows.array[:, :, 2, :, PAGE : 2 * PAGE], second[:, :, :, PAGE:])
    assert rows.lengths[2] == 2 * PAGE


def test_a_released_row_is_empty_and_its_neighbours_are_not_touched(rows):
    kept = write(rows, 1, 0, PAGE + 3, seed=2)
    write(rows, 0, 0, 2 * PAGE, seed=1)
    rows.adopt(2, (Piece(rows.share(0, 0, PAGE), 0, PAGE),))
    rows.release(0)
    rows.release(2)
    assert np.array_equal(rows.array[:, :, 1, :, : PAGE + 3], kept)
    assert rows.lengths == [0, PAGE + 3, 0, 0]
    if SHARES and module.SHARES:
        assert not rows.array[:, :, 0].any()
        assert not rows.array[:, :, 2].any()


def test_a_sequence_that_moves_goes_on_as_it_was(rows):
    prompt = write(rows, 0, 0, 2 * PAGE, seed=1)
    rows.adopt(3, (Piece(rows.share(0, 0, 2 * PAGE), 0, 2 * PAGE),))
    tail = write(rows, 3, 2 * PAGE, 2 * PAGE + 5, seed=3)
    rows.move(3, 1)
    assert np.array_equal(rows.array[:, :, 1, :, : 2 * PAGE], prompt)
    assert np.array_equal(rows.array[:, :, 1, :, 2 * PAGE : 2 * PAGE + 5], tail)
    assert rows.lengths == [2 * PAGE, 2 * PAGE + 5, 0, 0]


@pytest.mark.skipif(not SHARES, reason="copy-on-write needs Linux")
def test_rows_that_share_a_prompt_hold_it_once():
    rows = RowMemory(LAYOUT, 16, 10 * PAGE)
    write(rows, 0, 0, 4 * PAGE, seed=1)
    segment = rows.share(0, 0, 4 * PAGE)
    for row in range(16):
        rows.release(row)
        rows.adopt(row, (Piece(segment, 0, 4 * PAGE),))
    assert rows.used_bytes == rows.committed_bytes == 4 * PAGE * LAYOUT.token_bytes


def test_what_is_committed_is_at_most_a_page_more_than_what_is_used():
    rows = RowMemory(LAYOUT, 2, 10 * PAGE)
    write(rows, 0, 0, 3 * PAGE + 1, seed=1)
    assert rows.used_bytes == (3 * PAGE + 1) * LAYOUT.token_bytes
    assert rows.committed_bytes == 4 * PAGE * LAYOUT.token_bytes


@pytest.mark.skipif(not SHARES, reason="reads /proc")
def test_memory_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    layout = Layout(layers=16, heads=4, width=64)
    rows = RowMemory(layout, 2, 1024)
    before = resident()
    rows.array[:, :, 0] = 1.0
    rows.lengths[0] = rows.positions
    size = rows.positions * layout.token_bytes
    assert resident() - before > size * 0.9
    rows.release(0)
    assert resident() - before < size * 0.1


@pytest.mark.skipif(not SHARES, reason="copy-on-write needs Linux")
def test_a_mapping_that_the_system_refuses_is_an_error_with_its_number():
    rows = RowMemory(LAYOUT, 1, PAGE)
    segment = rows.share(0, 0, PAGE)
    with pytest.raises(OSError, match="Invalid argument"):
        rows.adopt(0, (Piece(segment, 1, PAGE),))  # no whole page


@pytest.mark.skipif(not SHARES, reason="reads /proc")
def test_any_number_of_segments_takes_one_descriptor_and_a_freed_one_no_memory():
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    rows = RowMemory(LAYOUT, 2, 10 * PAGE)
    before = descriptors()
    kept = []
    for number in range(1, 9):
        write(rows, 0, 0, number * PAGE, seed=number)
        kept.append(rows.share(0, 0, number * PAGE))
        rows.release(0)
    assert descriptors() == before
    file = rows._arena.descriptor
    assert os.fstat(file).st_blocks * 512 == sum(segment.bytes for segment in kept)
    place = kept[3].place
    del kept[3]
    assert os.fstat(file).st_blocks * 512 == sum(segment.bytes for segment in kept)
    write(rows, 1, 0, 4 * PAGE, seed=20)
    again = rows.share(1, 0, 4 * PAGE)
    assert again.place == place
    del kept, again
    rows.release(1)
    assert os.fstat(file).st_blocks == 0


@pytest.mark.skipif(not SHARES, reason="needs fork")
def test_a_fork_that_forgets_segments_takes_nothing_from_its_parent():
    rows = RowMemory(LAYOUT, 1, 4 * PAGE)
    prompt = write(rows, 0, 0, 2 * PAGE, seed=1)
    segment = rows.share(0, 0, 2 * PAGE)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=segment.__del__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads; the child uses none
        child.start()
    child.join()
    assert child.exitcode == 0
    assert np.array_equal(segment.array, prompt)
    assert np.array_equal(rows.array[:, :, 0, :, : 2 * PAGE], prompt)


class Rows(RuleBasedStateMachine):
    """Against a plain array for each row."""

    @initialize()
    def begin(self):
        self.page = SMALL.page_tokens
        self.rows = RowMemory(SMALL, 3, 3 * self.page)
        self.model = [np.empty((1, 2, 2, 0, 16), np.int8) for _ in range(3)]
        self.segments = []

    @rule(row=st.integers(0, 2), tokens=st.integers(1, 400), value=st.integers(-128, 127))
    def append(self, row, tokens, value):
        length = self.rows.lengths[row]
        stop = min(length + tokens, self.rows.positions)
        self.rows.array[:, :, row, :, length:stop] = value
        self.rows.lengths[row] = stop
        new = np.full((1, 2, 2, stop - length, 16), value, np.int8)
        self.model[row] = np.concatenate([self.model[row], new], axis=3)

    @rule(row=st.integers(0, 2))
    def publish(self, row):
        pages = self.rows.lengths[row] // self.page
        if pages:
            segment = self.rows.share(row, 0, pages * self.page)
            self.segments.append((segment, self.model[row][:, :, :, : pages * self.page].copy()))

    @rule(row=st.integers(0, 2), data=st.data())
    def adopt(self, row, data):
        if self.segments:
            segment, content = data.draw(st.sampled_from(self.segments))
            stop = data.draw(st.integers(1, segment.tokens // self.page)) * self.page
            self.rows.release(row)
            self.rows.adopt(row, (Piece(segment, 0, stop),))
            self.model[row] = content[:, :, :, :stop].copy()

    @rule(source=st.integers(0, 2), free=st.integers(0, 2))
    def move(self, source, free):
        if source != free:
            self.rows.release(free)
            self.rows.move(source, free)
            self.model[free], self.model[source] = self.model[source], self.model[source][:, :, :, :0]

    @rule(row=st.integers(0, 2))
    def release(self, row):
        self.rows.release(row)
        self.model[row] = self.model[row][:, :, :, :0]

    @invariant()
    def rows_hold_what_was_written(self):
        for row, content in enumerate(self.model):
            length = content.shape[3]
            assert self.rows.lengths[row] == length
            assert np.array_equal(self.rows.array[:, :, row, :, :length], content)
        assert self.rows.used_bytes <= self.rows.committed_bytes


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
