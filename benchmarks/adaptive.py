"""How near an adaptive bulkhead's limit comes to the best fixed one, against scripted servers in virtual time.

NAME_off      distance of the limit from the best fixed one, mean of all seconds, scenes and seeds; 0.1 is a tenth
NAME_served   calls served, over those that the best fixed limit would serve
NAME_slower   latency, over that behind the best fixed limit
NAME_within   share of the spans of 20 s, from 20 s after a step on, in which the mean limit is within a fifth
observe_ns    what the default algorithm adds to a call's exit

The best fixed limit is the smallest one with 99 % of the goodput that any has, found by simulation for the
server as it is at that moment. NAME is one of ours or `failsafe`, the rule of failsafe-go's limiter ported here.
Only seconds in which there is more load than the server can take count: below that any limit is good.

Writes the pictures of docs/policies/adaptive-bulkhead.md anew: the runs are seeded, so they stay the same.
"""

import random
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import _plot
from _failsafe_limit import FailsafeLimit
from _harness import Samples, arguments, print_figures, write_results
from _servers import SCENES, Second, Server, Simulation, best_at, fixed

from seawall import AdaptiveBulkhead, AIMDLimit, GradientLimit, Limit, VegasLimit

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "policies" / "img"
SECONDS, STEP, SEEDS = 180, 20, (1, 2, 3)
ALGORITHMS: dict[str, Callable[[int, int, int], Limit]] = {
    "gradient": GradientLimit,
    "vegas": VegasLimit,
    "aimd": partial(AIMDLimit, max_latency=0.3),
    "failsafe": FailsafeLimit,
}


class Run(NamedTuple):
    """One algorithm in one scene, and what the best fixed limit does at each of its moments."""

    seconds: list[Second]
    best: list[int]
    served: list[float]
    latency: list[float]


@cache
def yardstick(scene: str, moment: int) -> tuple[int, float, float]:
    """The best fixed limit for the server at `moment`, and the calls a second and their latency behind it."""
    server = SCENES[scene]
    limit = best_at(server, moment)
    return limit, *steady(limit, server.workers(moment), server.service(moment), server.load(moment))


@cache
def steady(limit: int, workers: float, service: float, load: float) -> tuple[float, float]:
    """Calls a second and their latency behind a fixed limit, once it has settled."""
    server = Server(lambda _: workers, lambda _: service, lambda _: load)
    seconds = Simulation(fixed(limit), server, seed=0).run(20)[5:]
    return (
        statistics.fmean(second.finished for second in seconds),
        statistics.fmean(second.latency for second in seconds),
    )


def overloaded(scene: str, moment: int) -> bool:
    server = SCENES[scene]
    return server.load(moment) * server.service(moment) >= server.workers(moment)


def moments(scene: str) -> list[int]:
    """For each second, the moment whose server it is measured by: drifts are looked at every 20 s."""
    return [second - second % STEP + STEP // 2 for second in range(SECONDS)]


@cache
def simulate(name: str, scene: str, seed: int) -> Run:
    guard = AdaptiveBulkhead("simulated", algorithm=ALGORITHMS[name], rng=random.Random(seed))
    seconds = Simulation(guard, SCENES[scene], seed=seed).run(SECONDS)
    best, served, latency = zip(*(yardstick(scene, moment) for moment in moments(scene)), strict=True)
    return Run(seconds, list(best), list(served), list(latency))


def figures_of(name: str) -> dict[str, float]:
    off, served, slower, within = [], [], [], []
    for scene in SCENES:
        for seed in SEEDS:
            run = simulate(name, scene, seed)
            for moment in range(STEP, SECONDS, STEP):
                if not overloaded(scene, moment):
                    continue
                span = slice(moment, moment + STEP)
                limits = [second.limit for second in run.seconds[span]]
                off += [abs(limit / best - 1) for limit, best in zip(limits, run.best[span], strict=True)]
                served.append(sum(second.finished for second in run.seconds[span]) / sum(run.served[span]))
                slower += [
                    second.latency / theirs
                    for second, theirs in zip(run.seconds[span], run.latency[span], strict=True)
                    if second.finished
                ]
                if not (scene.startswith("step") and moment in {60, 120}):
                    within.append(abs(statistics.fmean(limits) / run.best[moment] - 1) <= 0.2)
    return {
        f"{name}_off": statistics.fmean(off),
        f"{name}_served": statistics.fmean(served),
        f"{name}_slower": statistics.fmean(slower),
        f"{name}_within": statistics.fmean(within),
    }


def observe_ns(calls: int = 200_000) -> float:
    """CPU nanoseconds of one `observe`."""
    limit = GradientLimit()
    start = time.process_time_ns()
    for number in range(calls):
        limit.observe(number * 1e-3, 0.01, 10, False)
    return (time.process_time_ns() - start) / calls


def draw() -> None:
    """The pictures of the documentation."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for scene in ("step in latency", "step in capacity", "step in load", "drift of capacity"):
        lines = {name: [second.limit for second in simulate(name, scene, 1).seconds] for name in ALGORITHMS}
        best = [
            float(limit) if overloaded(scene, moment) else None
            for limit, moment in zip(simulate("gradient", scene, 1).best, moments(scene), strict=True)
        ]
        picture = _plot.picture(f"Limit, {scene}", lines, best, top=80)
        (PICTURES / f"adaptive-{scene.replace(' ', '-')}.svg").write_text(picture)


def main() -> None:
    options = arguments(__doc__)
    figures: dict[str, float] = {}
    for name in ALGORITHMS:
        figures |= figures_of(name)
    figures["observe_ns"] = observe_ns()
    draw()
    print_figures("adaptive: limits found against the best fixed one", figures, [f"pictures in {PICTURES}"])
    if options.json:
        limits: Samples = {
            f"{name}, {scene}, seed {seed}": [second.limit for second in simulate(name, scene, seed).seconds]
            for name in ALGORITHMS
            for scene in SCENES
            for seed in SEEDS
        }
        write_results(options.json, {name: round(value, 4) for name, value in figures.items()}, limits)


if __name__ == "__main__":
    main()
