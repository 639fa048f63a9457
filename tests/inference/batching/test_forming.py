"""Which requests share a run is decided by shape, order, size and time alone; time is a number here."""

import math
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.runtime.batching.forming import Waiting
from seawall.inference.runtime.batching.joining import Shape


@dataclass(eq=False)
class Asked:
    arrived: float
    rows: int = 1
    padded: int = 1
    patience: float = math.inf
    shape: Shape = field(init=False)

    def __post_init__(self):
        self.shape = Shape((self.padded,), self.rows, self.padded, self.padded)


def waiting(*requests, max_size=4, max_delay=1.0, max_tokens=None):
    line = Waiting(max_size=max_size, max_delay=max_delay, max_tokens=max_tokens)
    for request in requests:
        line.add(request)
    return line


def test_a_batch_is_due_when_its_oldest_request_has_waited_long_enough():
    line = waiting(first := Asked(10.0), second := Asked(10.7))
    assert 11.0 == line.due()
    assert [] == line.take(10.99)
    assert [first, second] == line.take(11.0)
    assert math.inf == line.due()
    assert (0, 0) == (line.rows, line.requests)


def test_an_impatient_request_is_due_when_it_says_and_takes_those_that_came_after_it_along():
    line = waiting(first := Asked(10.0, patience=0.0), second := Asked(10.0))
    assert 10.0 == line.due()
    assert [first, second] == line.take(10.0)
    line = waiting(Asked(10.0), Asked(10.5, patience=0.0))  # only the oldest one counts
    assert 11.0 == line.due()


def test_a_full_batch_is_due_at_once_and_leaves_the_rest_waiting():
    requests = [Asked(float(n), rows=2) for n in range(3)]
    line = waiting(*requests)
    assert requests[:2] == line.take(2.0)
    assert (2.0 + 1.0, 2) == (line.due(), line.rows)


def test_one_is_told_of_a_batch_that_is_due_earlier_than_those_before():
    line = waiting()
    assert [True, False, False, True] == [line.add(Asked(0.1 * n)) for n in range(4)]
    assert not line.add(Asked(0.5, padded=2))


def test_requests_of_different_shapes_share_no_batch():
    line = waiting(short := Asked(0.0, padded=16), long := Asked(0.1, padded=32), other := Asked(0.2, padded=16))
    assert [short, other] == line.take(2.0)
    assert [long] == line.take(2.0)


def test_the_token_budget_counts_padded_positions():
    requests = [Asked(0.0, padded=32) for _ in range(3)]
    line = waiting(*requests, max_size=100, max_tokens=64)
    assert 2 == line.most_rows(32)
    assert requests[:2] == line.take(0.0)


def test_a_stream_of_full_batches_does_not_hold_up_an_older_request_of_another_shape():
    line = waiting(rare := Asked(0.0, padded=99), max_size=2)
    batches = []
    for now in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25):
        line.add(Asked(now))
        line.add(Asked(now))
        batches.append(line.take(now))
    assert [2, 2, 2, 2, 1, 2] == [len(batch) for batch in batches]
    assert [rare] == batches[4]


def test_a_request_that_is_gone_is_forgotten_and_so_is_its_empty_group():
    line = waiting(gone := Asked(0.0, rows=3), left := Asked(0.5, padded=2))
    line.discard(gone)
    assert (1, 1, 1.5) == (line.rows, line.requests, line.due())
    assert [left] == line.all()


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([16, 32])), max_size=40),
    st.integers(5, 9),
    st.one_of(st.none(), st.integers(160, 400)),
)
def test_every_request_is_taken_once_in_the_order_of_its_shape_and_no_batch_is_too_large(asked, max_size, max_tokens):
    requests = [Asked(float(n), rows, padded) for n, (rows, padded) in enumerate(asked)]
    line = waiting(*requests, max_size=max_size, max_tokens=max_tokens)
    taken = []
    while batch := line.take(1e9):
        assert 1 == len({request.shape.key for request in batch})
        rows = sum(request.rows for request in batch)
        assert rows <= max_size
        assert max_tokens is None or rows * batch[0].padded <= max_tokens
        taken += batch
    assert sorted(taken, key=id) == sorted(requests, key=id)
    for padded in (16, 32):
        arrived = [request.arrived for request in taken if request.padded == padded]
        assert arrived == sorted(arrived)
    assert 0 == line.rows == line.requests
