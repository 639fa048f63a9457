"""Whether the execution providers that were asked for are the ones that serve. Pure: names in, an error out.

ONNX Runtime itself falls back in silence: to the CPU where a provider's library does not load, to the CPU
for nodes that a provider does not take, and to the CPU in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from seawall.inference.errors import InvalidSettingError, ProviderError

CPU = "CPUExecutionProvider"
Provider = str | tuple[str, Mapping[str, object]]


def normalized(providers: Sequence[Provider]) -> list[tuple[str, dict[str, str]]]:
    """Names with their settings as text, in order of preference."""
    if isinstance(providers, str) or not providers:
        raise InvalidSettingError(f"providers must be a sequence of at least one name, got {providers!r}")
    found: dict[str, dict[str, str]] = {}
    for provider in providers:
        name, settings = (provider, {}) if isinstance(provider, str) else provider
        if name in found:
            raise InvalidSettingError(f"providers must be different names, got {providers!r}")
        found[name] = {str(key): str(value) for key, value in settings.items()}
    return list(found.items())


def check_available(requested: Sequence[str], available: Sequence[str]) -> None:
    """Raise where this build of ONNX Runtime does not know a provider."""
    missing = [name for name in requested if name not in available]
    if missing:
        raise ProviderError(requested, available, f"{' and '.join(missing)} is not in this build of ONNX Runtime")


def check_serving(requested: Sequence[str], active: Sequence[str], nodes: Iterable[tuple[str, str]]) -> None:
    """Raise where a session does not serve as it was asked to.

    Args:
        requested: names that were asked for.
        active: what the session says it uses; ONNX Runtime adds the CPU to it by itself.
        nodes: (provider, node name) of every node; empty where unknown.
    """
    absent = [name for name in requested if name not in active]
    if absent:
        raise ProviderError(requested, active, f"{' and '.join(absent)} did not start, its library may be missing")
    busy = set()
    for provider, node in nodes:
        busy.add(provider)
        if provider not in requested:
            raise ProviderError(requested, active, f"node {node!r} would run on {provider}")
    idle = [name for name in requested if name != CPU and busy and name not in busy]
    if idle:
        raise ProviderError(requested, sorted(busy), f"{' and '.join(idle)} takes none of the model's nodes")
