"""The pipelines of a configuration, and how they change while in use."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from seawall.configuration.building import Built, build
from seawall.configuration.errors import ConfigurationError
from seawall.core import registry
from seawall.core.pipeline import Pipeline
from seawall.core.policy import PolicyBase, apply
from seawall.slo.brownout import BrownOut


class Pipelines(Mapping[str, Pipeline]):
    """The pipelines of one configuration, by name.

    A configuration has two tables. `pipelines` has a table for each pipeline, whose list `policies` is outermost
    first: each is a table with a `type` and the settings of that policy, or the name of an entry of the table
    `policies`, which several pipelines may share. Where a policy needs another (`budget`, `actions`, the steps of a
    `ladder`), it names an entry of `policies`. A setting `"$name"` is what the app gave as `names["name"]`.

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
        self._built = build(configuration, self._names)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], names: Mapping[str, object] | None = None) -> Pipelines:
        """The pipelines of a TOML file. OSError if it can't be read."""
        return cls(_read(path), names)

    @property
    def policies(self) -> Mapping[str, PolicyBase]:
        """The entries of the table `policies`, by name."""
        return MappingProxyType(self._built.shared)

    def __getitem__(self, name: str) -> Pipeline:
        return self._built.pipelines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._built.pipelines)

    def __len__(self) -> int:
        return len(self._built.pipelines)

    def update(self, configuration: Mapping[str, object]) -> None:
        """Take over new settings while calls are in flight: all of them or, if anything is wrong, none.

        The pipelines, their policies and the functions they decorate stay, and no call is dropped. So only settings
        may differ: a pipeline or policy that comes, goes or changes its type is an error.

        Raises:
            ConfigurationError: says where; everything stays as it was.
        """
        with registry.unlisted():
            fresh = build(configuration, self._names, self._built)
        known, found = _places(self._built), _places(fresh)
        for path in sorted(known.keys() ^ found.keys()):
            what = "is new" if path in found else "is gone"
            raise ConfigurationError(path, f"{what}; only settings can change while pipelines are in use")
        for path, what in found.items():
            if what != known[path]:
                raise ConfigurationError(path, f"is {what} now, not {known[path]}; only settings can change")
        changes = []
        for path, (policy, settings) in self._built.parts.items():
            new, new_settings = fresh.parts[path]
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
        self._built.parts = {path: (self._built.parts[path][0], given) for path, (_, given) in fresh.parts.items()}
        self._built.ladders = fresh.ladders
        for policy in self._built.shared.values():
            if isinstance(policy, BrownOut):
                policy.renew()

    def update_from_toml(self, path: str | os.PathLike[str]) -> None:
        """`update` from a file."""
        self.update(_read(path))


def _read(path: str | os.PathLike[str]) -> dict[str, object]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8, or nested without end
        raise ConfigurationError(os.fspath(path), f"is no TOML: {error}") from error


def _places(built: Built) -> dict[str, str]:
    """Every path there is, and at those of pipelines the path of the policy that stands there."""
    path_of = {id(policy): path for path, (policy, _) in built.parts.items()}
    places = {path: path for path in built.parts} | {f"pipelines.{name}": "a pipeline" for name in built.pipelines}
    for name, pipeline in built.pipelines.items():
        for index, policy in enumerate(pipeline.policies):
            places[f"pipelines.{name}.policies[{index}]"] = path_of[id(policy)]
    return places
