"""The router: one ASGI application that speaks OpenAI's API for the engines and embedders it is given.

    app.mount("/", OpenAIRouter(engine))

Pure ASGI, so it is mounted in any framework, under any prefix, and needs no lifespan of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from seawall.core import checks
from seawall.core.ambient import Priority
from seawall.core.decorate import Policy
from seawall.core.errors import Rejected
from seawall.core.pipeline import Pipeline
from seawall.inference.errors import InvalidSettingError, PromptError
from seawall.policies.bulkhead import Bulkhead
from seawall.policies.timeout import Timeout
from seawall.web.answers import Answers, Mapped
from seawall.web.asgi import Receive, Scope, SeawallMiddleware, Send
from seawall.web.caught import KEY
from seawall.web.openai import requests
from seawall.web.openai.body import Limits, parsed, read
from seawall.web.openai.embedding import Embeds, embed
from seawall.web.openai.errors import OpenAIAnswers, RequestError
from seawall.web.openai.generating import Defaults, generate
from seawall.web.openai.keys import Keys
from seawall.web.openai.metrics import ServedCollector
from seawall.web.openai.outlet import Outlet, send_json, to_json
from seawall.web.openai.replies import Array
from seawall.web.openai.schema import document

if TYPE_CHECKING:
    from seawall.engine import Serving

_log = logging.getLogger("seawall.web")
_OURS = "seawall.openai"  # in the scope of a request: what is known of it
_POSTS: Mapping[str, Callable[[bytes], Any]] = {  # by path, what makes the request of a body
    "/chat/completions": lambda body: requests.chat(parsed(body)),
    "/completions": lambda body: requests.completion(parsed(body)),
    "/embeddings": lambda body: requests.embedding(parsed(body)),
}
_GETS = frozenset({"/models", "/openapi.json"})
_CLIENTS = (RequestError, PromptError, InvalidSettingError)  # errors that the client made
_INLINE = 1 << 14  # bytes of a body that are understood on the event loop: milliseconds at worst


class _Unanswered(Answers):
    """Leaves every error to the router, which says it in another shape."""

    def answer_to(self, error: BaseException) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A request that may be served."""

    understand: Callable[[bytes], Any]
    tenant: str
    outlet: Outlet


class OpenAIRouter:
    """OpenAI's API over engines and embedders: models, chats, completions and embeddings.

    Errors, refusals and timeouts come in the shape that OpenAI's clients read, with the headers that tell them
    whether and when to try again. An unknown parameter is refused by name. A client that leaves, or waits no longer,
    ends its answer within one step. Texts of requests and answers are never logged.

    Args:
        engine: an engine, or engines by the name that requests call their model. They are opened by whoever owns
            them, or by `lifespan`.
        embedder: the same for embeddings.
        api_keys: keys that a request must have one of, as `Authorization: Bearer KEY`; or tenants by their key.
            None lets everybody in.
        tenant: tells whose request it is, by its scope and what it says in `user`; engines share fairly among tenants
            and keep what they cache apart. None for the tenant of its key.
        policies: guards around every request for an answer, outermost first, as in `SeawallMiddleware`.
        timeout: seconds such a request may take; a client that waits less gets less.
        trust_deadlines: whether to look at the deadline headers of clients. They can only shorten.
        priority: tells the priority of a request by its scope.
        embedding_policies: guards around each run of an embedder; None for a bulkhead (4 at once, 32 queued for up to
            30 s) and a timeout of 60 s.
        answers: other answers to errors than the usual, by class of exception.
        temperature: of requests that name none; 1 is what OpenAI's documentation says.
        max_tokens: the most that a request may ask for, and what a chat gets that names nothing; None for what the
            model's context leaves.
        limits: what one request may cost.
        name: labels the spans of requests and the deadline's metrics.

    Attributes:
        collector: for a registry of Prometheus, what was served under the names that vLLM gives it.
        draining: whether answers ask their clients to connect elsewhere, as before the process ends.

    Examples:
        >>> from seawall import Engine
        >>> router = OpenAIRouter(Engine.load("smollm2-135m"), api_keys={"secret": "a customer"})
        >>> router.models
        ('smollm2-135m',)
    """

    def __init__(
        self,
        engine: Serving | Mapping[str, Serving] | None = None,
        *,
        embedder: Embeds | Mapping[str, Embeds] | None = None,
        api_keys: Iterable[str] | Mapping[str, str] | None = None,
        tenant: Callable[[Scope, str | None], str] | None = None,
        policies: Iterable[Policy] = (),
        timeout: float | None = None,
        trust_deadlines: bool = True,
        priority: Callable[[Scope], Priority] | None = None,
        embedding_policies: Iterable[Policy] | None = None,
        answers: Mapping[type[Exception], Mapped] | None = None,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        name: str = "openai",
    ) -> None:
        self.limits = limits
        self.draining = False
        self._engines = _named("engine", engine, lambda one: one.name)
        self._embedders = _named("embedder", embedder, lambda one: one.name)
        if both := self._engines.keys() & self._embedders.keys():
            raise ValueError(f"engine and embedder must have different names, both have {min(both)!r}")
        if not self.models:
            raise ValueError("give an engine, an embedder, or both")
        self._keys = None if api_keys is None else Keys(api_keys)
        self._tenant = None if tenant is None else checks.function("tenant", tenant)
        self._answers = OpenAIAnswers(answers)
        self.collector = ServedCollector(self._engines)
        self._defaults = Defaults(
            temperature=checks.positive("temperature", temperature) if temperature else 0.0,
            max_tokens=None if max_tokens is None else checks.count("max_tokens", max_tokens),
            choices=limits.choices,
        )
        self._guarded = SeawallMiddleware(
            self._work,
            policies=policies,
            timeout=timeout,
            trust_deadlines=trust_deadlines,
            priority=priority,
            answers=_Unanswered(),
            name=name,
        )
        guards = _embedding_policies(name) if embedding_policies is None else tuple(embedding_policies)
        self._run_embedder = Pipeline(*guards, name=f"{name}.embeddings")(_embedded)
        self._begun = int(time.time())
        self._document = to_json(
            document(
                generating=self._engines,
                embedding=self._embedders,
                version=metadata.version("seawall"),
                authenticated=self._keys is not None,
            )
        )

    @property
    def models(self) -> tuple[str, ...]:
        """The names that requests call their model."""
        return (*self._engines, *self._embedders)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Opens the engines, and closes them: the lifespan of the application that the router is mounted in."""
        async with AsyncExitStack() as stack:
            for engine in dict.fromkeys(self._engines.values()):
                if isinstance(engine, AbstractAsyncContextManager):
                    await stack.enter_async_context(engine)
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "this is spoken over HTTP"})
            return
        outlet = Outlet(scope, send, patience=self.limits.write_seconds, closing=self.draining)
        with outlet.scope:
            try:
                await self._route(scope, receive, outlet)
            except Exception as error:
                await self._fail(error, outlet, scope)

    async def _route(self, scope: Scope, receive: Receive, outlet: Outlet) -> None:
        path, method = _path(scope), scope["method"]
        understand = _POSTS.get(path)
        if understand is None and path not in _GETS and not path.startswith("/models/"):
            shown = scope["path"][:128]
            raise RequestError(f"there is nothing at {shown!r}", code="unknown_url", status=404)
        allowed = ("GET", "HEAD") if understand is None else ("POST",)
        if method not in allowed:
            raise RequestError(
                f"{path} takes {allowed[0]}, not {method[:16]}",
                code="method_not_allowed",
                status=405,
                headers={"allow": ", ".join(allowed)},
            )
        tenant = "" if self._keys is None else self._keys.tenant(scope)
        if path == "/openapi.json":
            await send_json(outlet.send, 200, self._document)
        elif understand is None:
            await send_json(outlet.send, 200, to_json(self._described(path)))
        else:
            await self._guarded({**scope, _OURS: _Known(understand, tenant, outlet)}, receive, outlet.send)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for an answer, inside the policies. What the client did wrong, these need not hear of."""
        known: _Known = scope[_OURS]
        try:
            body = await read(scope, receive, self.limits, gone=known.outlet.give_up)
            if len(body) <= _INLINE:
                asked = known.understand(body)
            else:
                asked = await anyio.to_thread.run_sync(known.understand, body)
            if isinstance(asked, requests.Generation):
                await self._generate(asked, scope, send)
            else:
                await self._embed(asked, send)
        except _CLIENTS as error:
            if known.outlet.status:
                raise
            await self._refuse(error, send)

    async def _generate(self, asked: requests.Generation, scope: Scope, send: Send) -> None:
        engine = self._engines.get(asked.model)
        if engine is None:
            raise self._unknown(asked.model, self._engines)
        tenant = self._tenant_of(scope, asked.user)
        wanted = next((value for name, value in scope["headers"] if name == b"endpoint-load-metrics-format"), None)
        if wanted is not None:
            scope[_OURS].outlet.load = lambda: self.collector.load(asked.model, wanted.decode("latin-1"))
        with self.collector.watch(asked.model) as watch:
            await generate(asked, engine, self._defaults, tenant, watch, send)

    async def _embed(self, asked: requests.Embedding, send: Send) -> None:
        embedder = self._embedders.get(asked.model)
        if embedder is None:
            raise self._unknown(asked.model, self._embedders)
        await embed(asked, embedder, self._run_embedder, send)

    def _tenant_of(self, scope: Scope, user: str | None) -> str:
        known: _Known = scope[_OURS]
        return known.tenant if self._tenant is None else self._tenant(scope, user)

    def _described(self, path: str) -> dict[str, Any]:
        """The models, or one of them."""
        if path == "/models":
            return {"object": "list", "data": [self._model(name) for name in self.models]}
        name = path.removeprefix("/models/")
        if name not in self.models:
            raise self._unknown(name, self.models)
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._begun, "owned_by": "seawall"}

    def _unknown(self, name: str, known: Iterable[str]) -> RequestError:
        can = ", ".join(known) or "none"
        shown = name[:128].encode("ascii", "backslashreplace").decode()
        elsewhere = " here" if name in self.models else ""
        return RequestError(
            f"there is no model {shown!r}{elsewhere}; there is {can}", param="model", code="model_not_found", status=404
        )

    async def _refuse(self, error: Exception, send: Send) -> None:
        answer = self._answers.answer_to(error)
        assert answer is not None
        await send_json(send, answer.status, answer.problem(), self._answers.headers(answer))

    async def _fail(self, error: Exception, outlet: Outlet, scope: Scope) -> None:
        """Tell the client of an error in whatever way is left, and others of what is not the client's fault."""
        around = scope.get(KEY)
        if around is not None and not isinstance(error, _CLIENTS):
            around.error = error  # to its policies a refusal is no failure, and a stream that broke off is one
        answer = self._answers.answer_to(error)
        if answer is None or outlet.over or (outlet.status and not outlet.streaming):
            raise error
        if answer.status >= 500 and not isinstance(error, (Rejected, TimeoutError)):
            trace = error if answer.status == 500 else None
            _log.error("request %s: %s", outlet.request_id.decode(), type(error).__name__, exc_info=trace)
        if outlet.streaming:
            await outlet.fail(answer.error())
        else:
            await self._refuse(error, outlet.send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """The server's own lifespan, where the router is the whole application."""
        await receive()
        begun = False
        try:
            async with self.lifespan():
                begun = True
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            kind = "shutdown" if begun else "startup"
            await send({"type": f"lifespan.{kind}.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.shutdown.complete"})


def _named(kind: str, given: Any, name_of: Callable[[Any], str]) -> dict[str, Any]:
    if given is None:
        return {}
    named = dict(given) if isinstance(given, Mapping) else {name_of(given): given}
    for name in named:
        checks.name(kind, name)
    return named


def _path(scope: Scope) -> str:
    """The path below where the router is mounted, without /v1."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    if path.startswith("/v1/"):
        path = path[3:]
    return path.rstrip("/") or "/"


def _embedding_policies(name: str) -> tuple[Policy, ...]:
    return (
        Bulkhead(f"{name}.embeddings", max_concurrent=4, max_queued=32, max_wait=30.0),
        Timeout(f"{name}.embeddings", 60.0),
    )


async def _embedded(embedder: Embeds, tokens: Sequence[Sequence[int]]) -> Array:
    return await embedder.embed(tokens)
