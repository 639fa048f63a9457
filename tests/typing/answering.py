"""What type checkers must see of engines and what answers in their place. Checked, never run."""

from typing import assert_type

from seawall import Engine
from seawall.engine import Completion, Deployment, Failover, ModelInfo, Replicas, Serving


def serve(model: Serving) -> None: ...


async def answers() -> None:
    engine = Engine.load("smollm2-135m")
    serve(engine)
    deployed = Deployment("chat", engine)
    serve(deployed)
    assert_type(deployed.info(), ModelInfo)
    assert_type(await deployed.generate("why", max_tokens=8), Completion)
    serve(Replicas("chat", {"left": engine, "right": engine}))
    serve(Failover("chat", engine, engine))
    engine.stream("why", temprature=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
