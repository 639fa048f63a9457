"""Models on disk: the catalogue, the explicit fetch, and the one-time conversion from GGUF to ONNX."""

from __future__ import annotations

from .cache import cache_folder
from .catalogue import CATALOGUE, CatalogueEntry
from .convert import PRECISIONS, PreparedModel, prepare
from .fetch import Progress, add, locate, remove

__all__ = [
    "CATALOGUE",
    "PRECISIONS",
    "CatalogueEntry",
    "PreparedModel",
    "Progress",
    "add",
    "cache_folder",
    "locate",
    "prepare",
    "remove",
]
