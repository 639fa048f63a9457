"""Weights that hurt most are found, and a budget keeps as many of them wide as fit."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference import Backend
from seawall.inference.errors import InvalidSettingError
from seawall.inference.quantize import Grid, Loss, errors, plan, quantize_model, sensitivity
from tests.inference.quantize.models import encoder, saved, tokens

NARROW, MIDDLE, WIDE = Grid(2, 16, "rtn", False), Grid(4, 32, "rtn", False), Grid(8, 32, "rtn", False)
CALIBRATION = [tokens(seed) for seed in range(2)]

options = st.lists(
    st.tuples(*[st.floats(0, 1) for _ in range(3)], *[st.integers(1, 100) for _ in range(3)]), min_size=1, max_size=8
)


def losses_of(drawn):
    """Wider is never smaller and never worse."""
    found = []
    for number, (a, b, c, one, two, three) in enumerate(drawn):
        falling = sorted((a, b, c), reverse=True)
        sizes = np.cumsum((one, two, three)).tolist()
        for grid, loss, size in zip((NARROW, MIDDLE, WIDE), falling, sizes, strict=True):
            found.append(Loss(f"n{number}", grid, size, loss))
    return found


@given(options, st.floats(0, 1))
def test_a_plan_fits_its_budget_and_leaves_no_room_for_anything_that_helps(drawn, share):
    losses = losses_of(drawn)
    least = sum(one.bytes for one in losses if one.grid is NARROW)
    most = sum(one.bytes for one in losses if one.grid is WIDE)
    budget = least + int(share * (most - least))
    chosen = plan(losses, budget)
    assert chosen.bytes <= budget
    grids = dict(chosen.grids)
    by_choice = {(one.node, one.grid): one for one in losses}
    assert chosen.bytes == sum(by_choice[node, grid].bytes for node, grid in grids.items())
    for one in losses:
        now = by_choice[one.node, grids[one.node]]
        assert not (one.loss < now.loss and 0 < one.bytes - now.bytes <= budget - chosen.bytes)


@given(options)
def test_a_budget_for_all_makes_all_wide_and_a_tight_one_all_narrow(drawn):
    losses = losses_of(drawn)
    best = sum(min(one.loss for one in losses if one.node == node) for node in {one.node for one in losses})
    assert best == pytest.approx(plan(losses, 10**9).loss)
    least = sum(one.bytes for one in losses if one.grid is NARROW)
    assert least == plan(losses, least).bytes


def test_the_worst_weight_stays_wide():
    losses = [Loss("a", NARROW, 10, 0.1), Loss("a", WIDE, 20, 0), Loss("b", NARROW, 10, 0.5), Loss("b", WIDE, 20, 0)]
    assert (("a", NARROW), ("b", WIDE)) == plan(losses, 30).grids


@pytest.mark.parametrize("budget", [19, 30.0, None])
def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_does(budget):
    losses = [Loss("a", NARROW, 20, 0.1), Loss("a", WIDE, 40, 0)]
    with pytest.raises(InvalidSettingError, match="budget must be at least 20 bytes"):
        plan(losses, budget)


def test_sensitivity_ranks_weights_by_what_the_model_loses(tmp_path):
    """The second block's outputs are a hundred times as large as the first's, and so are its errors."""
    made = encoder()
    down = next(one for one in made.graph.initializer if one.name == "l1.down")
    down.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(down) * np.float32(100), "l1.down"))
    found = sensitivity(saved(made, tmp_path), calibration=CALIBRATION, grids=(MIDDLE, WIDE), measure="error")
    by_choice = {(one.node, one.grid.bits): one.loss for one in found}
    assert ["l0.up", "l0.down", "l1.up", "l1.down"] == list(dict.fromkeys(one.node for one in found))
    assert by_choice["l1.down", 4] > 3 * by_choice["l0.down", 4]
    assert all(by_choice[node, 4] > 10 * by_choice[node, 8] for node in ("l0.up", "l0.down", "l1.up", "l1.down"))


def test_a_mixed_model_fits_its_budget_loses_less_than_a_narrow_one_and_carries_its_plan(tmp_path):
    source = saved(encoder(), tmp_path)
    found = sensitivity(source, calibration=CALIBRATION, measure="error")
    least, most = (sum(one.bytes for one in found if one.grid.bits == bits) for bits in (4, 8))
    budget = (least + most) // 2
    done = quantize_model(source, tmp_path / "mixed", recipe="mixed", calibration=CALIBRATION, budget=budget)
    chosen = plan(found, budget)
    assert least < chosen.bytes <= budget
    kept = {node: tuple(grid) for node, grid in done.facts["recipe"]["plan"]}
    assert {node: tuple(grid) for node, grid in chosen.grids} == kept
    nodes = onnx.load(done.folder / "model.onnx", load_external_data=False).graph.node
    bits = {node.name: onnx.helper.get_node_attr_value(node, "bits") for node in nodes if node.op_type == "MatMulNBits"}
    assert {4, 8} == set(bits.values())
    assert all(bits[node] == grid[0] for node, grid in kept.items())
    narrow = quantize_model(source, tmp_path / "narrow", recipe="int4-kquant")
    answers = []
    for path in (source, done.folder, narrow.folder):
        with Backend.load(path, threads=1) as backend:
            answers.append(backend.run_sync(tokens(99, batch=32))["y"])
    exact, mixed, lossy = answers
    assert errors(exact, lossy).mse > 1.3 * errors(exact, mixed).mse


def test_settings_are_checked(tmp_path):
    source = saved(encoder(), tmp_path)
    with pytest.raises(InvalidSettingError, match="needs a budget"):
        quantize_model(source, tmp_path / "q", recipe="mixed", calibration=CALIBRATION)
    with pytest.raises(InvalidSettingError, match="sensitivity needs calibration"):
        quantize_model(source, tmp_path / "q", recipe="mixed", budget=10**6)
    with pytest.raises(InvalidSettingError, match="budget goes with recipe 'mixed'"):
        quantize_model(source, tmp_path / "q", recipe="int8", budget=10**6)
    with pytest.raises(InvalidSettingError, match="measure must be one of kl, error"):
        sensitivity(source, calibration=CALIBRATION, measure="bleu")
    with pytest.raises(InvalidSettingError, match="must not round with 'gptq'"):
        sensitivity(source, calibration=CALIBRATION, grids=(Grid(4, 32, "gptq", False),))
