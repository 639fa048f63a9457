"""A cheaper model that answers while an error budget burns: a stand-in that is a step of a `BrownOut` too."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Generic, TypeVar

from seawall.core.events import Listener
from seawall.engine.pair import Pair
from seawall.engine.rehearsal import checked_model
from seawall.engine.standing_in import Closes
from seawall.slo.steps import Step

T = TypeVar("T")
M = TypeVar("M", bound=Closes)


class Downgrade(Pair[M], Step, Generic[M]):
    """Asks the usual model, and while the step holds the cheaper one: fewer bits, or a smaller model.

    Each call goes to one of them, to its end, streams included; calls in flight stay where they began. Both are loaded
    all the time, so a step costs no load, and the memory of both. It takes them over, and closes them.

    Args:
        name: labels its metrics.
        usual: asked while nothing burns.
        cheaper: asked while the step holds.
        listeners: it has no events of its own; a `BrownOut` tells its steps.

    ```python
    import numpy as np
    from onnx.parser import parse_model

    from seawall.engine import Downgrade
    from seawall.inference import Backend
    from seawall.slo.brownout import BrownOut, Refuse


    def load(name):
        head = '<ir_version: 10, opset_import: ["" : 21]>'
        text = f"{head} scores (float[n] x) => (float[n] y) {{ y = {name}(x) }}"
        return Backend.load(parse_model(text).SerializeToString())


    with Downgrade("scores", load("Identity"), load("Round")) as scores:
        dimmer = BrownOut("scores", [scores, Refuse()])  # for the `actions` of an SLO
        print(scores.run_sync({"x": np.array([0.4], np.float32)})["y"])
    #> [0.4]
    ```
    """

    kind = "downgrade"

    def __init__(self, name: str, usual: M, cheaper: M, *, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(name, listeners)
        self.usual = checked_model("usual", usual)
        self.cheaper = checked_model("cheaper", cheaper)
        self._holds = False
        self._calls = {"usual": 0, "cheaper": 0}
        self._register()

    def engage(self) -> None:
        """Ask the cheaper model from now on."""
        self._holds = True

    def release(self) -> None:
        """Ask the usual model again."""
        self._holds = False

    @property
    def model(self) -> M:
        """The model that is asked now: to look at."""
        return self.cheaper if self._holds else self.usual

    @property
    def both(self) -> tuple[M, M]:
        """The usual model and the cheaper one."""
        return self.usual, self.cheaper

    def _chosen(self) -> M:
        with self._lock:
            self._calls["cheaper" if self._holds else "usual"] += 1
            return self.model

    async def call(self, ask: Callable[[M], Awaitable[T]]) -> T:
        """What the model that is asked now answers to `ask`."""
        return await ask(self._chosen())

    def call_sync(self, ask: Callable[[M], T]) -> T:
        """The same for a plain thread."""
        return ask(self._chosen())

    async def iterate(self, ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The same for a stream, which the model that began it gives to its end."""
        async with aclosing(ask(self._chosen())) as items:
            async for item in items:
                yield item

    def counters(self) -> dict[str, int]:
        """Calls by the model that was asked."""
        with self._lock:
            return dict(self._calls)

    def gauges(self) -> dict[str, float]:
        """Nothing goes up and down; the ladder says whether the step holds."""
        return {}
