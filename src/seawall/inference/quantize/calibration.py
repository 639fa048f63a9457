"""What a model's products see: the float model runs on calibration data with their inputs as further outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, TypeAlias

import numpy as np

from seawall.inference.errors import InvalidSettingError, NotFiniteError
from seawall.inference.runtime import ort
from seawall.inference.runtime.threads import available_threads

from .layout import Array, not_finite
from .source import TOKENIZER, Source, onnx
from .weights import InputStatistics

Feed: TypeAlias = Mapping[str, Array]
Calibration: TypeAlias = Iterable[Feed | str | Sequence[int]]

_COLUMNS = 1 << 17  # channels that one run gives out; 256 MiB for 512 rows
_HESSIANS = 1 << 26  # elements of the Hessians of one run; 256 MiB
_TOKENS = 512  # of a text per run


def feeds_of(source: Source, calibration: Calibration | None, why: str) -> list[Feed]:
    """The inputs to run, from arrays by name, or for a prepared decoder from texts or lists of tokens.

    A decoder that nothing is given for reads the text that its caches are calibrated on.
    """
    if calibration is None and is_decoder(source):
        text = resources.files("seawall.inference.generate").joinpath("calibration.txt")
        calibration = [text.read_text(encoding="utf-8")]
    if calibration is None:
        raise InvalidSettingError(
            f"{why} needs calibration: a list of inputs by name, or for a prepared decoder of texts"
        )
    if isinstance(calibration, (str, Mapping)):
        raise InvalidSettingError("calibration must be a list of inputs or texts, not a single one")
    feeds: list[Feed] = []
    graph = source.proto.graph
    given = {tensor.name for tensor in graph.initializer}
    wanted = {port.name for port in graph.input} - given
    for one in calibration:
        if isinstance(one, Mapping) and not wanted <= one.keys() <= wanted | given:
            raise InvalidSettingError(
                f"calibration must give the model's inputs, {', '.join(sorted(wanted))}, got {', '.join(map(str, one))}"
            )
        feeds.extend([one] if isinstance(one, Mapping) else _decoder_feeds(source, one))
    if not feeds:
        raise InvalidSettingError(f"{why} needs calibration, and the list is empty")
    return feeds


def collect(
    source: Source, names: Mapping[str, int], feeds: Sequence[Feed], *, hessian: bool = False
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of values by name, given with their number of channels; in groups, to bound memory.

    Each group costs a run of the model over all feeds.
    """
    for group in _groups(names, hessian=hessian):
        runs = [_Running(name, hessian=hessian) for name in group]
        session = observed(source, group)
        for feed in feeds:
            for running, values in zip(runs, fetched(session, group, feed), strict=True):
                running.add(values)
        yield {running.name: running.statistics() for running in runs}


def observed(source: Source, names: Sequence[str], overridable: Sequence[str] = ()) -> ort.Session:
    """A session of the float model with further outputs, and with initializers that a feed may replace."""
    model = onnx.ModelProto()
    model.CopyFrom(source.proto)
    present = {port.name for port in (*model.graph.output, *model.graph.input)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    for name in overridable:
        tensor = source.tensors[name]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    entries = {"session.model_external_initializers_file_folder_path": str(source.path.parent.resolve())}
    try:
        opened = ort.open_session(
            model.SerializeToString(),
            providers=[("CPUExecutionProvider", {})],
            threads=ort.shared_threads() or available_threads(),
            entries=entries,
        )
    except ort.EXCEPTIONS as error:
        raise ort.typed(f"loading {source.path} to calibrate", error) from error
    return opened.session


def fetched(session: ort.Session, names: Sequence[str], feed: Feed) -> list[Array]:
    """The values of a run; inputs come from the feed itself."""
    inside = [name for name in names if name not in feed]
    try:
        found = dict(zip(inside, session.run(inside, dict(feed), ort.run_options()) if inside else [], strict=True))
    except ort.EXCEPTIONS as error:
        raise ort.typed("calibrating", error) from error
    return [found[name] if name in found else np.asarray(feed[name]) for name in names]


class _Running:
    """Statistics of one value over runs."""

    def __init__(self, name: str, *, hessian: bool) -> None:
        self.name = name
        self._hessian = hessian
        self._parts: list[InputStatistics] = []

    def add(self, values: Array) -> None:
        if not np.isfinite(values).all():
            found = not_finite(values)
            raise NotFiniteError(found.count, found.index, self.name)
        if values.size:
            self._parts.append(InputStatistics.of(values, hessian=self._hessian))
            if self._hessian:
                self._parts = [self.statistics()]

    def statistics(self) -> InputStatistics:
        if not self._parts:
            raise InvalidSettingError(f"no calibration input reaches {self.name!r}")
        if len(self._parts) == 1:
            return self._parts[0]
        rows = np.array([part.rows for part in self._parts], np.float64)
        mean = rows / rows.sum()

        def weighted(name: str) -> Array:
            parts = np.stack([getattr(part, name) for part in self._parts])
            total: Array = np.tensordot(mean.astype(np.float32), parts, axes=1)
            return total

        return InputStatistics(
            int(rows.sum()),
            np.min([part.low for part in self._parts], axis=0),
            np.max([part.high for part in self._parts], axis=0),
            weighted("mean_absolute"),
            weighted("mean_square"),
            weighted("hessian") if self._hessian else None,
        )


def _groups(names: Mapping[str, int], *, hessian: bool) -> Iterator[list[str]]:
    group: list[str] = []
    columns = elements = 0
    for name, channels in names.items():
        columns, elements = columns + channels, elements + channels**2
        if group and (columns > _COLUMNS or (hessian and elements > _HESSIANS)):
            yield group
            group, columns, elements = [], channels, channels**2
        group.append(name)
    if group:
        yield group


def told(feeds: Sequence[Feed]) -> dict[str, Any]:
    """What a manifest says about calibration: how many inputs, and a digest of them all."""
    digest = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            values = np.ascontiguousarray(feed[name])
            digest.update(f"{name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return {"inputs": len(feeds), "sha256": digest.hexdigest()} if feeds else {}


def is_decoder(source: Source) -> bool:
    """Whether it is the folder of a prepared decoder, which reads texts."""
    config = source.facts.get("config")
    return source.folder is not None and isinstance(config, dict) and "kv_heads" in config


def _decoder_feeds(source: Source, text: str | Sequence[int]) -> Iterator[Feed]:
    """Inputs of a prepared decoder for a text, in parts of at most 512 tokens, each on its own."""
    if source.folder is None or not is_decoder(source):
        raise InvalidSettingError(
            f"calibration by texts or tokens needs a prepared decoder; {source.path} takes inputs by name"
        )
    config = source.facts["config"]
    if isinstance(text, str):
        from seawall.inference.models.tokenizer import TextCodec

        tokens = TextCodec(source.folder / TOKENIZER).encode_verbatim(text)
    else:
        tokens = list(text)
    cache = [config["kv_heads"], config["head_size"]]
    longest = min(_TOKENS, config.get("context", _TOKENS))
    for start in range(0, len(tokens), longest):
        ids = np.array([tokens[start : start + longest]], np.int64)
        count = ids.shape[1]
        feed: dict[str, Array] = {
            "input_ids": ids,
            "seqlens_k": np.array([count - 1], np.int32),
            "total_len": np.array(count, np.int32),
            "logit_rows": np.arange(count, dtype=np.int64),
        }
        for layer in range(config["layers"]):
            for part in "kv":
                feed[f"past.{layer}.{part}"] = np.zeros((1, cache[0], count, cache[1]), np.float32)
        yield feed
