"""The pictures of docs/quantization.md.

python3 dev.py bench quantize --json quantize.json
.venv/bin/python benchmarks/_quantize_plots.py quantize.json docs/img
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from seawall.inference.quantize import dequantize, errors, quantize

mpl.use("svg")
from matplotlib import pyplot as plt

INK, GRID = "#1d2733", "#e3e6ea"
BLUE, BROWN, VIOLET, GREY, GREEN = "#0b6e99", "#b5651d", "#7a4fa3", "#7d8793", "#3d7d3d"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "seawall", "font.family": "sans-serif", "font.size": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
}  # fmt: skip
SCHEMES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("per tensor", GREY, "o", {}),
    ("per channel", BROWN, "s", {"axis": 0}),
    ("blocks of 128", VIOLET, "^", {"block_size": 128}),
    ("blocks of 32", BLUE, "D", {"block_size": 32}),
]
FAMILIES = {"int8": BLUE, "int4": BROWN, "int2": VIOLET, "fp8": GREEN, "mixed": INK, "ort": GREY}
OFFSETS = {  # where labels would lie on each other: points to the right and up
    "int4_gptq": (7, -11), "int4_awq": (7, 5), "int4_kquant": (7, 2), "int4_hqq": (7, -11), "int4_rtn": (-7, 7),
    "ort_kquant": (7, 5), "ort_rtn": (-7, -12), "int4_lossless": (7, -11), "int8_block32": (7, -11),
    "fp8_e4m3": (7, -3), "int8_static": (7, -11), "int2_gptq": (7, -11), "int4_awq_gptq": (-7, -13),
    "mixed": (7, -11), "fp8_e5m2": (7, 2),
    "int8": (7, 5), "ort_dynamic": (-7, 5),
}  # fmt: skip


def error_against_bits(folder: Path) -> None:
    """The textbook's sine, and normal weights by scheme."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    sine = np.sin(0.001 * np.arange(10_000)).astype(np.float32)
    bits = np.array([2, 4, 8])
    found = [errors(sine, dequantize(quantize(sine, dtype=f"int{each}"))) for each in bits]
    steps = 1 / (2.0 ** (bits - 1) - 1)
    for label, colour, values, theory in (
        ("largest error", BROWN, [each.max_error for each in found], steps / 2),
        ("mean absolute", VIOLET, [each.mae for each in found], steps / 4),
        ("mean squared", BLUE, [each.mse for each in found], steps**2 / 12),
    ):
        left.plot(bits, theory, color=colour, linewidth=1, linestyle="--")
        left.plot(bits, values, "o", color=colour, label=label)
    left.plot([], [], color=INK, linewidth=1, linestyle="--", label="step/2, step/4, step²/12")
    left.set(yscale="log", xticks=[2, 4, 8], xlabel="bits", title="10,000 weights sin(0.001 i)")
    left.legend(frameon=False)
    weights = np.random.default_rng(0).normal(scale=0.02, size=(1024, 1024)).astype(np.float32)
    for label, colour, marker, scheme in SCHEMES:
        points = []
        for each in bits:
            small = quantize(weights, dtype=f"int{each}", **scheme)
            points.append((8 * small.nbytes / weights.size, errors(weights, dequantize(small)).sqnr_db))
        right.plot(*np.array(points).T, marker=marker, color=colour, label=f"{label}", linewidth=1)
    for dtype, label in (("float8_e4m3fn", "E4M3"), ("float8_e5m2", "E5M2")):
        loss = errors(weights, dequantize(quantize(weights, dtype=dtype))).sqnr_db
        right.plot(8, loss, "*", color=GREEN, markersize=11)
        right.annotate(label, (8, loss), xytext=(-8, -4), textcoords="offset points", ha="right")
    right.set(xlabel="bits a weight, scales included", ylabel="signal to noise, dB", title="Normal weights, by scheme")
    right.legend(frameon=False)
    save(figure, folder / "quantization-error-against-bits.svg")


def size_against_kl(figures: dict[str, float], folder: Path) -> None:
    """Every recipe on the bundled model: left is smaller, low is nearer."""
    figure, axes = plt.subplots(figsize=(9.6, 5.4), layout="constrained")
    names = [name.removesuffix("_kl") for name in figures if name.endswith("_kl") and "noise" not in name]
    for name in sorted(names):
        kl, size = figures[f"{name}_kl"], figures[f"{name}_file_mb"]
        if kl == 0:
            continue  # the reference itself
        theirs = name.startswith("ort_")
        colour = FAMILIES[next(family for family in FAMILIES if name.startswith(family))]
        axes.plot(size, kl, "o", color=colour, markersize=8, markerfacecolor="white" if theirs else colour)
        right, up = OFFSETS.get(name, (7, -4))
        shown = name.replace("_", "-").replace("ort-", "onnxruntime ")
        axes.annotate(
            shown, (size, kl), xytext=(right, up), textcoords="offset points", ha="left" if right > 0 else "right",
            fontsize=10,
        )  # fmt: skip
    axes.axhline(0.005, color=INK, linewidth=1, linestyle="--")
    axes.annotate("gate of INT8 and of lossless INT4: 0.005", (axes.get_xlim()[1], 0.005), xytext=(0, 4),
                  textcoords="offset points", ha="right", fontsize=10)  # fmt: skip
    axes.set(yscale="log", xlabel="graph and weights, MB", ylabel="KL divergence to the float model, nats")
    axes.set_title("SmolLM2-135M by recipe: left is smaller, low is nearer (float: 540 MB)")
    save(figure, folder / "quantization-size-against-kl.svg")


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)
    text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    measured, into = Path(sys.argv[1]), Path(sys.argv[2])
    with mpl.rc_context(STYLE):
        error_against_bits(into)
        size_against_kl(json.loads(measured.read_text(encoding="utf-8"))["figures"], into)
