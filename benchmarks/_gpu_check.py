"""Checks the inference backend on a CUDA device: python3 dev.py gpu-check [--json FILE].

Prints a line per check, PASS, FAIL or SKIP with the reason, and exits with 0 (none failed), 1 (some failed) or 3 (no
CUDA device). The standard library suffices to find that there is no device; the rest is imported after that.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NO_DEVICE = 3
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
ENCODER = "all-minilm-l6-v2"
EXACT = {"use_tf32": 0}  # TF32 keeps 10 bits of each factor: fast, and not what is compared here
NUMERICS = 1e-4  # of vectors of length 1, in float32 on both sides


class SkippedError(Exception):
    """The check does not apply to this machine; the message says why."""


class Device(NamedTuple):
    """The first CUDA device, as the driver tells."""

    name: str
    capability: tuple[int, int]


def find_device() -> Device | None:
    """Ask the driver; None where there is no driver or no device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    count, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    driver.cuDeviceGetName(name, len(name), 0)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    return Device(name.value.decode(), (major.value, minor.value))


class Checks:
    """The checks, in order; each returns what it saw, or raises."""

    def __init__(self, device: Device) -> None:
        import numpy as np

        from seawall.inference import models

        self.np = np
        self.device = device
        models.add(ENCODER)
        self.folder = models.prepare(ENCODER).folder
        rng = np.random.default_rng(0)
        ids = rng.integers(1000, 30_000, (16, 64))
        self.feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def on_gpu(self, **options: Any) -> Any:
        from seawall.inference import Backend

        return Backend.load(self.folder, providers=[(CUDA, {**EXACT, **options}), CPU], finite=True)

    def build_has_cuda(self) -> str:
        import onnxruntime

        found = onnxruntime.get_available_providers()
        assert CUDA in found, f"this build has {found}"
        return f"onnxruntime {onnxruntime.__version__}"

    def strict_load(self) -> str:
        with self.on_gpu() as backend:
            return f"loaded in strict mode, warm in {backend.warm_up(self.feed):.3f} s"

    def provider_of_each_node(self) -> str:
        with self.on_gpu() as backend:
            nodes = backend.report().nodes
        heavy = {"MatMul", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu"}
        strays = [str(node) for node in nodes if node.op_type in heavy and node.provider != CUDA]
        assert not strays, strays
        return str(dict(Counter(node.provider for node in nodes)))

    def cuda_alone(self) -> str:
        """Without the CPU in the list nothing may run there."""
        from seawall.inference import Backend

        with Backend.load(chain(4), providers=[(CUDA, EXACT)]) as backend:
            outputs = backend.run_sync({"x": self.np.ones((4, 64), self.np.float32)})
        assert self.np.allclose(outputs["y"], 1), outputs["y"]
        return "a model that CUDA takes whole runs with the CPU forbidden"

    def numerics(self) -> str:
        from seawall.inference import Backend

        with self.on_gpu() as gpu, Backend.load(self.folder) as cpu:
            found, expected = (one.run_sync(self.feed)["sentence_embedding"] for one in (gpu, cpu))
        worst = float(self.np.abs(found - expected).max())
        assert worst < NUMERICS, f"differs from the CPU by {worst:.2g}"
        return f"differs from the CPU by at most {worst:.2g}"

    def io_binding(self) -> str:
        """Inputs and outputs stay on the device; whether that pays is in the figures."""
        import onnxruntime

        with self.on_gpu() as backend:
            session = backend._session
            binding = session.io_binding()
            for name, array in self.feed.items():
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
            for port in backend.outputs:
                binding.bind_output(port.name, "cuda", 0)

            def bound() -> None:
                binding.synchronize_inputs()
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

            plain_ms = median_ms(lambda: backend.run_sync(self.feed))
            bound_ms = median_ms(bound)
            values = {port.name: value for port, value in zip(backend.outputs, binding.get_outputs(), strict=True)}
            assert values["sentence_embedding"].device_name().lower() == "cuda"
            plain = backend.run_sync(self.feed)["sentence_embedding"]
            worst = float(self.np.abs(values["sentence_embedding"].numpy() - plain).max())
        assert worst < NUMERICS, f"differs by {worst:.2g}"
        return f"same vectors; run {plain_ms:.2f} ms, bound {bound_ms:.2f} ms"

    def failover_to_cpu(self) -> str:
        """By a policy, to a session that is warm already; ONNX Runtime's own fallback stays off."""
        from seawall.engine import Failover
        from seawall.inference import Backend

        said: list[object] = []
        gpu = self.on_gpu()
        with Failover("encoder", gpu, Backend.load(self.folder), spare_name="cpu", listeners=[said.append]) as encoder:
            asyncio.run(encoder.warm_up())
            first = asyncio.run(encoder.run(self.feed))["sentence_embedding"]
            gpu.close()
            second = asyncio.run(encoder.run(self.feed))["sentence_embedding"]
        assert self.np.abs(first - second).max() < NUMERICS
        assert [getattr(event, "step", None) for event in said] == ["encoder.cpu"]
        return "a closed GPU backend is answered by the CPU, and an event says so"

    def lost_and_rebuilt(self) -> str:
        """What a device reset would leave: a session that answers nobody."""
        from seawall import CircuitOpenError
        from seawall.engine import Supervised
        from seawall.inference.errors import BackendClosedError

        with Supervised("encoder", self.on_gpu) as encoder:
            encoder.model.close()
            start = time.perf_counter()
            while encoder.counters()["rebuilt"] < 1:
                try:
                    encoder.run_sync(self.feed)
                except CircuitOpenError as refusal:
                    time.sleep(min(0.05, refusal.retry_after or 0.05))
                except BackendClosedError:
                    continue
            seconds = time.perf_counter() - start
            encoder.run_sync(self.feed)
        return f"serves again after {seconds:.1f} s"

    def swapped_under_load(self) -> str:
        """Both models share the device for a while."""
        from seawall.engine import Deployment, Probation

        async def main() -> int:
            answered = 0
            async with Deployment("encoder", self.on_gpu()) as encoder:
                swap = asyncio.ensure_future(encoder.swap(self.on_gpu, probation=Probation(seconds=0.5)))
                while not swap.done():
                    await encoder.run(self.feed)
                    answered += 1
                assert await swap == 2
            return answered

        return f"{asyncio.run(main())} calls were answered meanwhile, none failed"

    def deadline_and_next(self) -> str:
        from seawall.inference import Backend
        from seawall.inference.errors import RunDeadlineError

        with Backend.load(chain(2000, size=1024), providers=[(CUDA, EXACT)]) as backend:
            feed = {"x": self.np.ones((4096, 1024), self.np.float32)}
            whole = min(timed(lambda: backend.run_sync(feed)) for _ in range(3))
            start = time.perf_counter()
            try:
                backend.run_sync(feed, deadline=whole / 10)
            except RunDeadlineError:
                ended = time.perf_counter() - start
            else:
                raise AssertionError(f"a run of {whole:.3f} s did not see its deadline of {whole / 10:.3f} s")
            assert backend.run_sync({"x": feed["x"][:1]})["y"].shape == (1, 1024)
        return f"a run of {whole:.3f} s ended after {ended:.3f} s, deadline {whole / 10:.3f} s; the next is served"

    def device_memory_limit(self) -> str:
        from seawall.inference import Backend
        from seawall.inference.errors import RuntimeExhaustedError

        options = {**EXACT, "gpu_mem_limit": 64 << 20, "arena_extend_strategy": "kSameAsRequested"}
        with Backend.load(chain(2, size=1024), providers=[(CUDA, options)]) as backend:
            try:
                backend.run_sync({"x": self.np.ones((65_536, 1024), self.np.float32)})
                raise AssertionError("256 MiB of input ran within 64 MiB")
            except RuntimeExhaustedError:
                pass
            backend.run_sync({"x": self.np.ones((1, 1024), self.np.float32)})
        return "a run beyond gpu_mem_limit is RuntimeExhaustedError, and the next is served"

    def float8_product(self) -> str:
        """The block-scaled E4M3 product, its weights in 8 bits on the device."""
        from seawall.inference import Backend

        if self.device.capability < (8, 9):
            raise SkippedError(f"compute capability {self.device.capability} has no 8-bit floats; 8.9 has")
        model, weights, scales = float8_model(self.np)
        rows = self.np.random.default_rng(1).normal(0, 1, (8, 256)).astype(self.np.float16)
        with Backend.load(model, providers=[(CUDA, EXACT)]) as backend:
            found = backend.run_sync({"x": rows})["y"].astype(self.np.float32)
        expected = rows.astype(self.np.float32) @ (weights * self.np.repeat(scales, 128, axis=1)).T
        worst = float(self.np.abs(found - expected).max() / self.np.abs(expected).max())
        assert worst < 5e-3, f"differs by {worst:.2g} of the largest value"
        return f"differs from float32 by {worst:.2g} of the largest value"


def chain(nodes: int, size: int = 64) -> bytes:
    """`nodes` products with the identity in a row."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    names = ["x", *(f"h{i}" for i in range(1, nodes)), "y"]
    steps = [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]], name=f"mm{i}") for i in range(nodes)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in "xy"]
    weights = [numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")]
    graph = helper.make_graph(steps, "chain", ports[:1], ports[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


def float8_model(np: Any, rows: int = 128, columns: int = 256) -> tuple[bytes, Any, Any]:
    """The product x @ w.T with w in E4M3 blocks of 128; the model, the values of w before scaling, and the scales."""
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    stored = rng.normal(0, 1, (rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.01, 0.02, (rows, columns // 128)).astype(np.float32)
    weights = TensorProto(name="w", dims=stored.shape, data_type=TensorProto.FLOAT8E4M3FN, raw_data=stored.tobytes())
    node = helper.make_node(
        "MatMulBlockQuantizedFp8Weight", ["x", "w", "s"], ["y"], name="mm", domain="com.microsoft", block_size=128
    )
    sizes = {"x": columns, "y": rows}
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", size]) for name, size in sizes.items()]
    graph = helper.make_graph([node], "float8", ports[:1], ports[1:], [weights, numpy_helper.from_array(scales, "s")])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(made.SerializeToString()), stored.astype(np.float32), scales


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_ms(work: Callable[[], object]) -> float:
    """Milliseconds of a call, the median of 50 after 5 to warm up."""
    for _ in range(5):
        work()
    return 1000 * statistics.median(timed(work) for _ in range(50))


def run_checks(checks: Checks) -> list[dict[str, str]]:
    """Run them all, a failing one as well as the rest."""
    rows = []
    for name in [name for name in vars(Checks) if not name.startswith("_") and name != "on_gpu"]:
        try:
            result, saw = "PASS", getattr(checks, name)()
        except SkippedError as skipped:
            result, saw = "SKIP", str(skipped)
        except Exception as error:  # one broken check must not hide the others
            result, saw = "FAIL", f"{type(error).__name__}: {error}"
        print(f"{result}  {name}: {saw}", flush=True)
        rows.append({"check": name, "result": result, "saw": saw})
    return rows


def main() -> int:
    """Look for a device, run the checks, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--find", action="store_true", help="only say which device there is")
    options = parser.parse_args()
    device = find_device()
    rows: list[dict[str, str]] = []
    if device is None:
        print("no CUDA device: nothing was checked", flush=True)
    elif options.find:
        print(f"{device.name}, compute capability {device.capability[0]}.{device.capability[1]}")
        return 0
    else:
        import seawall.inference.runtime.ort  # noqa: F401 - telemetry is off before onnxruntime is imported
        import onnxruntime  # isort: skip

        onnxruntime.preload_dlls(directory="")  # the CUDA libraries of pip's packages
        rows = run_checks(Checks(device))
    if options.json and not options.find:
        facts = {"device": device and device._asdict(), "python": platform.python_version(), "checks": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return NO_DEVICE if device is None else int(any(row["result"] == "FAIL" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
