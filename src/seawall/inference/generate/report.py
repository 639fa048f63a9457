"""What a decoder really runs: how weights and cache are stored, which kernels read them, how exact steps are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from seawall.inference.runtime import ort

from .exactness import StepExactness
from .loading import Loaded

if TYPE_CHECKING:
    from .decoder import Decoder

Storage = Literal["float", "native", "expanded", "emulated"]


@dataclass(frozen=True, slots=True)
class DecoderReport:
    """What a decoder really runs; `str()` of it is a table.

    Attributes:
        model: the model's name.
        precision: what its weights were prepared as.
        storage: "float": float32 on disk and in memory. "native": the kernels compute on the stored values.
            "expanded": 8-bit floats on disk, turned into something fast when they were loaded. "emulated": expanded
            to floats at every run.
        kv: how the key/value cache is stored; the attention kernel reads it as it is.
        cache_bytes_per_token: bytes of it for each token of a sequence.
        context: most tokens of one sequence.
        threads: threads of a step, the caller's own included.
        onnxruntime: version of ONNX Runtime.
        providers: the session's providers, in order of preference.
        telemetry: whether ONNX Runtime's own telemetry may be on.
        operators: how many nodes of each kind the graph has, as it was handed to ONNX Runtime.
        exactness: whether logits depend on the number of tokens in a run; None before `Decoder.exactness`.
    """

    model: str
    precision: str
    storage: Storage
    kv: str
    cache_bytes_per_token: int
    context: int
    threads: int
    onnxruntime: str
    providers: tuple[str, ...]
    telemetry: bool
    operators: Mapping[str, int]
    exactness: StepExactness | None = None

    @classmethod
    def of(cls, decoder: Decoder, loaded: Loaded) -> DecoderReport:
        """The report of a loaded decoder."""
        return cls(
            model=decoder.name,
            precision=decoder.precision,
            storage=_storage(loaded),
            kv=decoder.kv,
            cache_bytes_per_token=decoder.cache_bytes_per_token,
            context=decoder.context,
            threads=decoder.threads,
            onnxruntime=ort.version,
            providers=tuple(loaded.session.get_providers()),
            telemetry=os.environ.get("ORT_DISABLE_TELEMETRY") != "1",
            operators=loaded.operators,
        )

    def __str__(self) -> str:
        telemetry = "may be on" if self.telemetry else "off"
        rows = [
            ("model", self.model),
            ("precision", f"{self.precision}, {self.storage}"),
            ("kv cache", f"{self.kv}, {self.cache_bytes_per_token:,} bytes a token, {self.context:,} tokens"),
            ("onnxruntime", f"{self.onnxruntime}, telemetry {telemetry}"),
            ("providers", ", ".join(self.providers)),
            ("threads", str(self.threads)),
            ("exactness", str(self.exactness or "not tried out: ask exactness()")),
            *((f"{count} x", name) for name, count in sorted(self.operators.items(), key=lambda item: -item[1])),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _storage(loaded: Loaded) -> Storage:
    if loaded.expanded:
        return "expanded"
    if loaded.operators.get("MatMulNBits"):
        return "native"
    return "emulated" if loaded.operators.get("DequantizeLinear") else "float"
