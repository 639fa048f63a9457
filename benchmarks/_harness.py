"""What every benchmark shares: who measured, interleaved rounds, a table for people and JSON for machines.

Method: everything that is compared runs in one process. In each round every case runs once, in a new random
order, each right after a run of the bare call; its added cost is the difference of the two. Figures are
medians over the rounds, taken from CPU time, which a busy neighbour disturbs less than wall time; the samples
hold both. The garbage collector stays on, since it is on in production.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

Call = Callable[[], Awaitable[object]]
Samples = dict[str, Any]
"""Whatever was measured, raw: plain numbers in lists and dicts, ready for JSON."""


class Times(NamedTuple):
    """Nanoseconds per call, one number a round."""

    cpu: list[float]
    wall: list[float]

    @property
    def median(self) -> float:
        """The figure: the median of the CPU time."""
        return statistics.median(self.cpu)

    def as_samples(self) -> Samples:
        """Rounded to tenths of a nanosecond, which is already finer than the clock."""
        return {"cpu_ns": [round(t, 1) for t in self.cpu], "wall_ns": [round(t, 1) for t in self.wall]}


class Comparison(NamedTuple):
    """The bare call, and what each case adds to it."""

    bare: Times
    added: dict[str, Times]


async def compare(
    bare: Call,
    cases: Mapping[str, Call],
    *,
    rounds: int = 60,
    calls: int = 1000,
    during: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> Comparison:
    """Time `calls` awaits of each case per round, paired with as many of the bare call.

    A case that needs something switched on has it in `during`, which is entered before its calls and left after.
    """
    switched = {name: (during or {}).get(name, nullcontext) for name in cases}
    result = Comparison(Times([], []), {name: Times([], []) for name in cases})
    await _time(bare, calls)  # warm-up: caches, specialised bytecode, lazy imports
    for name, call in cases.items():
        with switched[name]():
            await _time(call, calls)
    for number in range(rounds):
        order = list(cases)
        random.Random(number).shuffle(order)
        for name in order:
            bare_cpu, bare_wall = await _time(bare, calls)
            with switched[name]():
                cpu, wall = await _time(cases[name], calls)
            result.bare.cpu.append(bare_cpu)
            result.bare.wall.append(bare_wall)
            result.added[name].cpu.append(cpu - bare_cpu)
            result.added[name].wall.append(wall - bare_wall)
    return result


async def _time(call: Call, calls: int) -> tuple[float, float]:
    """CPU and wall nanoseconds per call."""
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    for _ in range(calls):
        await call()
    cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
    return cpu / calls, wall / calls


def arguments(description: str | None) -> argparse.Namespace:
    """The options of every benchmark: `--json FILE` and `--peers`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write figures and raw samples here")
    parser.add_argument("--peers", action="store_true", help="measure the competitors in the same run")
    return parser.parse_args()


def machine() -> dict[str, str | int]:
    """Where this ran: processor, cores this process may use, system, Python."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def versions(*distributions: str) -> dict[str, str]:
    """Installed versions, of those that are installed."""
    found = {}
    for name in ("seawall", *distributions):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_results(
    path: Path, figures: Mapping[str, float], samples: Samples, distributions: Iterable[str] = ()
) -> None:
    """Write the results in the form all benchmarks share."""
    results = {
        "machine": machine(),
        "versions": versions(*distributions),
        "figures": dict(figures),
        "samples": samples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def print_figures(title: str, figures: Mapping[str, float], notes: Sequence[str] = ()) -> None:
    """Print the figures as a table, after the machine they were measured on."""
    print(f"{title}\n{', '.join(f'{key} {value}' for key, value in machine().items())}\n")
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"  {name:<{width}}  {_shown(value):>12}")
    for note in notes:
        print(f"\n{note}")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
