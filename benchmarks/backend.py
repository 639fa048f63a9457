"""A Backend beside the bare `InferenceSession.run` it wraps, and what stands before it: what they add, gain and keep.

    figure                   unit
    bare_run_us              one run of a small model (six products of 64 columns, one thread), p50
    run_sync_added_us        added to it by `run_sync`, p50
    run_async_added_us       added to it by `await run` on asyncio, worker thread and back included, p50
    run_deadline_added_us    the same with a deadline
    to_thread_added_us       added to it by `asyncio.to_thread` around the bare run: what waking two threads costs here
    deployment_added_us      added to `await run` of a backend by a Deployment around it, p50
    run_async_added_p99_us   p99 of `await run` less p99 of the bare run
    cancel_p50/p99_ms        from `task.cancel()` to the CancelledError, in the middle of a run whose nodes take node_ms
    node_ms                  one node of that run
    rss_slope_kb_per_cycle   growth of resident memory per load, run and close of a model with 1 MB of weights
    bare_rss_slope_kb_per_cycle  the same of a bare InferenceSession, half as many cycles before

and on the sentence encoder all-minilm-l6-v2, texts of 4 to 40 tokens padded to buckets (see `_embedding.py`):

    embedding_ms             one text, by `await backend.run`, p50
    batching_over_single     texts per second of 16 callers through a MicroBatcher, by those through the backend itself
    batching_p99_added_ms    p99 of one call at a time through the batcher, less p99 through the backend, padded alike
    batching/single_half_load_p99_ms  p99 where calls arrive at random, half as many as the backend serves one by one
    loop_lag_p99_ms          how late a task wakes that sleeps a millisecond, while the 16 callers are answered
    swap_failed_requests     calls that failed while the encoder was swapped three times under four callers
    swap_p99_ms              p99 of their calls meanwhile, and no_swap_p99_ms before
    swap_s                   one swap: load, trial of the batcher, warm-up, self-test, probation of 0.2 s, drain

Calls take turns within a round, bare, sync, async, deadline, so that a busy neighbour slows all of them alike; the
figures are of wall time, since waiting for the worker is what they are about. The slope is a least-squares line
through the last nine tenths of 1,000 cycles.
"""

import asyncio
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
from _embedding import batching, swapping
from _harness import Samples, arguments, print_figures, write_results
from onnx import TensorProto, helper, numpy_helper

from seawall.engine import Deployment
from seawall.inference import Backend
from seawall.inference.runtime import ort  # before onnxruntime: telemetry off

import onnxruntime  # isort: skip

CALLS, CANCELS, CYCLES = 5000, 300, 1000
DISTRIBUTIONS = ("onnxruntime", "numpy")


def chain(nodes: int, columns: int) -> bytes:
    """`nodes` matrix products in a row."""
    steps = [helper.make_node("MatMul", [f"h{i}" if i else "x", "w"], [f"h{i + 1}"]) for i in range(nodes)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", columns]) for name in ("x", f"h{nodes}")]
    weights = [numpy_helper.from_array(np.eye(columns, dtype=np.float32), "w")]
    graph = helper.make_graph(steps, "chain", ports[:1], ports[1:], weights)
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


def rows(count: int, columns: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((count, columns), np.float32)}


async def added() -> dict[str, list[float]]:
    """Microseconds of each kind of call, in turns."""
    feed = rows(1, 64)
    samples: dict[str, list[float]] = {
        "bare_us": [], "sync_us": [], "async_us": [], "deadline_us": [], "deployed_us": [], "to_thread_us": []
    }  # fmt: skip
    model = chain(6, 64)
    bare = ort.open_session(model, providers=[("CPUExecutionProvider", {})], threads=1).session

    def timed(name: str, start: int) -> None:
        samples[name].append((time.perf_counter_ns() - start) / 1e3)

    backend = Backend.load(model, threads=1)
    async with Deployment("scores", backend) as deployed:
        for _ in range(CALLS):
            start = time.perf_counter_ns()
            bare.run(None, feed)
            timed("bare_us", start)
            start = time.perf_counter_ns()
            backend.run_sync(feed)
            timed("sync_us", start)
        for _ in range(CALLS):
            start = time.perf_counter_ns()
            await backend.run(feed)
            timed("async_us", start)
            start = time.perf_counter_ns()
            await backend.run(feed, deadline=30)
            timed("deadline_us", start)
            start = time.perf_counter_ns()
            await deployed.run(feed)
            timed("deployed_us", start)
            start = time.perf_counter_ns()
            await asyncio.to_thread(bare.run, None, feed)
            timed("to_thread_us", start)
    return {name: times[CALLS // 10 :] for name, times in samples.items()}  # the first ones warm up


async def cancels() -> tuple[list[float], float]:
    """Milliseconds until a cancelled run is over, and those of one of its nodes."""
    feed = rows(64, 256)
    took = []
    async with Backend.load(chain(400, 256), threads=1) as backend:
        await backend.run(feed)
        start = time.perf_counter()
        await backend.run(feed)
        whole = time.perf_counter() - start
        for number in range(CANCELS):
            run = asyncio.create_task(backend.run(feed))
            await asyncio.sleep(whole * (0.1 + 0.8 * number / CANCELS))
            start = time.perf_counter()
            run.cancel()
            try:
                await run
            except asyncio.CancelledError:
                took.append((time.perf_counter() - start) * 1e3)
    return took, whole * 1e3 / 400


def cycles(once: Callable[[bytes, dict[str, np.ndarray]], object], count: int) -> list[int]:
    """Resident kilobytes after each load, run and close."""
    process = psutil.Process()
    model, feed = chain(4, 512), rows(64, 512)
    sizes = []
    for _ in range(count):
        once(model, feed)
        gc.collect()
        sizes.append(process.memory_info().rss >> 10)
    return sizes


def with_backend(model: bytes, feed: dict[str, np.ndarray]) -> None:
    with Backend.load(model, threads=2, memory_limit=64 << 20) as backend:
        asyncio.run(backend.run(feed))


def bare(model: bytes, feed: dict[str, np.ndarray]) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feed)


def slope(sizes: list[int]) -> float:
    settled = sizes[len(sizes) // 10 :]
    return statistics.linear_regression(range(len(settled)), settled).slope


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    options = arguments(__doc__)
    times = asyncio.run(added())
    cancelled, node = asyncio.run(cancels())
    bare_sizes = cycles(bare, CYCLES // 2)
    sizes = cycles(with_backend, CYCLES)
    p50: Callable[[list[float]], float] = statistics.median
    figures = {
        "bare_run_us": p50(times["bare_us"]),
        "run_sync_added_us": p50(times["sync_us"]) - p50(times["bare_us"]),
        "run_async_added_us": p50(times["async_us"]) - p50(times["bare_us"]),
        "to_thread_added_us": p50(times["to_thread_us"]) - p50(times["bare_us"]),
        "run_deadline_added_us": p50(times["deadline_us"]) - p50(times["bare_us"]),
        "deployment_added_us": p50(times["deployed_us"]) - p50(times["async_us"]),
        "run_async_added_p99_us": quantile(times["async_us"], 0.99) - quantile(times["bare_us"], 0.99),
        "cancel_p50_ms": p50(cancelled),
        "cancel_p99_ms": quantile(cancelled, 0.99),
        "node_ms": node,
        "rss_slope_kb_per_cycle": slope(sizes),
        "bare_rss_slope_kb_per_cycle": slope(bare_sizes),
    }
    samples: Samples = {**times, "cancel_ms": cancelled, "rss_kb": sizes, "bare_rss_kb": bare_sizes}
    for measured in (batching, swapping):
        found, raw = asyncio.run(measured())
        figures |= found
        samples |= raw
    print_figures("backend: beside the bare InferenceSession.run", figures)
    if options.json:
        path: Path = options.json
        write_results(path, {name: round(value, 4) for name, value in figures.items()}, samples, DISTRIBUTIONS)


if __name__ == "__main__":
    main()
