"""What every recipe costs and loses on the bundled model, ONNX Runtime's own recipes included, from one float graph.

How alike a recipe is to the float model is measured over the 4,071 tokens of `quality.evaluation_text`, both models
reading them in the same pieces, so these figures do not depend on the machine's load. Speed, load time and memory come
from fresh processes, one per recipe and round, in a new random order each round; figures are medians over rounds.
Calibrated recipes read the text that comes with the package, which is another one. Takes some 20 minutes,
a third of them for `mixed`, which tries every weight.

    figure             unit
    R_kl               mean KL divergence to the float model, nats
    R_top1             fraction of equal first choices
    R_ppl_ratio        perplexity over that of the float model
    R_file_mb          graph and weights on disk
    R_load_s           to load it in a fresh process, verification by digest included
    R_rss_mb           resident memory of that process once it has answered
    R_tok_s            new tokens per second, greedy, 128 tokens after a prompt of 64
    R_prefill_tok_s    prompt tokens read per second, 512 of them

    R_noise_kl, R_noise_top1    of int8 and int4_lossless against themselves, read token by token and in pieces of 64:
                       where the arithmetic ends, for kernels that round their inputs to 8 bits

R is a recipe (`int8`, `int4_awq_gptq` ...), `fp32`, `int4_lossless` (the 4-bit blocks of the bundled file, taken over),
or one of ONNX Runtime's: `ort_dynamic` (quantize_dynamic, per channel), `ort_rtn`, `ort_hqq`, `ort_kquant` (MatMulNBits
in 4 bits, blocks of 32, with an 8-bit output projection like ours).
"""

import contextlib
import io
import json as jsonlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from _harness import Samples, arguments, print_figures, write_results

from seawall.inference import Decoder, models
from seawall.inference.models.cache import read_facts, write_manifest
from seawall.inference.quality import compare_texts, evaluation_text
from seawall.inference.quantize import RECIPES, kl_divergence, quantize_model
from seawall.inference.runtime import ort

NAME = "smollm2-135m"
ROUNDS = 5
BLOCK = 32
MIXED_BUDGET = 85_000_000  # bytes of the weights of inner products; int4 takes 68 million
NOISY = ("int8", "int4_lossless")
DISTRIBUTIONS = ("onnxruntime", "numpy", "onnx", "onnx-ir")


def run(json: Path | None) -> dict[str, float]:
    """Measure, print, and write what was measured."""
    models.add(NAME)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="seawall-bench-") as work:
        folders, notes = build(Path(work))
        with Decoder.load(folders["fp32"], context=1024) as reference:
            for name, folder in folders.items():
                figures |= alike(name, folder, reference)
        for name in NOISY:
            figures |= noise(name, folders[name])
        samples: Samples = {}
        for number in range(ROUNDS):
            order = list(folders)
            random.Random(number).shuffle(order)
            for name in order:
                for unit, value in fresh(folders[name]).items():
                    samples.setdefault(f"{name}_{unit}", []).append(value)
    figures |= {name: statistics.median(values) for name, values in samples.items()}
    figures = {name: figures[name] for name in sorted(figures)}
    print_figures("quantize", figures, notes)
    if json is not None:
        write_results(json, figures, samples, DISTRIBUTIONS)
    return figures


def build(work: Path) -> tuple[dict[str, Path], list[str]]:
    """A folder per recipe, and what could not be built."""
    source = models.prepare(NAME, precision="fp32").folder
    folders = {"fp32": source, "int4_lossless": models.prepare(NAME, precision="int4").folder}
    notes = []
    builders: dict[str, Callable[[Path], object]] = {
        recipe.replace("-", "_"): lambda into, recipe=recipe: quantize_model(source, into, recipe=recipe)  # type: ignore[misc]
        for recipe in RECIPES
        if not recipe.endswith("native")  # no CPU runs it
    }
    builders["mixed"] = lambda into: quantize_model(source, into, recipe="mixed", budget=MIXED_BUDGET)
    builders |= {f"ort_{name}": lambda into, name=name: theirs(source, into, name) for name in PEERS}  # type: ignore[misc]
    for name, builder in builders.items():
        begun = time.perf_counter()
        try:
            builder(work / name)
        except Exception as error:
            notes.append(f"{name} is left out: {type(error).__name__}: {error}")
            continue
        print(f"built {name} in {time.perf_counter() - begun:.0f} s", flush=True)
        folders[name] = work / name
    return folders, notes


def alike(name: str, folder: Path, reference: Decoder) -> dict[str, float]:
    """How a recipe predicts beside the float model, and its bytes."""
    size = sum((folder / file).stat().st_size for file in ("model.onnx", "weights.bin"))
    with Decoder.load(folder, context=1024, check_quality=False) as candidate:
        scores = compare_texts(reference, candidate, evaluation_text())
    print(f"{name}: KL {scores.kl:.4f}, top-1 {scores.top1:.3f}, {size / 1e6:.0f} MB", flush=True)
    return {
        f"{name}_kl": scores.kl,
        f"{name}_top1": scores.top1,
        f"{name}_ppl_ratio": scores.perplexity_ratio,
        f"{name}_file_mb": size / 1e6,
    }


def noise(name: str, folder: Path) -> dict[str, float]:
    """How far a recipe is from itself when it reads one token at a time."""
    nats, same = [], []
    with Decoder.load(folder, context=1024, check_quality=False) as decoder:
        tokens = decoder.encode(evaluation_text()[:6000])[:1024]
        slot = decoder._lend()
        position = 0
        for piece in decoder.logits(tokens):
            for row in piece:
                alone = slot.run([tokens[position]], position, ort.run_options())
                nats.append(float(kl_divergence(row, alone)))
                same.append(bool(row.argmax() == alone.argmax()))
                position += 1
        decoder._take_back(slot)
    return {f"{name}_noise_kl": statistics.fmean(nats), f"{name}_noise_top1": statistics.fmean(same)}


def fresh(folder: Path) -> dict[str, float]:
    """Speed, load time and memory in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, float] = jsonlib.loads(done.stdout)
    return found


def one(folder: str) -> None:
    """What `fresh` runs."""
    begun = time.perf_counter()
    decoder = Decoder.load(folder, check_quality=False)
    loaded = time.perf_counter() - begun
    tokens = decoder.encode(evaluation_text()[:4000])
    answer(decoder, tokens[:64], 32)
    resident = psutil.Process().memory_info().rss
    speed = answer(decoder, tokens[:64], 128)
    begun = time.perf_counter()
    answer(decoder, tokens[:512], 1)
    read = 512 / (time.perf_counter() - begun)
    decoder.close()
    figures = {"load_s": loaded, "rss_mb": resident / 1e6, "tok_s": speed, "prefill_tok_s": read}
    print(jsonlib.dumps(figures))


def answer(decoder: Decoder, prompt: list[int], count: int) -> float:
    """Tokens per second after the first one."""
    with decoder.start(prompt, max_tokens=count) as sequence:
        while not sequence.tokens and sequence.step() is not None:
            pass
        first, begun = len(sequence.tokens), time.perf_counter()
        for _ in sequence:
            pass
        return (len(sequence.tokens) - first) / (time.perf_counter() - begun)


PEERS = ("dynamic", "rtn", "hqq", "kquant")


def theirs(source: Path, into: Path, name: str) -> None:
    """The same graph through ONNX Runtime's quantizers, as a folder that a decoder loads."""
    import onnx

    model = onnx.load(source / "model.onnx")
    head_as_product(model)
    into.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        if name == "dynamic":
            dynamic(model, into)
        else:
            blocks(model, into, name)
    shutil.copy(source / "tokenizer.json", into)
    write_manifest(into, {**read_facts(source), "precision": f"ort-{name}"})


def head_as_product(model: Any) -> None:
    """Their quantizers know MatMul alone, so the Gemm that projects to the vocabulary becomes one."""
    from onnx import numpy_helper

    (head,) = (node for node in model.graph.node if node.op_type == "Gemm")
    table = next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(table).T.copy(), "head"))
    head.op_type, head.input[1] = "MatMul", "head"
    del head.attribute[:]


def dynamic(model: Any, into: Path) -> None:
    """quantize_dynamic: 8-bit weights per channel, inputs with one scale for the whole tensor."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        whole = Path(folder) / "model.onnx"
        onnx.save(model, whole, save_as_external_data=True, location="weights.bin")
        quantize_dynamic(
            whole, Path(folder) / "small.onnx", weight_type=QuantType.QInt8, per_channel=True,
            op_types_to_quantize=["MatMul"], extra_options={"DefaultTensorType": 1},
        )  # fmt: skip
        small = onnx.load(Path(folder) / "small.onnx")
    onnx.save(small, into / "model.onnx", save_as_external_data=True, location="weights.bin")


def blocks(model: Any, into: Path, name: str) -> None:
    """MatMulNBits by their rounding; 8 bits for the projection to the vocabulary, 4 for the rest."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    names = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    head = next(node.name for node in model.graph.node if "logits" in node.output)
    for bits, left in ((4, [head]), (8, [each for each in names if each != head])):
        quantizer = nbits.MatMulNBitsQuantizer(
            model, bits=bits, block_size=BLOCK, is_symmetric=name == "rtn" or bits == 8, accuracy_level=4,
            nodes_to_exclude=left, op_types_to_quantize=("MatMul",), algo_config=config(nbits, name, bits),
        )  # fmt: skip
        quantizer.process()
        model = quantizer.model.model
    onnx.save(model, into / "model.onnx", save_as_external_data=True, location="weights.bin")


def config(nbits: Any, name: str, bits: int) -> Any:
    """Their settings of a rounding; the 8-bit head is rounded plainly."""
    if bits == 4 and name == "hqq":
        return nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=4)
    if bits == 4 and name == "kquant":
        return nbits.KQuantWeightOnlyQuantConfig()
    return nbits.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, bits=bits, accuracy_level=4, op_types_to_quantize=("MatMul",)
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        run(arguments(__doc__).json)
