"""Rows side by side and apart again: each request gets its own, and no more than that."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference import Padding
from seawall.inference.errors import InvalidInputError, InvalidSettingError, RuntimeMisuseError
from seawall.inference.runtime.batching.joining import Layout
from seawall.inference.runtime.inputs import Port

IDS = Port("ids", "tensor(int64)", ("batch", "sequence"))
MASK = Port("mask", "tensor(int64)", ("batch", "sequence"))
STATES = Port("states", "tensor(float)", ("batch", "sequence", 2))
POOLED = Port("pooled", "tensor(float)", ("batch", 2))
PADDING = Padding({"ids": 7}, buckets=(4, 8), mask="mask")


@pytest.fixture
def layout():
    return Layout([IDS, MASK], [STATES, POOLED], PADDING)


def ids(rows, length, start=0):
    return np.arange(start, start + rows * length, dtype=np.int64).reshape(rows, length)


def test_each_row_is_padded_to_its_own_bucket_and_the_mask_is_made(layout):
    feed, shape = layout.check({"ids": ids(1, 3)})
    assert (1, 3, 4) == (shape.rows, shape.length, shape.padded)
    other, other_shape = layout.check({"mask": np.array([[1, 0]]), "ids": ids(1, 2, 10)})
    assert shape.key == other_shape.key
    joined = layout.join([feed, other], 4)
    assert [[0, 1, 2, 7], [10, 11, 7, 7]] == joined["ids"].tolist()
    assert [[1, 1, 1, 0], [1, 0, 0, 0]] == joined["mask"].tolist()
    assert np.int64 == joined["mask"].dtype


def test_rows_of_different_buckets_do_not_fit_together(layout):
    short, long = (layout.check({"ids": ids(1, length)})[1].key for length in (4, 5))
    assert short != long


def test_the_order_of_a_requests_inputs_does_not_matter(layout):
    for names in (("ids", "mask"), ("mask", "ids")):
        feed, shape = layout.check({name: ids(2, 4) for name in names})
        assert ["ids", "mask"] == list(feed)
        assert (4, (), (), (), ()) == (shape.key[0], *shape.key[1], *shape.key[2])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": ids(1, 9)}, r"1 to 8 positions, got 9 positions"),
        ({"ids": ids(1, 0)}, r"1 to 8 positions, got 0 positions"),
        ({"ids": ids(0, 3)}, "at least one row"),
        ({"ids": ids(2, 3), "mask": ids(1, 3)}, "as many rows as 'ids', which has 2"),
        ({"ids": ids(2, 3), "mask": ids(2, 4)}, "as many as 'ids', which has 3"),
        ({"ids": ids(2, 3)[0]}, "2 dimensions"),
        ({"ids": ids(2, 3).astype(np.int32)}, "an array of int64"),
        ({"ids": [[1, 2]]}, "a numpy array"),
        ({}, "the model needs 'ids', 'mask'"),
        ({"ids": ids(1, 3), "extra": ids(1, 3)}, "an unknown name"),
    ],
)
def test_a_request_that_fits_in_no_batch_is_refused_by_itself(layout, inputs, message):
    with pytest.raises(InvalidInputError, match=message):
        layout.check(inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Padding({}), "at least one input"),
        (lambda: Padding({"ids": 0}, axis=0), "axis must be"),
        (lambda: Padding({"ids": 0}, buckets=(8, 4)), r"ascending whole numbers of at least 1, got \(8, 4\)"),
        (lambda: Padding({"ids": 0}, buckets=()), "ascending"),
        (lambda: Padding({"ids": 0}, mask="ids"), "got 'ids' in both"),
        (lambda: Layout([IDS], [POOLED], PADDING), "padding names 'mask', and the model takes 'ids'"),
        (lambda: Layout([POOLED], [POOLED], Padding({"pooled": 0}, axis=2)), "axis 2, which pooled"),
        (lambda: Layout([IDS._replace(shape=(1, "s"))], [POOLED], None), r"input ids.*no free first dimension"),
        (lambda: Layout([IDS], [POOLED._replace(shape=())], None), r"output pooled.*no free first dimension"),
        (
            lambda: Layout([IDS._replace(type="seq(tensor(float))")], [POOLED], None),
            r"seq\(tensor.*no free first dimension",
        ),
        (
            lambda: Layout([IDS._replace(shape=("b", 16))], [POOLED], Padding({"ids": 0})),
            r"takes 16 positions: buckets must be \(16,\)",
        ),
        (lambda: Layout([IDS], [POOLED], Padding({"ids": 0}, cut={"pooled": 5})), "cut must give an axis"),
    ],
)
def test_a_setting_that_does_not_fit_the_model_is_refused(make, message):
    with pytest.raises(InvalidSettingError, match=message):
        make()


def test_a_model_of_one_length_takes_shorter_rows_in_a_batch():
    layout = Layout([IDS._replace(shape=("b", 4))], [POOLED], Padding({"ids": 7}, buckets=(4,)))
    feed, shape = layout.check({"ids": ids(1, 2)})
    assert [[0, 1, 7, 7]] == layout.join([feed], shape.padded)["ids"].tolist()


def test_the_axis_to_cut_is_the_one_that_the_model_names_like_the_inputs_or_the_one_given():
    shapes = [Layout([IDS, MASK], [STATES], PADDING).check({"ids": ids(1, 3)})[1]]
    outputs = {"states": np.zeros((1, 4, 2), np.float32)}
    (cut,) = Layout([IDS, MASK], [STATES], PADDING).split(outputs, shapes)
    assert (1, 3, 2) == cut["states"].shape
    unnamed = STATES._replace(shape=("batch", None, 2))
    (whole,) = Layout([IDS, MASK], [unnamed], PADDING).split(outputs, shapes)
    assert (1, 4, 2) == whole["states"].shape
    told = Padding({"ids": 7}, buckets=(4, 8), mask="mask", cut={"states": 1})
    (cut,) = Layout([IDS, MASK], [unnamed], told).split(outputs, shapes)
    assert (1, 3, 2) == cut["states"].shape


def test_an_output_without_a_row_for_each_is_an_error_and_nobody_gets_anothers(layout):
    shapes = [layout.check({"ids": ids(2, 4)})[1]] * 2
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((), np.float32)):
        with pytest.raises(RuntimeMisuseError, match="which is not a row for each of 4"):
            layout.split({"pooled": wrong}, shapes)
    with pytest.raises(RuntimeMisuseError, match="axis 1 of output 'states' is 9, not 4"):
        short = layout.check({"ids": ids(2, 3)})[1]
        layout.split({"states": np.zeros((2, 9, 2), np.float32)}, [short])


def test_no_answer_shares_memory_with_anothers(layout):
    shapes = [layout.check({"ids": ids(1, length)})[1] for length in (3, 4)]
    whole = {"states": np.zeros((2, 4, 2), np.float32), "pooled": np.zeros((2, 2), np.float32)}
    for answer in layout.split(whole, shapes):
        for name, array in answer.items():
            assert array.base is None
            assert not np.shares_memory(array, whole[name])


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=12))
def test_what_is_joined_and_split_again_is_what_it_was(requests):
    echo = Port("ids", "tensor(int64)", ("batch", "sequence"))
    layout = Layout([IDS, MASK], [echo], PADDING)
    feeds = [layout.check({"ids": ids(rows, length, 100 * n)}) for n, (rows, length) in enumerate(requests)]
    for padded in PADDING.buckets:
        group = [(feed, shape) for feed, shape in feeds if shape.padded == padded]
        if not group:
            continue
        joined = layout.join([feed for feed, _ in group], padded)
        assert sum(shape.rows * shape.length for _, shape in group) == joined["mask"].sum()
        answers = layout.split({"ids": joined["ids"]}, [shape for _, shape in group])
        for (feed, _), answer in zip(group, answers, strict=True):
            np.testing.assert_array_equal(feed["ids"], answer["ids"])
