"""A second model, loaded and warm, that answers where the first one can't: through a policy, and never in silence."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from seawall.core.errors import Rejected
from seawall.core.events import Listener
from seawall.engine.errors import EngineClosedError
from seawall.engine.losing import SupervisedClosedError
from seawall.engine.pair import Pair
from seawall.engine.rehearsal import checked_model
from seawall.engine.standing_in import Closes
from seawall.engine.swapping import DeploymentClosedError
from seawall.inference.errors import (
    BackendClosedError,
    BatchQueueFullError,
    DecoderClosedError,
    ForkedBackendError,
    InvalidInputError,
    InvalidSettingError,
    RuntimeFailure,
)
from seawall.policies.fallback import Fallback

T = TypeVar("T")
M = TypeVar("M", bound=Closes)

_asked: ContextVar[Callable[[Any], Any]] = ContextVar("seawall_failover")  # by the call that fails over

ON = (
    RuntimeFailure,
    Rejected,
    BackendClosedError,
    BatchQueueFullError,
    DecoderClosedError,
    DeploymentClosedError,
    EngineClosedError,
    ForkedBackendError,
    SupervisedClosedError,
)


def fails_over(error: Exception) -> bool:
    """Whether another model may do better: not where the input is wrong, and not where the time is over."""
    return isinstance(error, ON) and not isinstance(error, InvalidInputError)


class Failover(Pair[M], Generic[M]):
    """Asks the primary model, and where that fails or refuses the spare: say a GPU, and the CPU in fewer bits.

    The spare is a whole model of its own, loaded and warm from the start, so failing over takes no load time. Each
    time is a `FallbackUsed` event whose `step` names who answered; where the spare fails too, the caller gets the
    primary's own error, with a note. Streams fail over until their first item has come. It takes both models over,
    and closes them.

    A primary that is down should say so at once: make it a `Supervised`, which also brings it back.

    Args:
        name: labels the events and metrics of the `Fallback` that it is built over.
        primary: asked first.
        spare: asked where that fails.
        spare_name: what the spare is called in events.
        on: which errors to fail over on, as a function of the error; `fails_over` unless told.
        listeners: called with its `FallbackUsed` and `FallbackFailed` events.

    Attributes:
        fallback: the policy: its `snapshot()` counts who answered.

    ```python
    import numpy as np
    from onnx.parser import parse_model

    from seawall import listen
    from seawall.engine import Failover
    from seawall.inference import Backend

    text = '<ir_version: 10, opset_import: ["" : 21]> double (float[n] x) => (float[n] y) { y = Add(x, x) }'
    model = parse_model(text).SerializeToString()

    stop = listen(lambda event: print(event.step, "answered:", event.error))
    with Failover("scores", Backend.load(model), Backend.load(model), spare_name="cpu int8") as scores:
        scores.primary.close()  # it could be a GPU that fell off the bus
        print(scores.run_sync({"x": np.array([1, 2], np.float32)}))
    stop()
    #> scores.cpu int8 answered: backend 'model' is closed: load a new one
    #> {'y': array([2., 4.], dtype=float32)}
    ```
    """

    kind = "failover"

    def __init__(
        self,
        name: str,
        primary: M,
        spare: M,
        *,
        spare_name: str = "spare",
        on: Callable[[Exception], bool] = fails_over,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__(name, listeners)
        if primary is spare:
            raise InvalidSettingError(f"spare must be a model of its own, and is the primary: {spare!r}")
        self.primary = checked_model("primary", primary)
        self.spare = checked_model("spare", spare)
        self.fallback = Fallback(name, _step(name, spare, spare_name), on=on, listeners=listeners)

    @property
    def model(self) -> M:
        """The primary: to look at."""
        return self.primary

    def look(self, at: Callable[[M], T]) -> T:
        """What the primary says of itself, or the spare where the primary can't; no call, and no event."""
        try:
            return at(self.primary)
        except Exception as error:
            if not fails_over(error):
                raise
        return at(self.spare)

    @property
    def both(self) -> tuple[M, M]:
        """The primary and the spare."""
        return self.primary, self.spare

    async def call(self, ask: Callable[[M], Awaitable[T]]) -> T:
        """What the primary answers to `ask`, or the spare."""
        token = _asked.set(ask)
        try:
            return await self.fallback.around(lambda: ask(self.primary))
        finally:
            _asked.reset(token)

    def call_sync(self, ask: Callable[[M], T]) -> T:
        """The same for a plain thread."""
        token = _asked.set(ask)
        try:
            return self.fallback.around_sync(lambda: ask(self.primary))
        finally:
            _asked.reset(token)

    async def iterate(self, ask: Callable[[M], AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
        """The same for a stream, until its first item has come."""
        stream, items = await self.call(lambda model: _begun(ask(model)))
        async with aclosing(stream):
            for item in items:
                yield item
            async for item in stream:
                yield item

    def counters(self) -> dict[str, int]:
        """Those of its `fallback`."""
        return self.fallback.counters()

    def gauges(self) -> dict[str, float]:
        """Nothing goes up and down."""
        return {}


def _step(name: str, spare: Closes, called: str) -> Callable[[object], object]:
    """What a Fallback asks: the spare, the same that was asked of the primary."""

    def step(replaced: object) -> object:
        return _asked.get()(spare)

    step.__module__, step.__qualname__ = name, called  # who answered, in events
    return step


async def _begun(stream: AsyncGenerator[T, None]) -> tuple[AsyncGenerator[T, None], list[T]]:
    """A stream once its first item has come, with that; or the end of it."""
    async for item in stream:
        return stream, [item]
    return stream, []
