"""Cancels calls at random moments, behind a bulkhead, a limiter and a breaker, and proves that no permit is lost.

    python benchmarks/soak_permits.py --cancellations 1000000

Each round a crowd of calls (functions, streams and blocks, of several costs and priorities, some of which fail)
goes through the three policies in every order, on virtual time in whole milliseconds, so that ends, timeouts and
cancellations fall on the same instant. Most are cancelled: while they queue, as they are handed a place, while
they run, as probes. After each round nobody may hold or wait for anything, the limiter must have let in
exactly those that got past it, and all places, turns and probes must be there to take again, and not one more.
A loss ends it with exit code 1.
"""

import argparse
import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from seawall import Bulkhead, CircuitBreaker, Permit, Pipeline, RateLimiter, Rejected, State
from seawall.core.ambient import Priority, priority
from seawall.testing import run

PLACES, BURST, PROBES, CROWD = 10, 20, 2, 100


class Dice(random.Random):
    """Chance, in milliseconds and moods."""

    failures = 0.0

    def ms(self, below: int) -> float:
        """Seconds, in whole milliseconds."""
        return self.randrange(below) / 1000


Use = Callable[[Counter[str], Dice], Awaitable[None]]


class LostPermitError(AssertionError):
    """Something was not given back, or was given twice."""


class Passed:
    """A guard that counts who got past the one before it."""

    def __init__(self) -> None:
        self.calls = 0

    def enter(self, now: float) -> None:
        """One more."""
        self.calls += 1

    def exit(self, token: object, now: float, exc: BaseException | None) -> None:
        """It need not know."""


class WatchedBulkhead(Bulkhead):
    """Counts the places that came back from calls that were cancelled as they were handed them."""

    passed_on = 0

    def _give_back(self, cost: int, now: float) -> None:
        self.passed_on += 1
        super()._give_back(cost, now)


class Policies:
    """One of each, for the whole soak, so that what is lost stays lost."""

    def __init__(self) -> None:
        self.bulkhead = WatchedBulkhead("soak", max_concurrent=PLACES, max_queued=50, max_wait=0.03, aging=0.01)
        self.limiter = RateLimiter("soak", rate=1500, burst=BURST, max_wait=0.01)
        self.breaker = CircuitBreaker(
            "soak", consecutive_failures=3, reset_timeout=0.005, probes=PROBES, success_threshold=PROBES
        )
        self.passed = Passed()

    def rows(self) -> list[Pipeline]:
        """The three in every order and at several costs; who counts the limiter's calls stands just inside it."""
        found = []
        for cost, order in itertools.product((1, 2, 5), itertools.permutations(["bulkhead", "limiter", "breaker"])):
            members: list[Any] = []
            for name in order:
                members.append(self.bulkhead.costing(cost) if name == "bulkhead" else getattr(self, name))
                if name == "limiter":
                    members.append(self.passed)
            found.append(Pipeline(*members))
        return found

    async def check(self) -> None:
        """Everything is back, and can be had once more and not once too often."""
        require("places", self.bulkhead.snapshot().active, 0)
        require("calls in the bulkhead's queue", self.bulkhead.snapshot().waiting, 0)
        require("calls in the limiter's queue", self.limiter.snapshot().waiting, 0)
        require("turns of the limiter", self.limiter.snapshot().admitted, self.passed.calls)
        require("probes", self.breaker.snapshot().probes, 0)
        await asyncio.sleep(1.0)
        require("places to take", len(taken(self.bulkhead)), PLACES)
        turns = len(taken(self.limiter))
        require("turns to take", turns, BURST)
        self.passed.calls += turns
        if self.breaker.state is not State.CLOSED:
            require("probes to take", len(taken(self.breaker)), PROBES)
            require("states", self.breaker.state, State.CLOSED)
        await asyncio.sleep(1.0)


def require(what: str, found: object, expected: object) -> None:
    """Stop where the books do not balance."""
    if found != expected:
        raise LostPermitError(f"{what}: {found} where there must be {expected}")


def taken(policy: Any) -> list[Permit]:
    """As many permits as there are to have, each used well in the end."""
    permits: list[Permit] = []
    try:
        while len(permits) < 1000:
            permits.append(policy.admit())
    except Rejected:
        pass
    for permit in permits:
        permit.success()
    return permits


def uses(row: Pipeline) -> list[Use]:
    """A function, a stream and a block behind `row`. Each notes in `where` how far it came."""

    @row
    async def call(where: Counter[str], dice: Dice) -> None:
        where["running"] = 1
        await asyncio.sleep(dice.ms(3))
        if dice.random() < dice.failures:
            raise ConnectionError

    @row
    async def stream(where: Counter[str], dice: Dice) -> AsyncIterator[int]:
        where["running"] = 1
        for number in range(2):
            await asyncio.sleep(dice.ms(2))
            yield number

    async def consume(where: Counter[str], dice: Dice) -> None:
        items = stream(where, dice)
        try:
            async for _ in items:
                await asyncio.sleep(dice.ms(2))
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    async def block(where: Counter[str], dice: Dice) -> None:
        async with row.scope():
            where["running"] = 1
            await asyncio.sleep(dice.ms(3))

    return [call, consume] if any(hasattr(member, "guard_for") for member in row.policies) else [call, consume, block]


async def client(use: Use, dice: Dice, tally: Counter[str]) -> None:
    """One call, and what became of it."""
    where: Counter[str] = Counter()
    try:
        await asyncio.sleep(dice.ms(10))
        where["asking"] = 1
        with priority(dice.choice(list(Priority))):
            await use(where, dice)
    except asyncio.CancelledError:
        tally["cancelled running" if where["running"] else "cancelled waiting" if where["asking"] else "too early"] += 1
        raise
    except Rejected as error:
        tally[type(error).__name__] += 1
    except ConnectionError:
        tally["failed"] += 1
    else:
        tally["succeeded"] += 1


def cancelled(tally: Counter[str]) -> int:
    """Calls cancelled after they asked for a permit."""
    return tally["cancelled running"] + tally["cancelled waiting"]


async def soak(cancellations: int, seed: int = 0) -> Counter[str]:
    """Cancel at least so many calls; what became of all. Raises `LostPermitError`."""
    dice = Dice(seed)
    policies, tally = Policies(), Counter[str]()
    ways = [use for row in policies.rows() for use in uses(row)]
    loop = asyncio.get_running_loop()
    while cancelled(tally) < cancellations:
        dice.failures, patience = dice.choice((0.0, 0.2, 0.8)), dice.choice((15, 30, 60))
        tasks = [loop.create_task(client(dice.choice(ways), dice, tally)) for _ in range(CROWD)]
        for task in tasks:
            if dice.random() < 0.9:
                loop.call_later(dice.ms(patience), task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        require("tasks", len(asyncio.all_tasks()), 1)
        await policies.check()
        tally["rounds"] += 1
    tally["cancelled as it was handed a place"] = policies.bulkhead.passed_on
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cancellations", type=int, default=1_000_000, metavar="N", help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="other seeds take other paths")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here")
    parser.add_argument("--peers", action="store_true", help="taken like any benchmark does; there are none")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        tally = run(soak(options.cancellations, options.seed))
    except LostPermitError as loss:
        raise SystemExit(f"lost: {loss} (seed {options.seed})") from loss
    figures = {"cancellations": float(cancelled(tally)), "lost": 0.0}
    figures |= {name: float(count) for name, count in sorted(tally.items())}
    figures["seconds"] = round(time.perf_counter() - start, 1)
    from _harness import print_figures, write_results

    print_figures(f"soak: no permit lost (seed {options.seed})", figures)
    if options.json:
        write_results(options.json, figures, {})


if __name__ == "__main__":
    main()
