"""Bounds as data."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.errors import InvalidSettingError, ModelError, QualityGateError
from seawall.inference.quality import GATES, Failure, Gate, gate_for
from seawall.inference.quantize import RECIPES


def test_a_bound_itself_passes_and_the_next_number_does_not():
    gate = Gate(kl=0.005, top1=0.95)
    assert [] == gate.failures({"kl": 0.005, "top1": 0.95})
    assert ["kl"] == [each.measure for each in gate.failures({"kl": math.nextafter(0.005, 1), "top1": 0.95})]
    assert ["top1"] == [each.measure for each in gate.failures({"kl": 0.005, "top1": math.nextafter(0.95, 0)})]


def test_what_was_not_measured_and_what_is_nan_does_not_pass():
    assert [Failure("cosine", None, "at least", 0.9)] == Gate(cosine=0.9).failures({"kl": 0.0})
    for gate in (Gate(kl=1.0), Gate(top1=0.0), Gate(perplexity_ratio=2.0), Gate(sqnr_db=0.0)):
        (name,) = gate.limits
        assert gate.failures({name: math.nan})


@given(st.dictionaries(st.sampled_from(["kl", "kl_p99", "top1", "perplexity_ratio", "cosine", "sqnr_db"]),
                       st.floats(0, 1), min_size=1))  # fmt: skip
def test_scores_on_their_bounds_pass_and_a_gate_without_bounds_passes_all(scores):
    assert [] == Gate(**scores).failures(scores)
    assert [] == Gate().failures(scores)


@pytest.mark.parametrize("limit", [math.nan, math.inf, True, "0.1"])
def test_a_bound_is_a_finite_number(limit):
    with pytest.raises(InvalidSettingError, match="kl must be a finite number"):
        Gate(kl=limit)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"top1": 97}, r"top1 must be from 0 to 1, got 97; for 97 % write 0\.97"),
        ({"top1": -0.1}, "top1 must be from 0 to 1, got -0"),
        ({"kl": -1}, "kl must be from 0 to inf, got -1"),
        ({"perplexity_ratio": -0.5}, "perplexity_ratio must be from 0"),
        ({"cosine": 99.5}, "cosine must be from -1 to 1, got 99.5"),
    ],
)
def test_a_bound_that_nothing_or_everything_keeps_is_refused(bound, message):
    with pytest.raises(InvalidSettingError, match=message):
        Gate(**bound)


def test_the_error_carries_measure_value_limit_and_cure():
    with pytest.raises(QualityGateError) as caught:
        GATES["int8"].check_scores("salt int8", {"kl": 0.0076, "top1": 0.941}, "Take more bits")
    error = caught.value
    assert ("kl", 0.0076, 0.005) == (error.measure, error.measured, error.limit)
    assert (("kl", 0.0076, 0.005), ("top1", 0.941, 0.95)) == error.failures
    assert (
        "salt int8 does not pass its quality gate: kl is 0.0076 (at most 0.005), top1 is 0.941 (at least 0.95)"
        in str(error)
    )
    assert str(error).endswith("Take more bits")
    assert isinstance(error, ModelError)
    assert not error.retryable


def test_every_recipe_has_a_gate_but_those_nobody_can_vouch_for():
    without = {name for name in RECIPES if gate_for(name) is None}
    assert without == {name for name in RECIPES if name.startswith("int2")}
    assert GATES["int8"] == gate_for("int8-block32") == gate_for("int8-static")
    assert GATES["int4"] == gate_for("int4-awq-gptq") != gate_for("int4")
    assert GATES["fp8-e5m2"] == gate_for("fp8-e5m2")
    assert gate_for("fp32") is None
    assert Gate(cosine=0.98) == gate_for("int4-gptq", text=False)
