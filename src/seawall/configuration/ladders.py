"""The ladder of a brown-out: steps from tables, and what other policies have to do with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from seawall.configuration.errors import ConfigurationError, near, shown, table
from seawall.core.ambient import Priority
from seawall.core.policy import PolicyBase
from seawall.slo.steps import Adjust, Refuse, Shed, Step

STEPS = ("adjust", "refuse", "shed", "shorter")


class Context(Protocol):
    """What a step may refer to."""

    def refer(self, path: str, name: object, kind: str | None = None) -> PolicyBase:
        """The policy that an entry's name stands for; of that type."""
        ...

    def named(self, path: str, value: str) -> object:
        """What the app gave for `"$name"`."""
        ...


@dataclass
class Ladders:
    """The ladders of the entries of the table `policies`, by name.

    A ladder that an update leaves as it is keeps its steps, those that hold included.
    """

    written: dict[str, object] = field(default_factory=dict)  # as the configuration has them
    sheds: dict[tuple[str, int], Shed] = field(default_factory=dict)  # by entry and index
    made: dict[str, list[Step]] = field(default_factory=dict)
    _pressing: dict[str, list[Shed]] = field(default_factory=dict)  # by the entry of their load shedder
    _kept: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tables: Mapping[str, object], live: Ladders | None) -> Ladders:
        """Those of a table `policies`; as far as it says the same, those of `live`."""
        ladders = cls()
        for name, entry in tables.items():
            ladder = entry.get("ladder") if isinstance(entry, Mapping) and entry.get("type") == "brownout" else None
            if isinstance(ladder, list):
                ladders.written[name] = copy.deepcopy(ladder)
        if live is not None:
            ladders._kept = frozenset(
                name for name, ladder in ladders.written.items() if live.written.get(name) == ladder
            )
            ladders.made = {name: live.made[name] for name in ladders._kept}
        for name, ladder in ladders.written.items():
            for index, step in enumerate(ladder if isinstance(ladder, list) else ()):
                if isinstance(step, Mapping) and step.get("step") == "shed":
                    kept = live.sheds.get((name, index)) if live is not None and name in ladders._kept else None
                    ladders._press(name, index, step, kept)
        return ladders

    def _press(self, name: str, index: int, step: Mapping[str, object], kept: Shed | None) -> None:
        try:
            shed = kept or Shed(step.get("share"))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"policies.{name}.ladder[{index}].share", str(error)) from error
        self.sheds[name, index] = shed
        self._pressing.setdefault(str(step.get("policy")), []).append(shed)

    def press(self, name: str, settings: dict[str, object]) -> None:
        """Give a load shedder the steps that press on it, as signals."""
        if name in self._pressing:
            given = settings.get("signals", ())
            settings["signals"] = [*given, *self._pressing[name]]  # type: ignore[misc]

    def steps(self, path: str, name: str | None, value: object, context: Context) -> list[Step]:
        """The steps of one ladder."""
        if not isinstance(value, list):
            raise ConfigurationError(path, f"must be a list of steps, got {shown(value)}")
        if name is None:
            raise ConfigurationError(path, "belongs to an entry of `policies`, which an SLO can name in its actions")
        if name in self._kept:
            return self.made[name]
        found = [self._step(f"{path}[{index}]", (name, index), one, context) for index, one in enumerate(value)]
        self.made[name] = found
        return found

    def _step(self, path: str, place: tuple[str, int], value: object, context: Context) -> Step:
        if isinstance(value, str) and value.startswith("$"):
            named = context.named(path, value)
            if not isinstance(named, Step):
                raise ConfigurationError(path, f"{value} must be a step such as Adjust(...), got {shown(named)}")
            return named
        entries = dict(table(path, value))
        kind = entries.pop("step", None)
        if not isinstance(kind, str) or kind not in STEPS:
            raise ConfigurationError(
                f"{path}.step", f"must be one of {', '.join(STEPS)}, got {shown(kind)}{near(kind, STEPS)}"
            )
        policy = None
        if kind in ("adjust", "shed"):
            if "policy" not in entries:
                raise ConfigurationError(f"{path}.policy", f"is missing; {kind} needs it")
            policy = context.refer(f"{path}.policy", entries.pop("policy"), "load_shedder" if kind == "shed" else None)
        if kind == "shed":
            _none_else(path, kind, entries, {"share"})
            return self.sheds[place]
        try:
            return _made(kind, policy, path, entries, context)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            first = str(error).partition(" ")[0]
            raise ConfigurationError(f"{path}.{first}" if first in entries else path, str(error)) from error


def _made(kind: str, policy: PolicyBase | None, path: str, entries: dict[str, object], context: Context) -> Step:
    if policy is not None:
        return Adjust(policy, **{key: _given(f"{path}.{key}", value, context) for key, value in entries.items()})
    if kind == "refuse":
        _none_else(path, kind, entries, {"below"})
        return Refuse(below=_priority(f"{path}.below", entries.get("below", "critical")))
    from seawall.engine.brownout import Shorter

    _none_else(path, kind, entries, {"max_tokens"})
    if "max_tokens" not in entries:
        raise ConfigurationError(f"{path}.max_tokens", f"is missing; {kind} needs it")
    return Shorter(entries["max_tokens"])  # type: ignore[arg-type]


def _given(path: str, value: object, context: Context) -> object:
    return context.named(path, value) if isinstance(value, str) and value.startswith("$") else value


def _priority(path: str, value: object) -> Priority:
    words = {level.name.lower(): level for level in Priority}
    if not isinstance(value, str) or value not in words:
        raise ConfigurationError(path, f"must be one of {', '.join(words)}, got {shown(value)}{near(value, words)}")
    return words[value]


def _none_else(path: str, kind: str, entries: Mapping[str, object], words: set[str]) -> None:
    for key in entries.keys() - words:
        raise ConfigurationError(f"{path}.{key}", f"{kind} has no such setting{near(key, words)}")
