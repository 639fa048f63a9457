"""A model whose answers get shorter while its error budget burns, and whole again when it does not.

    python examples/brownout.py

Needs the bundled model: `seawall models add smollm2-135m`. The window is ten minutes, so that the look backs of the
quickest alert are a second and less. From the third second to the tenth the dictionary that some calls need is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from seawall import SLO, Engine
from seawall.engine import Shorter
from seawall.slo.brownout import BrownedOutError, BrownOut, BrownOutStepped, Refuse

SECONDS = 40.0
dimmer = BrownOut("tutor", [Shorter(12), Shorter(4), Refuse()], step_up=2.0, hold=4.0, minimum_calls=5)
tutor = SLO("tutor", target=0.99, window=600, actions=[dimmer])
began = time.monotonic()  # anew once the model is loaded


def tell(event: object) -> None:
    """Print each step."""
    if isinstance(event, BrownOutStepped):
        print(f"{time.monotonic() - began:5.1f} s  step {event.before} -> {event.level}: {event.step}", flush=True)


@tutor
async def look_up(word: str) -> str:
    """Ask the dictionary."""
    await asyncio.sleep(0.02)
    if 3 < time.monotonic() - began < 10:
        raise ConnectionError("the dictionary does not answer")
    return f"{word}: a word"


async def main() -> None:
    """Ask for a while, and print how long the answers were at each step."""
    global began
    dimmer.listen(tell)
    async with Engine.load("smollm2-135m", policies=[dimmer], adjust=dimmer.adjust) as engine:
        began = time.monotonic()
        ask = tutor(engine.generate)
        lengths: dict[int, int] = {}

        async def asking() -> None:
            while time.monotonic() - began < SECONDS:
                level = dimmer.level
                try:
                    lengths[level] = len((await ask("Why is the sea salty?", max_tokens=24)).tokens)
                except BrownedOutError:
                    lengths[level] = 0
                    await asyncio.sleep(0.1)

        async def looking_up() -> None:
            while time.monotonic() - began < SECONDS:
                with contextlib.suppress(ConnectionError):
                    await look_up("salt")

        await asyncio.gather(asking(), looking_up())
    print("tokens of an answer, by the step that held:", dict(sorted(lengths.items())))
    print(f"error budget left: {tutor.error_budget:.0%}")


if __name__ == "__main__":
    asyncio.run(main())
