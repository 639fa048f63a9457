"""Who may ask: API keys, of which only digests are kept, and whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from seawall.web.asgi import Scope
from seawall.web.openai.errors import RequestError


class Keys:
    """Keys that a request must have one of, or tenants by their key; a key without a name is a tenant of its own."""

    def __init__(self, keys: Iterable[str] | Mapping[str, str]) -> None:
        if isinstance(keys, str):
            raise TypeError("api_keys must be several keys, or tenants by key, got a single str: put it into a list")
        named = dict(keys) if isinstance(keys, Mapping) else dict.fromkeys(keys, "")
        if not named or not all(isinstance(key, str) and key for key in named):
            raise ValueError("api_keys must hold at least one key, none of them empty; None lets everybody in")
        self._tenants = {_digest(key.encode()): tenant for key, tenant in named.items()}

    def tenant(self, scope: Scope) -> str:
        """Whose key a request has; `RequestError` where that is nobody's."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        if scheme.lower() != b"bearer" or digest not in self._tenants:
            raise RequestError(
                "the API key is unknown" if given else "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                status=401,
                headers={"www-authenticate": "Bearer"},
            )
        return self._tenants[digest] or digest.hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # compared by hash: how long that takes tells nothing about the keys
