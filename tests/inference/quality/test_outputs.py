"""Two backends on the same inputs."""

import math

import numpy as np
import pytest

from seawall.inference import Backend
from seawall.inference.errors import (
    IncomparableModelsError,
    InvalidSettingError,
    NoQualityDataError,
    NotFiniteError,
)
from seawall.inference.quality import compare_outputs, quality_report
from tests.inference.onnx_models import make, model, tensor

WEIGHTS = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def product(weights=WEIGHTS, output="y", extra=(), shape=None):
    nodes = [make.make_node("MatMul", ["x", "w"], [output], name="mm"), *extra]
    return model(nodes, [tensor("x", ["n", 8])], [tensor(output, shape or ["n", 5])], [("w", weights)])


@pytest.fixture
def opened():
    """Loads models, and closes them when the test is over."""
    backends = []

    def load(proto):
        backends.append(Backend.load(proto.SerializeToString(), threads=1))
        return backends[-1]

    yield load
    for backend in backends:
        backend.close()


def batches(count=3, rows=16, seed=1):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(rows, 8)).astype(np.float32)} for _ in range(count)]


def test_scores_are_those_of_all_outputs_at_once(opened):
    noise = np.random.default_rng(3).normal(size=WEIGHTS.shape).astype(np.float32)
    first, second = opened(product()), opened(product(WEIGHTS + 0.05 * noise))
    (found,) = compare_outputs(first, second, iter(batches()), logits=["y"])
    inputs = np.concatenate([batch["x"] for batch in batches()])
    exact, other = (np.float64(inputs @ w) for w in (WEIGHTS, WEIGHTS + np.float32(0.05) * noise))
    assert exact.size == found.values
    assert math.isclose(((exact - other) ** 2).mean(), found.errors.mse, rel_tol=1e-4)
    assert math.isclose(np.abs(exact - other).max(), found.errors.max_error, rel_tol=1e-4)
    cosines = (exact * other).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(other, axis=1)
    assert math.isclose(cosines.mean(), found.cosine, rel_tol=1e-6)
    assert math.isclose(cosines.min(), found.worst_cosine, rel_tol=1e-6)
    assert (exact.argmax(1) == other.argmax(1)).mean() == found.top1
    assert 0 < found.kl <= found.kl_max


def test_nobody_guesses_that_an_output_holds_logits(opened):
    (found,) = compare_outputs(opened(product()), opened(product()), batches())
    assert (None, None, None) == (found.kl, found.kl_max, found.top1)
    assert (1.0, math.inf) == (round(found.worst_cosine, 12), found.errors.sqnr_db)


def test_other_outputs_are_named(opened):
    with pytest.raises(IncomparableModelsError, match="reference gives y and the candidate z"):
        compare_outputs(opened(product()), opened(product(output="z")), batches())


def test_other_shapes_are_named(opened):
    with pytest.raises(IncomparableModelsError, match=r"\[16, 5\] in the reference, \[16, 4\]"):
        compare_outputs(opened(product()), opened(product(WEIGHTS[:, :4], shape=["n", 4])), batches())


def test_logits_that_are_no_output_are_named(opened):
    with pytest.raises(InvalidSettingError, match="logits names scores, but the outputs are y"):
        compare_outputs(opened(product()), opened(product()), batches(), logits=["scores"])
    with pytest.raises(InvalidSettingError, match=r"a list of names of outputs, got a single str: \['y'\]"):
        compare_outputs(opened(product()), opened(product()), batches(), logits="y")


@pytest.mark.parametrize("data", ["a text", {"x": WEIGHTS}, [WEIGHTS]])
def test_what_is_no_list_of_inputs_by_name_is_refused(opened, data):
    with pytest.raises(InvalidSettingError, match="data must be a list of inputs by name, one mapping a batch"):
        quality_report(opened(product()), opened(product()), data)


def test_no_inputs_prove_nothing(opened):
    with pytest.raises(NoQualityDataError):
        compare_outputs(opened(product()), opened(product()), [])
    with pytest.raises(NoQualityDataError):
        quality_report(opened(product()), opened(product()), [], speed=True)


@pytest.mark.parametrize("bad", ["reference", "candidate"])
def test_nan_says_in_which_model_and_output(opened, bad):
    broken = WEIGHTS.copy()
    broken[0, 0] = np.nan
    pair = {"reference": product(), "candidate": product()} | {bad: product(broken)}
    with pytest.raises(NotFiniteError, match=f"the {bad}'s y"):
        compare_outputs(opened(pair["reference"]), opened(pair["candidate"]), batches())


def test_zero_vectors_point_the_same_way_as_each_other_and_as_nothing_else(opened):
    nothing = np.zeros_like(WEIGHTS)
    zeros = opened(product(nothing))
    assert 1.0 == compare_outputs(zeros, opened(product(nothing)), batches())[0].cosine
    assert 0.0 == compare_outputs(zeros, opened(product()), batches())[0].cosine


def test_a_report_of_models_from_memory_has_outputs_and_no_files(opened):
    report = quality_report(opened(product()), opened(product()), batches(), speed=True)
    assert 3 == report.compared
    assert report.costs.run_s > 0
    assert report.costs.file_bytes is None
    assert "" == report.candidate.digest
    with pytest.raises(InvalidSettingError, match="from bytes has none"):
        quality_report(opened(product()), opened(product()), batches(), weights=True)


def test_the_digest_of_the_data_follows_every_value(opened):
    first, second = opened(product()), opened(product())
    other = batches()
    other[2]["x"][0, 0] += 1
    digests = [quality_report(first, second, data).data_digest for data in (batches(), batches(), other)]
    assert digests[0] == digests[1] != digests[2]
