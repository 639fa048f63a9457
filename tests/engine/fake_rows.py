"""A model that writes what its prompt says, letter by letter, and fails where it says so."""

from __future__ import annotations

import threading

from seawall.engine.stepping import Advance, Memory
from seawall.inference.errors import (
    GenerationCancelledError,
    NoRoomError,
    NotFiniteOutputError,
    RuntimeExhaustedError,
    RuntimeFailure,
)
from seawall.inference.generate.sequence import Step


class Row:
    drafted_tokens = accepted_tokens = cached_tokens = 0

    def __init__(self, wanted):
        self.wanted = wanted
        self.text = "".join(map(chr, wanted.prompt))
        self.most = wanted.settings.max_tokens
        self.written = 0
        self.unread = 3
        self.paused = False


class Rows:
    """Every step gives each row that is not paused one letter of its prompt, over and over up to `max_tokens`.

    A prompt with "!" breaks every run that it is in, "?" gets NaN, "@" hangs the run until that is stopped, "#" hangs
    for ever, "$" can't join at first, "%" takes two more rows' memory,
    "~" takes three steps to be read. `hold` stops all steps until `go`.
    """

    def __init__(self, rows=8, memory=100):
        self.rows, self.memory_rows = rows, memory
        self.active, self.most, self.steps, self.runs = [], 0, 0, []
        self.go, self.stepping, self.interrupted = threading.Event(), threading.Event(), threading.Event()
        self.broken = None  # raised by the thread itself
        self.closed = False
        self.interrupts = 0
        self.refusals = 1
        self.stop_after = None  # steps, and then all are held
        self.go.set()

    def hold(self):
        self.go.clear()
        self.stepping.clear()

    def could_fit(self, wanted):
        return len(wanted.prompt) < 60

    def fits(self, wanted):
        return len(self.active) < self.rows

    def join(self, wanted):
        row = Row(wanted)
        if "$" in row.text and self.refusals:
            self.refusals -= 1
            raise NoRoomError(1, 0, 1)
        self.active.append(row)
        self.most = max(self.most, len(self.active))
        return row

    def step(self):
        if self.broken:
            raise self.broken
        rows = [row for row in self.active if not row.paused]
        self.runs.append([row.text for row in rows])  # before the rest: who sees both sees one run
        self.interrupted.clear()
        self.stepping.set()
        assert self.go.wait(30)
        if any("@" in row.text for row in rows):
            assert self.interrupted.wait(30)
            raise GenerationCancelledError("told to stop")
        if self.interrupted.is_set():
            raise GenerationCancelledError("told to stop")
        if any("!" in row.text for row in rows):
            raise RuntimeFailure("running", "!")
        if len(rows) + sum(2 * ("%" in row.text) for row in rows) > self.memory_rows:
            raise RuntimeExhaustedError("running", "no memory")
        self.steps += 1
        if self.steps == self.stop_after:
            self.hold()
        return [self._advance(row) for row in rows]

    def _advance(self, row):
        if "?" in row.text:
            self.active.remove(row)
            return Advance(row, [], NotFiniteOutputError("fake", "logits", 1))
        if "~" in row.text and row.unread:
            row.unread -= 1
            return Advance(row, [Step(None, "", None, 1)], None)
        letter = row.text[row.written % len(row.text)]
        read = 0 if row.written else len(row.text)
        row.written += 1
        return Advance(row, [Step(ord(letter), letter, "length" if row.written == row.most else None, read)], None)

    def interrupt(self, rows=None):
        if rows is None or (self.active and all(row in rows for row in self.active)):
            self.interrupts += 1
            self.interrupted.set()
            if not any("#" in row.text for row in self.active):
                self.go.set()

    def leave(self, row):
        if row in self.active:
            self.active.remove(row)

    def close(self):
        self.closed = True
        self.active.clear()

    def memory(self):
        return Memory(len(self.active), len(self.active), self.rows)


class Decoder:
    """Its tokens are the characters of the prompt."""

    name, precision, kv, context, vocabulary, speculation = "fake", "int8", "fp32", 64, 256, None

    def __init__(self, rows):
        self.stepper = rows

    def encode_chat(self, prompt):
        return [ord(one) for one in prompt]

    encode = encode_chat

    def close(self):
        """Nothing is held."""
