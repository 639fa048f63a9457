"""YAML as data alone: what is read comes from anybody."""

from __future__ import annotations

from collections.abc import Iterable

try:
    import yaml
except ImportError as error:  # pragma: no cover - exercised with the import blocked
    raise ImportError("OpenSLO documents need PyYAML: pip install 'seawall[openslo]'") from error

LONGEST = 1_000_000  # characters: the parser takes some ten seconds for as many


class _Loader(yaml.SafeLoader):
    """Makes plain data, and no more of it than is written: refuses aliases, and keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias is not followed; write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen = set[object]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value[:100]!r} stands twice in one mapping\n{key.start_mark}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(text: str) -> list[object]:
    """The documents of `text`. ValueError if it is too long, no YAML, has aliases, or a key that stands twice."""
    if len(text) > LONGEST:
        raise ValueError(f"must be {LONGEST:,} characters at most, got {len(text):,}")
    try:
        return list(yaml.load_all(text, _Loader))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a 13th month, a list as a key
        raise ValueError(f"can't be read as YAML: {error}") from error


def dump(documents: Iterable[object]) -> str:
    """`documents` as text, with keys in the order they have."""
    text: str = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120, explicit_start=True)
    return text
