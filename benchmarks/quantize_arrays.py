"""How fast arrays are quantized and brought back, in gigabytes of float32 per second, next to ONNX Runtime's own.

64 MB of normal weights, [4096, 4096]. Every case takes its turn in each round, in a new random order; figures are
medians over rounds of CPU time, so one core's work, whatever runs beside it and however many threads a case uses.

    figure                    unit
    copy_gb_s                 `numpy.copyto` of the same array: what memory alone allows
    SCHEME_quantize_gb_s      `quantize`: int8 per tensor, symmetric and not, per channel, int4 and int2 per block of
                              32, 8-bit floats per tensor
    SCHEME_dequantize_gb_s    `dequantize`
    pack4_gb_s, unpack4_gb_s  `pack_bits` and `unpack_bits` of 16 million int4 codes, by the float32 they stand for
    ort_CASE_gb_s             ONNX Runtime's: `quantize_data` (numpy, per tensor; 8-bit floats on 1 MB, in Python),
                              `quantize_matmul_4bits` (C++, blocks of 32), `pack_bytes_to_4bit` (Python, on 1 MB)
    CASE_over_ort             our gigabytes per second over theirs, where both do the same
"""

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Samples, arguments, print_figures, write_results

from seawall.inference.quantize import dequantize, pack_bits, quantize, unpack_bits
from seawall.inference.runtime import ort  # noqa: F401  # first: it switches ONNX Runtime's telemetry off

SIDE = 4096
ROUNDS = 9
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8_asymmetric": {"symmetric": False},
    "int8_channel": {"axis": 0},
    "int4_block32": {"dtype": "int4", "block_size": 32},
    "int4_block32_asymmetric": {"dtype": "int4", "block_size": 32, "symmetric": False},
    "int2_block32": {"dtype": "int2", "block_size": 32},
    "e4m3": {"dtype": "float8_e4m3fn"},
    "e5m2": {"dtype": "float8_e5m2"},
}
SAME = {"int8": "int8", "int4_block32": "int4_block32", "e4m3": "e4m3", "pack4": "pack4"}
Case = tuple[Callable[[], object], int]
"""What to time, and the bytes of float32 that it goes through."""


def our_cases(weights: Any) -> dict[str, Case]:
    """Quantize, dequantize and packing, by the name of their figure."""
    into = np.empty_like(weights)
    cases: dict[str, Case] = {"copy": (lambda: np.copyto(into, weights), weights.nbytes)}
    for name, scheme in SCHEMES.items():
        small = quantize(weights, **scheme)
        cases[f"{name}_quantize"] = (lambda scheme=scheme: quantize(weights, **scheme), weights.nbytes)  # type: ignore[misc]
        cases[f"{name}_dequantize"] = (lambda small=small: dequantize(small), weights.nbytes)  # type: ignore[misc]
    codes = quantize(weights, dtype="int4").data
    packed = pack_bits(codes, 4)
    cases["pack4"] = (lambda: pack_bits(codes, 4), weights.nbytes)
    cases["unpack4"] = (lambda: unpack_bits(packed, 4, SIDE), weights.nbytes)
    return cases


def their_cases(weights: Any) -> dict[str, Case]:
    """ONNX Runtime's own functions for the same."""
    from onnx import TensorProto
    from onnxruntime.capi import _pybind_state
    from onnxruntime.quantization.quant_utils import pack_bytes_to_4bit, quantize_data

    piece = weights[:64]  # 1 MB: these two take seconds on all of it
    codes = quantize(piece, dtype="int4").data.tobytes()
    data = np.zeros((SIDE, SIDE // 32, 16), np.uint8)
    scales, zero_points = np.zeros(SIDE * SIDE // 32, np.float32), np.zeros(SIDE * SIDE // 64, np.uint8)

    def blocks() -> None:
        _pybind_state.quantize_matmul_4bits(data, weights, scales, zero_points, 32, SIDE, SIDE, True)

    return {
        "ort_int8": (lambda: quantize_data(weights, TensorProto.INT8, symmetric=True), weights.nbytes),
        "ort_int4_block32": (blocks, weights.nbytes),
        "ort_e4m3": (lambda: quantize_data(piece, TensorProto.FLOAT8E4M3FN, symmetric=True), piece.nbytes),
        "ort_pack4": (lambda: pack_bytes_to_4bit(codes), piece.nbytes),
    }


def run(json: Path | None) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    weights = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    cases = our_cases(weights) | their_cases(weights)
    samples: Samples = {f"{name}_{kind}_gb_s": [] for name in cases for kind in ("cpu", "wall")}
    for call, _ in cases.values():  # warm-up
        call()
    for number in range(ROUNDS):
        order = list(cases)
        random.Random(number).shuffle(order)
        for name in order:
            call, size = cases[name]
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            samples[f"{name}_cpu_gb_s"].append(round(size / cpu / 1e9, 4))
            samples[f"{name}_wall_gb_s"].append(round(size / wall / 1e9, 4))
    figures = {f"{name}_gb_s": statistics.median(samples[f"{name}_cpu_gb_s"]) for name in cases}
    for ours, theirs in SAME.items():
        mine = figures[f"{ours if ours == 'pack4' else f'{ours}_quantize'}_gb_s"]
        figures[f"{ours}_over_ort"] = round(mine / figures[f"ort_{theirs}_gb_s"], 3)
    print_figures("quantize_arrays", figures)
    if json is not None:
        write_results(json, figures, samples, ("numpy", "ml_dtypes", "onnxruntime"))
    return figures


if __name__ == "__main__":
    run(arguments(__doc__).json)
