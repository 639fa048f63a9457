"""What really serves: the graph after ONNX Runtime's own rewrites, node by node, and the settings around it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from seawall.inference.errors import MissingExtraError

from . import ort
from .inputs import Port

if TYPE_CHECKING:
    from .batching.exactness import Exactness

_QUANTIZED = frozenset({
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GatherBlockQuantized", "GemmFloat8",
    "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight", "MatMulBnb4", "MatMulInteger",
    "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QEmbedLayerNormalization", "QGemm",
    "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool",
    "QLinearLeakyRelu", "QLinearMatMul", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax",
    "QLinearWhere", "QMoE", "QOrderedMatMul",
})  # fmt: skip
_COMPUTING = frozenset({
    "Attention", "Conv", "ConvTranspose", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul", "GRU", "Gather", "Gemm",
    "LSTM", "MatMul",
})  # fmt: skip
_WEIGHTS = "weights.bin"


class NodeReport(NamedTuple):
    """One node of the graph that runs.

    Attributes:
        name: its name, or "" where it has none.
        op_type: the kernel, such as "MatMulNBits".
        provider: who runs it, or "unknown" where ONNX Runtime does not tell.
        kind: "native": computes on quantized values, as the model's file says. "fused": the same, made by ONNX
            Runtime out of dequantize-compute patterns. "emulated": computes in float on values that are
            dequantized at each run. "expanded": the file stores 8-bit floats, which were turned into what the kernel
            takes when the model was loaded. "" for what is not quantized.
    """

    name: str
    op_type: str
    provider: str
    kind: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a backend really runs; `str()` of it is a table.

    Attributes:
        model: file name of the model, or "model" for bytes.
        digest: SHA-256 of the model's file as it was loaded; of a list of all `files` where it has external data.
        files: (name, SHA-256) of the model's file and of each file of its external data; or "changed since it was
            loaded". Empty for bytes.
        onnxruntime: version of ONNX Runtime.
        providers: the session's providers, in order of preference.
        requested: those that were asked for.
        threads: threads that a run uses, the calling one included.
        shared_pool: whether these threads serve every session of the process.
        workers: runs of coroutines at once.
        memory_limit: bytes that weights and runs may hold at once on the CPU, or None.
        room: what the weights leave of them for runs, or None.
        telemetry: whether ONNX Runtime's own telemetry may be on.
        inputs: what the model takes.
        outputs: what it gives.
        nodes: the graph that runs, in order; subgraphs included.
        exactness: what rows of one run do to each other, as a `MicroBatcher` found; None before one was made.
    """

    model: str
    digest: str
    files: tuple[tuple[str, str], ...]
    onnxruntime: str
    providers: tuple[str, ...]
    requested: tuple[str, ...]
    threads: int
    shared_pool: bool
    workers: int
    memory_limit: int | None
    room: int | None
    telemetry: bool
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[NodeReport, ...]
    exactness: Exactness | None = None

    @property
    def kinds(self) -> Mapping[str, int]:
        """How many quantized nodes there are of each kind."""
        return Counter(node.kind for node in self.nodes if node.kind)

    def __str__(self) -> str:
        limit = "none"
        if self.memory_limit is not None and self.room is not None:
            limit = f"{self.memory_limit / 2**20:,.0f} MiB, of which {self.room / 2**20:,.0f} MiB for runs"
        rows = [
            ("model", self.model),
            ("sha256", self.digest),
            *((f"file {name}", digest) for name, digest in self.files[1:]),
            ("onnxruntime", f"{self.onnxruntime}, telemetry {'may be on' if self.telemetry else 'off'}"),
            ("providers", f"{', '.join(self.providers)} (asked for: {', '.join(self.requested)})"),
            ("threads", f"{self.threads} a run, {'shared by all models' if self.shared_pool else 'its own pool'}"),
            ("workers", str(self.workers)),
            ("memory limit", limit),
            *((f"input {port.name}", f"{port.type} {_shape(port)}") for port in self.inputs),
            *((f"output {port.name}", f"{port.type} {_shape(port)}") for port in self.outputs),
            ("exactness", str(self.exactness or "not tried out: no batcher was made")),
            ("quantized", ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())) or "nothing"),
        ]
        counted = Counter((node.op_type, node.provider, node.kind) for node in self.nodes)
        rows += [
            (f"{count} x {op_type}", f"{provider}{f', {kind}' if kind else ''}")
            for (op_type, provider, kind), count in counted.most_common()
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


class Reported(Protocol):
    """What a report asks of a backend."""

    name: str
    threads: int
    memory_limit: int | None
    room: int | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    exactness: Exactness | None


def build_report(
    backend: Reported,
    session: ort.Session,
    model: str | bytes | ort.InMemory,
    requested: Sequence[tuple[str, Mapping[str, str]]],
    digest: str,
    loaded_at: int,
    workers: int,
) -> Report:
    """The report of a session that was loaded at this time, in nanoseconds of the wall clock."""
    assigned = ort.assigned_nodes(session)
    source, optimized = _graphs(model, requested)
    files = _files(model, source, digest, loaded_at)
    expanded = model.expanded if isinstance(model, ort.InMemory) else frozenset[str]()
    return Report(
        model=backend.name,
        digest=digest if len(files) < 2 else hashlib.sha256(repr(files).encode()).hexdigest(),
        files=files,
        onnxruntime=ort.version,
        providers=tuple(session.get_providers()),
        requested=tuple(name for name, _ in requested),
        threads=backend.threads,
        shared_pool=ort.shared_threads() is not None,
        workers=workers,
        memory_limit=backend.memory_limit,
        room=backend.room,
        telemetry=os.environ.get("ORT_DISABLE_TELEMETRY") != "1",
        inputs=backend.inputs,
        outputs=backend.outputs,
        nodes=tuple(
            row._replace(kind="expanded") if row.kind and row.name in expanded else row
            for row in describe(source, optimized, assigned, session.get_providers())
        ),
        exactness=backend.exactness,
    )


def describe(source: Any, optimized: Any, assigned: Iterable[ort.Node], active: Sequence[str]) -> list[NodeReport]:
    """A row for each node of the optimized graph; `source` is the graph of the model's file."""
    by_name = {node.name: node.provider for node in assigned if node.name}
    serving = set(by_name.values()) or set(active)
    otherwise = serving.pop() if len(serving) == 1 else "unknown"
    as_written = {(node.name, node.op_type) for node in _all_nodes(source)}
    rows = []
    for graph in _all_graphs(optimized):
        expanded = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
        for node in graph.node:
            kind = ""
            if node.op_type in _QUANTIZED:
                kind = "native" if (node.name, node.op_type) in as_written else "fused"
            elif node.op_type in _COMPUTING and not expanded.isdisjoint(node.input):
                kind = "emulated"
            rows.append(NodeReport(node.name, node.op_type, by_name.get(node.name, otherwise), kind))
    return rows


def _graphs(model: str | bytes | ort.InMemory, requested: Sequence[tuple[str, Mapping[str, str]]]) -> tuple[Any, Any]:
    """The graph of the file, and the one that ONNX Runtime makes of it; neither with its weights."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx") from error
    graph = model.graph if isinstance(model, ort.InMemory) else model
    source = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
    with tempfile.TemporaryDirectory(prefix="seawall-report-") as folder:
        written = Path(folder) / "optimized.onnx"
        entries = {
            "session.optimized_model_external_initializers_file_name": _WEIGHTS,
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
            "session.disable_prepacking": "1",  # nobody runs it: a second copy of the weights less
        }
        try:
            ort.open_session(model, providers=requested, threads=1, entries=entries, optimized_to=written)
        except ort.EXCEPTIONS as error:  # such as where the file or its external data is gone
            raise ort.typed("building the graph again, for a report", error) from error
        optimized = onnx.load(written, load_external_data=False)
    return source.graph, optimized.graph


def _files(model: str | bytes | ort.InMemory, graph: Any, digest: str, loaded_at: int) -> tuple[tuple[str, str], ...]:
    """The model's file with the digest it had, then those of its external data as they are now."""
    path = model.path if isinstance(model, ort.InMemory) else model
    if isinstance(path, bytes):
        return ()
    folder = Path(path).parent
    return (
        (Path(path).name, digest),
        *((name, _digest(folder / name, loaded_at)) for name in sorted(_locations(graph))),
    )


def _digest(path: Path, loaded_at: int) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if max(status.st_mtime_ns, status.st_ctime_ns) > loaded_at:
                return "changed since it was loaded"
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "changed since it was loaded"


def _locations(graph: Any) -> set[str]:
    """Names of the files that the graph's tensors lie in."""
    tensors = [tensor for one in _all_graphs(graph) for tensor in one.initializer]
    tensors += [attribute.t for node in _all_nodes(graph) for attribute in node.attribute]
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _all_graphs(graph: Any) -> Iterable[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _all_graphs(inner)


def _all_nodes(graph: Any) -> Iterable[Any]:
    for inner in _all_graphs(graph):
        yield from inner.node


def _shape(port: Port) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in port.shape)}]"
