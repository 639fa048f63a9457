"""Pipelines from a configuration file: validated as a whole, and changed while in use.

Nothing in a file is ever imported or run: exceptions are Python's own by name, everything else that is code
comes from the app, by the names it gives.
"""

from __future__ import annotations

import builtins
import difflib
import inspect
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from seawall.core import registry
from seawall.core.decorate import Policy
from seawall.core.pipeline import Pipeline
from seawall.core.policy import PolicyBase, apply
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
from seawall.policies.timeout import Timeout
from seawall.slo.objective import SLO

TYPES: dict[str, Callable[..., PolicyBase]] = {
    "adaptive_bulkhead": AdaptiveBulkhead,
    "breaker": CircuitBreaker,
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
    "slo": SLO,
    "timeout": Timeout,
}
_EXCEPTIONS = frozenset({"drops", "ignore", "on"})  # settings that hold exception classes


class ConfigurationError(ValueError):
    """A configuration is wrong. `path` says where: `pipelines.payments.policies[1].failure_rate`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class Pipelines(Mapping[str, Pipeline]):
    """The pipelines of one configuration, by name.

    A configuration has two tables. `pipelines` has a table for each pipeline, whose list `policies` is outermost
    first: each is a table with a `type` and the settings of that policy, or the name of an entry of the table
    `policies`, which several pipelines may share. A setting `"$name"` is what the app gave as `names["name"]`.

    Args:
        configuration: the two tables, as `tomllib` or `json` read them.
        names: what `"$name"` settings and exceptions that are not Python's own stand for.

    Raises:
        ConfigurationError: something is unknown, missing or out of range; says where. Nothing is half-built.

    Examples:
        >>> pipelines = Pipelines({"pipelines": {"pay": {"policies": [
        ...     {"type": "breaker", "failure_rate": 0.3, "on": "ConnectionError"},
        ...     {"type": "timeout", "after": 2.0},
        ... ]}}})
        >>> pipelines["pay"].policies
        (<CircuitBreaker 'pay'>, <Timeout 'pay'>)
    """

    def __init__(self, configuration: Mapping[str, object], names: Mapping[str, object] | None = None) -> None:
        self._names = dict(names or {})
        self._pipelines, self._parts = _build(configuration, self._names)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], names: Mapping[str, object] | None = None) -> Pipelines:
        """The pipelines of a TOML file. OSError if it can't be read."""
        return cls(_read(path), names)

    def __getitem__(self, name: str) -> Pipeline:
        return self._pipelines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pipelines)

    def __len__(self) -> int:
        return len(self._pipelines)

    def update(self, configuration: Mapping[str, object]) -> None:
        """Take over new settings while calls are in flight: all of them or, if anything is wrong, none.

        The pipelines, their policies and the functions they decorate stay, and no call is dropped. So only settings
        may differ: a pipeline or policy that comes, goes or changes its type is an error.

        Raises:
            ConfigurationError: says where; everything stays as it was.
        """
        with registry.unlisted():
            pipelines, fresh = _build(configuration, self._names)
        known, found = _places(self._pipelines, self._parts), _places(pipelines, fresh)
        for path in sorted(known.keys() ^ found.keys()):
            what = "is new" if path in found else "is gone"
            raise ConfigurationError(path, f"{what}; only settings can change while pipelines are in use")
        for path, what in found.items():
            if what != known[path]:
                raise ConfigurationError(path, f"is {what} now, not {known[path]}; only settings can change")
        changes = []
        for path, (policy, settings) in self._parts.items():
            new, new_settings = fresh[path]
            if type(new) is not type(policy) or new.name != policy.name:
                raise ConfigurationError(path, f"is another policy now ({new!r}, not {policy!r})")
            if new_settings.get("listeners") != settings.get("listeners"):
                raise ConfigurationError(f"{path}.listeners", "can't change; use listen() of the policy")
            try:
                policy._check_change(new)
            except ValueError as error:
                raise ConfigurationError(path, str(error)) from error
            changes.append((policy, new))
        apply(changes)
        self._parts = {path: (self._parts[path][0], settings) for path, (_, settings) in fresh.items()}

    def update_from_toml(self, path: str | os.PathLike[str]) -> None:
        """`update` from a file."""
        self.update(_read(path))


_Parts = dict[str, tuple[PolicyBase, dict[str, object]]]  # by path: each policy with the settings it was given


def _read(path: str | os.PathLike[str]) -> dict[str, object]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8, or nested without end
        raise ConfigurationError(os.fspath(path), f"is no TOML: {error}") from error


def _build(configuration: Mapping[str, object], names: Mapping[str, object]) -> tuple[dict[str, Pipeline], _Parts]:
    _known("configuration", configuration, {"policies", "pipelines"}, "a table")
    parts: _Parts = {}
    shared: dict[str, PolicyBase] = {}
    for name, table in _table("policies", configuration.get("policies", {})).items():
        path = f"policies.{name}"
        parts[path] = _policy(path, name, table, names)
        shared[name] = parts[path][0]
    pipelines = {}
    for name, table in _table("pipelines", configuration.get("pipelines", {})).items():
        path = f"pipelines.{name}"
        row: list[Policy] = []
        for index, entry in enumerate(_policies(path, table)):
            here = f"{path}.policies[{index}]"
            if isinstance(entry, str):
                if entry not in shared:
                    raise ConfigurationError(here, f"there is no policies.{entry}{_near(entry, shared)}")
                row.append(shared[entry])  # type: ignore[arg-type]
            else:
                parts[here] = _policy(here, name, entry, names)
                row.append(parts[here][0])  # type: ignore[arg-type]
        try:
            pipelines[name] = Pipeline(*row, name=name)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(path, str(error)) from error
    return pipelines, parts


def _places(pipelines: Mapping[str, Pipeline], parts: _Parts) -> dict[str, str]:
    """Every path there is, and at those of pipelines the path of the policy that stands there."""
    path_of = {id(policy): path for path, (policy, _) in parts.items()}
    places = {path: path for path in parts} | {f"pipelines.{name}": "a pipeline" for name in pipelines}
    for name, pipeline in pipelines.items():
        for index, policy in enumerate(pipeline.policies):
            places[f"pipelines.{name}.policies[{index}]"] = path_of[id(policy)]
    return places


def _policies(path: str, table: object) -> list[object]:
    _known(path, table, {"policies"}, "a table with a list `policies`")
    entries = _table(path, table).get("policies")
    if not isinstance(entries, list):
        raise ConfigurationError(f"{path}.policies", f"must be a list of policies, got {_shown(entries)}")
    return entries


def _policy(path: str, name: str, table: object, names: Mapping[str, object]) -> tuple[PolicyBase, dict[str, object]]:
    entries = dict(_table(path, table))
    kind = entries.pop("type", None)
    if not isinstance(kind, str) or kind not in TYPES:
        raise ConfigurationError(
            f"{path}.type", f"must be one of {', '.join(sorted(TYPES))}, got {_shown(kind)}{_near(kind, TYPES)}"
        )
    make = TYPES[kind]
    signature = inspect.signature(make).parameters
    known = set(signature)
    settings: dict[str, object] = {}
    for setting, value in entries.items():
        if setting not in known:
            raise ConfigurationError(f"{path}.{setting}", f"{kind} has no such setting{_near(setting, known)}")
        settings[setting] = _value(f"{path}.{setting}", setting, value, names)
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


def _value(path: str, setting: str, value: object, names: Mapping[str, object]) -> object:
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in names:
            raise ConfigurationError(path, f"the app gave no name {value[1:]!r}{_near(value[1:], names)}")
        return names[value[1:]]
    if setting in _EXCEPTIONS:
        entries = value if isinstance(value, list) else [value]
        return tuple(_exception(path, entry, names) for entry in entries)
    return value


def _exception(path: str, name: object, names: Mapping[str, object]) -> type[BaseException]:
    found = names.get(name, getattr(builtins, name, None)) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise ConfigurationError(
            path, f"must name exceptions of Python's own or of the app's names, got {_shown(name)}"
        )
    return found


def _table(path: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(path, f"must be a table, got {_shown(value)}")
    return value


def _known(path: str, table: object, known: set[str], shape: str) -> None:
    for key in _table(path, table):
        if key not in known:
            raise ConfigurationError(f"{path}.{key}", f"is unknown: expected {shape}{_near(key, known)}")


def _shown(value: object) -> str:
    """`value` for a message, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits, or a value that holds itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _near(word: object, known: Iterator[str] | Mapping[str, object] | set[str]) -> str:
    """A hint, if a known word looks like this one."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else ()
    return f"; did you mean {close[0]!r}?" if close else ""
