"""What a router serves, under the names that vLLM gives it, so that dashboards, autoscalers and gateways know them.

Requests are counted as they pass; what only the engine knows is read from its snapshot when somebody scrapes.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from seawall.core.watching import Histogram
from seawall.engine.metering import EngineSnapshot

if TYPE_CHECKING:
    from prometheus_client import Metric

    from seawall.engine import Piece

# Seconds; the bounds that vLLM has.
_FINE = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)

_LOAD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")

Kind = Literal["counter", "gauge", "histogram"]
METRICS: Mapping[str, tuple[Kind, str]] = {
    "vllm:num_requests_running": ("gauge", "Answers that are being written."),
    "vllm:num_requests_waiting": ("gauge", "Answers that wait for their turn."),
    "vllm:kv_cache_usage_perc": ("gauge", "Share of the key/value cache in use; 1 is all of it."),
    "vllm:prefix_cache_queries": ("counter", "Tokens of prompts looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("counter", "Tokens of prompts found there."),
    "vllm:prompt_tokens": ("counter", "Tokens of prompts."),
    "vllm:generation_tokens": ("counter", "Tokens of answers."),
    "vllm:spec_decode_num_draft_tokens": ("counter", "Tokens drafted."),
    "vllm:spec_decode_num_accepted_tokens": ("counter", "Drafted tokens that stand in answers."),
    "vllm:request_success": ("counter", "Answers that came to their end, by why they ended."),
    "vllm:time_to_first_token_seconds": ("histogram", "Seconds from a request to its first token."),
    "vllm:inter_token_latency_seconds": ("histogram", "Seconds from one piece of an answer to its next."),
    "vllm:e2e_request_latency_seconds": ("histogram", "Seconds from a request to its end, of whole answers."),
}


class Served:
    """What one model served. Changed and read under a lock: a scrape may come from another thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting = 0
        self.running = 0
        self.tokens: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.first = Histogram((*_FINE, 160.0, 640.0, 2560.0))
        self.between = Histogram(_BETWEEN)
        self.whole = Histogram((*_WHOLE, 960.0, 1920.0, 7680.0))


class Watch:
    """One request on its way; use it in a `with` block."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._began = time.monotonic()
        self._last: dict[int, float] = {}  # by answer, when its last piece came

    def __enter__(self) -> Self:
        with self._served.lock:
            self._served.waiting += 1
        return self

    def piece(self, index: int, piece: Piece) -> None:
        """A piece of answer `index` came."""
        now, served = time.monotonic(), self._served
        with served.lock:
            if not self._last:
                served.waiting -= 1
                served.running += 1
                served.first.add(now - self._began)
            if index in self._last:
                served.between.add(now - self._last[index])
            self._last[index] = now
            if piece.finish_reason is not None:
                served.finished[piece.finish_reason] += 1
            if (usage := piece.usage) is not None:
                served.tokens["prompt"] += usage.prompt_tokens
                served.tokens["generation"] += usage.completion_tokens
                served.tokens["drafted"] += usage.drafted_tokens
                served.tokens["accepted"] += usage.accepted_tokens

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._served.lock:
            if self._last:
                self._served.running -= 1
            else:
                self._served.waiting -= 1
            if kind is None:
                self._served.whole.add(time.monotonic() - self._began)


class ServedCollector:
    """Tells a registry of Prometheus what a router serves; `OpenAIRouter.collector` is one."""

    def __init__(self, engines: Mapping[str, object]) -> None:
        self._engines = engines
        self._served = {name: Served() for name in engines}

    def watch(self, model: str) -> Watch:
        """A request to that model begins."""
        return Watch(self._served[model])

    def describe(self) -> Iterable[Metric]:
        """Every metric there may be, so that a registry refuses a second one of them."""
        from seawall.telemetry.prometheus import family

        return [family(name, kind, text, {}) for name, (kind, text) in METRICS.items()]

    def collect(self) -> Iterable[Metric]:
        """Every metric, with a sample for each model."""
        from seawall.telemetry.prometheus import family

        rows: dict[str, dict[Any, float | Histogram]] = {name: {} for name in METRICS}
        for model, served in self._served.items():
            label = ("model_name", model)
            for name, value in self._numbers(model, served).items():
                rows[f"vllm:{name}"][label,] = value
            for reason in ("stop", "length"):
                rows["vllm:request_success"][label, ("finished_reason", reason)] = served.finished[reason]
        return [family(name, kind, text, rows[name]) for name, (kind, text) in METRICS.items() if rows[name]]

    def load(self, model: str, form: str) -> str | None:
        """How busy a model is, as Open Request Cost Aggregation (ORCA) puts it into a header: as TEXT or JSON."""
        named = {name: value for name, value in self._gauges(model, self._served[model]).items() if name in _LOAD}
        if form.upper() == "JSON":
            return f"JSON {json.dumps({'named_metrics': named})}"
        if form.upper() == "TEXT":
            return "TEXT " + ", ".join(f"named_metrics.{name}={value:g}" for name, value in named.items())
        return None

    def _numbers(self, model: str, served: Served) -> dict[str, float | Histogram]:
        numbers: dict[str, float | Histogram] = {**self._gauges(model, served)}
        with served.lock:
            return numbers | {
                "prompt_tokens": served.tokens["prompt"],
                "generation_tokens": served.tokens["generation"],
                "spec_decode_num_draft_tokens": served.tokens["drafted"],
                "spec_decode_num_accepted_tokens": served.tokens["accepted"],
                "time_to_first_token_seconds": served.first.copy(),
                "inter_token_latency_seconds": served.between.copy(),
                "e2e_request_latency_seconds": served.whole.copy(),
            }

    def _gauges(self, model: str, served: Served) -> dict[str, float]:
        look = getattr(self._engines[model], "snapshot", None)
        now = None if look is None else look()
        if not isinstance(now, EngineSnapshot):  # what stands in for engines has snapshots of its own
            return {"num_requests_running": served.running, "num_requests_waiting": served.waiting}
        return {
            "num_requests_running": now.running,
            "num_requests_waiting": now.waiting,
            "kv_cache_usage_perc": now.cache_used_bytes / now.cache_bytes if now.cache_bytes else 0.0,
            "prefix_cache_queries": now.prefix_queries,
            "prefix_cache_hits": now.prefix_hits,
        }
