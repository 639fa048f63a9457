"""The textbook's experiment: 10,000 weights sin(0.001 i) in 8, 4 and 2 bits."""

import math

import numpy as np
import pytest

from seawall.inference.quantize import dequantize, errors, quantize

WEIGHTS = np.sin(0.001 * np.arange(10_000)).astype(np.float32)


@pytest.mark.parametrize(("dtype", "highest"), [("int8", 127), ("int4", 7), ("int2", 1)])
def test_symmetric_codes_have_the_step_and_the_errors_that_theory_says(dtype, highest):
    quantized = quantize(WEIGHTS, dtype=dtype)
    found = errors(WEIGHTS, dequantize(quantized))
    step = float(quantized.scale)
    assert math.isclose(WEIGHTS.max() / highest, step, rel_tol=1e-6)
    assert 0.49 * step < found.max_error <= 0.5 * step * (1 + 1e-5)  # reached: the sine passes every tie slowly
    assert found.mae <= found.max_error
    assert found.mae**2 <= found.mse <= found.max_error**2
    # errors spread evenly over half a step have mean step/4 and mean square step^2/12; 3 levels are too few
    assert math.isclose(step / 4, found.mae, rel_tol=0.15 if highest > 1 else 0.3)
    assert math.isclose(step**2 / 12, found.mse, rel_tol=0.15 if highest > 1 else 0.4)


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 255), ("int4", 15), ("int2", 3)])
def test_asymmetric_codes_use_one_step_more_and_err_less(dtype, levels):
    symmetric, asymmetric = quantize(WEIGHTS, dtype=dtype), quantize(WEIGHTS, dtype=dtype, symmetric=False)
    found = errors(WEIGHTS, dequantize(asymmetric))
    step = float(asymmetric.scale)
    assert math.isclose((WEIGHTS.max() - WEIGHTS.min()) / levels, step, rel_tol=1e-6)
    assert found.max_error <= 0.5 * step + 8 * np.finfo(np.float32).eps
    assert step < symmetric.scale
    assert levels + 1 == len(np.unique(asymmetric.data)) or levels == len(np.unique(asymmetric.data))


def test_every_bit_less_costs_what_the_steps_say():
    found = {dtype: errors(WEIGHTS, dequantize(quantize(WEIGHTS, dtype=dtype))) for dtype in ("int8", "int4", "int2")}
    assert 0.9 * (127 / 7) ** 2 < found["int4"].mse / found["int8"].mse < 1.1 * (127 / 7) ** 2
    assert found["int8"].sqnr_db > 45 > found["int4"].sqnr_db > 20 > found["int2"].sqnr_db > 5
