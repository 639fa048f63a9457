"""What rows of one run do to each other is tried out, and a model whose rows are not strangers is not batched."""

import numpy as np
import pytest

from seawall.inference import Backend, MicroBatcher, Padding
from seawall.inference.errors import DependentRowsError, InvalidInputError, InvalidSettingError
from seawall.inference.runtime.batching.exactness import probe
from seawall.inference.runtime.batching.joining import Layout
from seawall.inference.runtime.inputs import Port
from tests.inference import onnx_models as models

BUCKETS = Padding({"ids": 0}, buckets=(8, 16), mask="mask")


def load(model):
    return Backend.load(model.SerializeToString(), threads=1)


def test_a_matrix_product_is_bitwise_exact_and_the_report_says_so():
    with load(models.linear()) as backend:
        assert backend.report().exactness is None
        assert "not tried out" in str(backend.report())
        with MicroBatcher(backend) as batcher:
            assert "bitwise" == batcher.exactness.kind
            assert batcher.exactness.runs > 10
            assert batcher.exactness == backend.report().exactness
            assert "exactness" in str(backend.report())
            assert "bitwise: a row's output is the same" in str(backend.report())


def test_the_matrix_product_of_quantized_blocks_at_accuracy_0_is_exact_within_rounding_and_by_how_much_is_told():
    with load(models.quantized("nbits", rows=256, columns=256)) as backend, MicroBatcher(backend) as batcher:
        found = batcher.exactness
        assert ("tolerance" if found.number else "bitwise") == found.kind
        assert found.number < 1e-5


def test_one_scale_for_all_rows_is_refused_by_its_operator_without_a_run():
    with load(models.dynamically_quantized()) as backend:
        with pytest.raises(DependentRowsError, match="DynamicQuantizeLinear scales by the largest value") as caught:
            MicroBatcher(backend)
        assert "isolate=True" in str(caught.value)
        assert not caught.value.retryable
        assert backend.calls == 0


def test_a_neighbour_really_changes_a_row_of_such_a_model():
    """The attack that the refusal prevents: another user's outlier takes the precision from one's own row."""
    with load(models.dynamically_quantized()) as backend:
        row = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
        alone = backend.run_sync({"x": row})["y"][0]
        shared = backend.run_sync({"x": np.concatenate([row, np.full_like(row, 1e4)])})["y"][0]
        assert np.abs(alone - shared).max() > 0.1 * np.abs(alone).max()


def test_rows_that_depend_on_each_other_through_plain_operators_are_found_by_running_them():
    with load(models.normalized_over_rows()) as backend:
        with pytest.raises(DependentRowsError, match="neighbours' values change a row's output"):
            MicroBatcher(backend)
        assert backend.exactness is None


def test_isolated_rows_are_served_one_by_one_and_exact():
    with load(models.dynamically_quantized()) as backend, MicroBatcher(backend, isolate=True) as batcher:
        rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
        rows[1] *= 1e4
        answer = batcher.run_sync({"x": rows})["y"]
        for row in range(3):
            np.testing.assert_array_equal(backend.run_sync({"x": rows[row : row + 1]})["y"][0], answer[row])
        assert "each row runs by itself" in batcher.exactness.why


def test_padding_that_a_mask_hides_moves_no_more_than_rounding():
    with load(models.encoder()) as backend, MicroBatcher(backend, padding=BUCKETS) as batcher:
        assert batcher.exactness.kind in {"bitwise", "tolerance"}
        assert 0 <= batcher.exactness.padding < 1e-5


def test_padding_that_nothing_hides_is_refused_with_the_cure():
    with load(models.encoder(masked=False)) as backend:
        with pytest.raises(InvalidSettingError, match=r"padding changes a row's output by .*as mask, or padding=None"):
            MicroBatcher(backend, padding=Padding({"ids": 0}, buckets=(8, 16)))
        MicroBatcher(backend, samples=[{"ids": np.array([[1, 2, 3]])}]).close()


def test_an_output_whose_padding_is_not_cut_is_refused_with_the_cure():
    made = models.encoder()
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "other"
    with load(made) as backend:
        with pytest.raises(InvalidSettingError, match="say in cut which of its axes varies"):
            MicroBatcher(backend, padding=BUCKETS)
        cut = Padding({"ids": 0}, buckets=(8, 16), mask="mask", cut={"states": 1})
        with MicroBatcher(backend, padding=cut) as batcher:
            assert (1, 5, 8) == batcher.run_sync({"ids": np.ones((1, 5), np.int64)})["states"].shape


def test_made_up_rows_that_do_not_run_ask_for_real_ones():
    made = models.model(
        [models.make.make_node("Gather", ["w", "i"], ["y"])],
        [models.tensor("i", ["n"], models.INT64)],
        [models.tensor("y", ["n"])],
        [("w", np.array([5.0], np.float32))],
    )
    with load(made) as backend:
        with pytest.raises(InvalidSettingError, match="give samples, some of its own"):
            MicroBatcher(backend)
        MicroBatcher(backend, samples=[{"i": np.array([0])}]).close()
        with pytest.raises(InvalidInputError):
            MicroBatcher(backend, samples=[{"wrong": np.array([0])}])


class Fake:
    """A model in numpy, to be as wrong as no kernel on this machine is."""

    operators = frozenset()

    def __init__(self, answer):
        self.answer = answer

    def run_sync(self, inputs):
        return {"y": self.answer(inputs["x"])}


LAYOUT = Layout([Port("x", "tensor(float)", ("n", 4))], [Port("y", "tensor(float)", ("n", 4))], None)


def by_number(x, share):
    return x * np.float32(1 if len(x) == 1 else 1 + share)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda x: x * 2, "bitwise"),
        (np.isnan, "bitwise"),
        (lambda x: by_number(x, 1e-6), "tolerance"),
        (lambda x: by_number(x, 1e-2), "dependent"),
        (lambda x: x + np.nansum(x) * np.float32(1e-30), "dependent"),
        (lambda x: x + (0 if np.isfinite(x).all() else np.float32(1e-3)), "dependent"),
        (lambda x: (x > np.nanmean(x)).astype(np.int64), "dependent"),
        (lambda x: x * np.float32(np.nan if np.isnan(x).any() else 1), "dependent"),
    ],
    ids=["own", "words", "number", "number_much", "sum", "finite", "whole_numbers", "nan"],
)
def test_what_changes_a_row_is_told_apart(answer, kind):
    found = probe(Fake(answer), LAYOUT, most=16, tolerance=1e-4)
    assert kind == found.kind
    assert f"{kind}: {found.why}" == str(found)


def test_a_model_that_never_answers_twice_the_same_is_judged_by_how_much():
    random = np.random.default_rng(0)
    noisy = Fake(lambda x: x * np.float32(1 + random.uniform(0, 1e-6)))
    assert "tolerance" == probe(noisy, LAYOUT, most=16, tolerance=1e-4).kind
    assert "dependent" == probe(noisy, LAYOUT, most=16, tolerance=1e-9).kind


def test_with_one_row_a_run_there_is_nothing_to_depend_on():
    assert "bitwise" == probe(Fake(lambda x: x + x.sum()), LAYOUT, most=1, tolerance=1e-4).kind
