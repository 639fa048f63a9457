"""What type checkers must see of what stands in for a model. Checked by mypy --strict and pyright, never run."""

from typing import Any, assert_type

import numpy as np

from seawall.engine import Deployment, Failover, Probation, Shadow, Supervised
from seawall.inference import Backend, Embedder, MicroBatcher

Array = np.ndarray[Any, Any]


def load() -> Backend:
    return Backend.load("scores.onnx")


async def load_later() -> Backend:
    return load()


def alike(old: Backend, new: Backend) -> bool:
    return old.outputs == new.outputs


async def uses(feed: dict[str, Array]) -> None:
    scores = Deployment("scores", load())
    assert_type(await scores.run(feed, deadline=1.0), dict[str, Array])
    assert_type(scores.run_sync(feed), dict[str, Array])
    assert_type(await scores.call(lambda model: model.run(feed)), dict[str, Array])
    assert_type(scores.model, Backend)
    await scores.swap(load_later, gate=alike)
    tested = await scores.swap(
        load,
        self_test=lambda model: model.run_sync(feed),
        shadow=Shadow(lambda old, new: bool(old == new)),
        probation=Probation(minimum_calls=2),
    )
    assert_type(tested, int)
    texts = Deployment("texts", Embedder.load())
    assert_type(await texts.embed(["why", [101, 102]]), Array)
    assert_type(texts.encode("why"), list[int])
    batched = Deployment("batched", MicroBatcher(load()))
    assert_type(await batched.run(feed), dict[str, Array])
    both = Failover("scores", Supervised("gpu", load), scores)
    assert_type(await both.run(feed), dict[str, Array])
    async with Supervised[Backend]("scores", load_later) as supervised:
        assert_type(await supervised.run(feed), dict[str, Array])
    await texts.run(feed)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    await scores.swap(texts.embed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
