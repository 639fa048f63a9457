"""From tables to policies and pipelines: everything is checked, and nothing is half-built."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from seawall.configuration.errors import ConfigurationError, known, near, shown, table
from seawall.configuration.ladders import Ladders
from seawall.core.decorate import Policy
from seawall.core.pipeline import Pipeline
from seawall.core.policy import PolicyBase
from seawall.policies.adaptive_bulkhead import AdaptiveBulkhead
from seawall.policies.bulkhead import Bulkhead
from seawall.policies.cache import Cache
from seawall.policies.chaos import Chaos
from seawall.policies.circuit_breaker import CircuitBreaker
from seawall.policies.deadline import Deadline
from seawall.policies.fallback import Fallback
from seawall.policies.hedge import Hedge
from seawall.policies.keyed import Keyed, KeyedAround
from seawall.policies.load_shedder import LoadShedder
from seawall.policies.rate_limiter import KeyedRateLimiter, RateLimiter
from seawall.policies.retry import Retry
from seawall.policies.retry_budget import RetryBudget
from seawall.policies.timeout import Timeout
from seawall.slo.brownout import BrownOut
from seawall.slo.objective import SLO

TYPES: dict[str, Callable[..., PolicyBase]] = {
    "adaptive_bulkhead": AdaptiveBulkhead,
    "breaker": CircuitBreaker,
    "brownout": BrownOut,
    "bulkhead": Bulkhead,
    "cache": Cache,
    "chaos": Chaos,
    "deadline": Deadline,
    "fallback": Fallback,
    "hedge": Hedge,
    "keyed": Keyed,
    "keyed_around": KeyedAround,
    "keyed_rate_limiter": KeyedRateLimiter,
    "load_shedder": LoadShedder,
    "rate_limiter": RateLimiter,
    "retry": Retry,
    "retry_budget": RetryBudget,
    "slo": SLO,
    "timeout": Timeout,
}
Names = Mapping[str, object]
Parts = dict[str, tuple[PolicyBase, dict[str, object]]]  # by path: each policy with the settings it was given
_EXCEPTIONS = frozenset({"drops", "ignore", "on"})  # settings that hold exception classes


@dataclass
class Built:
    """What a configuration comes to. `shared` are the entries of the table `policies`, by name."""

    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    shared: dict[str, PolicyBase] = field(default_factory=dict)
    ladders: Ladders = field(default_factory=Ladders)


def build(configuration: Mapping[str, object], names: Names, live: Built | None = None) -> Built:
    """All of a configuration. Of one that is to take the place of `live`, what refers to a policy gets the live one."""
    known("configuration", configuration, {"policies", "pipelines"}, "a table")
    builder = _Builder(table("policies", configuration.get("policies", {})), names, live)
    for name in builder.tables:
        builder.share(name)
    for name, one in table("pipelines", configuration.get("pipelines", {})).items():
        builder.join(name, one)
    return builder.built


class _Builder:
    def __init__(self, tables: Mapping[str, object], names: Names, live: Built | None) -> None:
        self.tables = tables
        self.names = names
        self.live = live
        self.built = Built(ladders=Ladders.of(tables, live.ladders if live else None))
        self._begun: list[str] = []

    def share(self, name: str) -> PolicyBase:
        """The entry `name` of the table `policies`, and first what it refers to."""
        path = f"policies.{name}"
        if name in self._begun:
            raise ConfigurationError(path, f"refers to itself: {' -> '.join([*self._begun, name])}")
        if name not in self.built.shared:
            self._begun.append(name)
            self.built.parts[path] = self._policy(path, name, self.tables[name], shared=name)
            self.built.shared[name] = self.built.parts[path][0]
            self._begun.pop()
        return self.built.shared[name]

    def refer(self, path: str, name: object, kind: str | None = None) -> PolicyBase:
        """The policy that an entry's name stands for; of that type."""
        if not isinstance(name, str) or name not in self.tables:
            called = name if isinstance(name, str) else shown(name)
            raise ConfigurationError(path, f"there is no policies.{called}{near(name, self.tables)}")
        fresh = self.share(name)
        if kind is not None and type(fresh) is not TYPES[kind]:
            raise ConfigurationError(path, f"policies.{name} must be of type {kind}, got {fresh!r}")
        return self.live.shared.get(name, fresh) if self.live else fresh

    def join(self, name: str, value: object) -> None:
        """The pipeline `name`."""
        path = f"pipelines.{name}"
        row: list[Policy] = []
        for index, entry in enumerate(_policies(path, value)):
            here = f"{path}.policies[{index}]"
            if isinstance(entry, str):
                if entry not in self.built.shared:
                    raise ConfigurationError(here, f"there is no policies.{entry}{near(entry, self.built.shared)}")
                row.append(self.built.shared[entry])  # type: ignore[arg-type]
            else:
                self.built.parts[here] = self._policy(here, name, entry)
                row.append(self.built.parts[here][0])  # type: ignore[arg-type]
        try:
            self.built.pipelines[name] = Pipeline(*row, name=name)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(path, str(error)) from error

    def _policy(
        self, path: str, name: str, value: object, shared: str | None = None
    ) -> tuple[PolicyBase, dict[str, object]]:
        entries = dict(table(path, value))
        kind = entries.pop("type", None)
        if not isinstance(kind, str) or kind not in TYPES:
            raise ConfigurationError(
                f"{path}.type", f"must be one of {', '.join(sorted(TYPES))}, got {shown(kind)}{near(kind, TYPES)}"
            )
        make = TYPES[kind]
        signature = inspect.signature(make).parameters
        settings: dict[str, object] = {}
        for setting, given in entries.items():
            if setting not in signature:
                raise ConfigurationError(f"{path}.{setting}", f"{kind} has no such setting{near(setting, signature)}")
            settings[setting] = self._value(f"{path}.{setting}", setting, given, shared)
        if kind == "load_shedder" and shared is not None:
            self.built.ladders.press(shared, settings)
        title = settings.pop("name", name)
        for setting, parameter in list(signature.items())[1:]:
            if parameter.default is inspect.Parameter.empty and setting not in settings:
                raise ConfigurationError(f"{path}.{setting}", f"is missing; {kind} needs it")
        try:
            return make(title, **settings), settings
        except (TypeError, ValueError) as error:
            first = str(error).partition(" ")[0]  # our messages begin with the setting
            culprit = first if first in settings else None
            raise ConfigurationError(path if culprit is None else f"{path}.{culprit}", str(error)) from error

    def _value(self, path: str, setting: str, value: object, shared: str | None) -> object:
        if isinstance(value, str) and value.startswith("$"):
            return self.named(path, value)
        if setting in _EXCEPTIONS:
            entries = value if isinstance(value, list) else [value]
            return tuple(self._exception(path, entry) for entry in entries)
        if setting == "budget" and isinstance(value, str):
            return self.refer(path, value, "retry_budget")
        if setting == "actions" and isinstance(value, list):
            return [self._action(f"{path}[{index}]", one) for index, one in enumerate(value)]
        if setting == "ladder":
            return self.built.ladders.steps(path, shared, value, self)
        return value

    def _action(self, path: str, value: object) -> object:
        if isinstance(value, str) and value.startswith("$"):
            return self.named(path, value)
        return self.refer(path, value, "brownout")

    def named(self, path: str, value: str) -> object:
        """What the app gave for `"$name"`."""
        if value[1:] not in self.names:
            raise ConfigurationError(path, f"the app gave no name {value[1:]!r}{near(value[1:], self.names)}")
        return self.names[value[1:]]

    def _exception(self, path: str, name: object) -> type[BaseException]:
        found = self.names.get(name, getattr(builtins, name, None)) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ConfigurationError(
                path, f"must name exceptions of Python's own or of the app's names, got {shown(name)}"
            )
        return found


def _policies(path: str, value: object) -> list[object]:
    known(path, value, {"policies"}, "a table with a list `policies`")
    entries = table(path, value).get("policies")
    if not isinstance(entries, list):
        raise ConfigurationError(f"{path}.policies", f"must be a list of policies, got {shown(entries)}")
    return entries
