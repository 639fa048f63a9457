"""Hardened generation: a decoder in a worker thread, behind a pipeline. The one package that knows both halves."""

from seawall.engine.engine import Completion, Engine, EngineClosedError, Piece

__all__ = ["Completion", "Engine", "EngineClosedError", "Piece"]
