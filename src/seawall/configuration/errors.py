"""What can be wrong with a configuration, and where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class ConfigurationError(ValueError):
    """A configuration is wrong. `path` says where: `pipelines.payments.policies[1].failure_rate`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def table(path: str, value: object) -> Mapping[str, object]:
    """`value` as a table with words as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigurationError(path, f"must be a table, got {shown(value)}")
    return value


def known(path: str, value: object, words: set[str], shape: str) -> None:
    """ConfigurationError unless `value` is a table of these words alone."""
    for key in table(path, value):
        if key not in words:
            raise ConfigurationError(f"{path}.{key}", f"is unknown: expected {shape}{near(key, words)}")


def shown(value: object) -> str:
    """`value` for a message, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits, or a value that holds itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def near(word: object, words: Iterable[str]) -> str:
    """A hint, if a known word looks like this one."""
    close = difflib.get_close_matches(word, list(words), n=1) if isinstance(word, str) else ()
    return f"; did you mean {close[0]!r}?" if close else ""
