"""Requests side by side in one feed, and the outputs apart again. Pure: arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seawall.inference.errors import InvalidInputError, InvalidSettingError, RuntimeMisuseError

from ..inputs import Array, InputRules, Port, dtype_of
from .padding import Padding

Feed = dict[str, Array]


class Shape(NamedTuple):
    """What of a request decides with whom it may share a run.

    Attributes:
        key: equal for requests that fit together.
        rows: how many rows it has.
        length: positions of each of its rows; 1 where nothing is padded.
        padded: positions of each row once it is padded.
    """

    key: tuple[object, ...]
    rows: int
    length: int
    padded: int


class Layout:
    """How one model's inputs and outputs are put side by side: along axis 0, which has to be free in all of them."""

    def __init__(self, inputs: Sequence[Port], outputs: Sequence[Port], padding: Padding | None) -> None:
        self.padding = padding
        self._padded = frozenset(padding.names if padding else ())
        self._fill = {**padding.values, **({padding.mask: 0} if padding.mask else {})} if padding else {}
        self.inputs = tuple(_free(port, padding) if port.name in self._padded else port for port in inputs)
        self.outputs = tuple(outputs)
        _check_rows(self.inputs, "input")
        _check_rows(self.outputs, "output")
        if padding is not None:
            _check_padding(padding, inputs)
        self._cut = _cuts(inputs, outputs, padding)
        self._rules = InputRules(self.inputs)
        self._mask_type = {port.name: dtype_of(port) for port in inputs}.get(padding.mask or "") if padding else None

    def check(self, inputs: Mapping[str, Any]) -> tuple[Feed, Shape]:
        """The inputs of one request with its mask, and its shape; or InvalidInputError, which is its own alone."""
        padding = self.padding
        if padding is not None and padding.mask is not None and isinstance(inputs, Mapping):
            inputs = self._with_mask(inputs, padding)
        checked = self._rules.check(inputs)
        feed = {port.name: checked[port.name] for port in self.inputs}  # in one order, whatever the request's was
        rows = {name: len(array) for name, array in feed.items()}
        first, count = next(iter(rows.items()))
        if count < 1:
            raise InvalidInputError(first, "none", "at least one row")
        for name, found in rows.items():
            if found != count:
                raise InvalidInputError(name, f"{found} rows", f"as many rows as {first!r}, which has {count}")
        if padding is None:
            return feed, Shape(tuple(array.shape[1:] for array in feed.values()), count, 1, 1)
        return feed, self._padded_shape(feed, count, padding)

    def join(self, feeds: Sequence[Feed], padded: int) -> Feed:
        """One feed of all rows, in order, each padded to `padded` positions."""
        if len(feeds) == 1 and (self.padding is None or self._length(feeds[0]) == padded):
            return feeds[0]
        joined: Feed = {}
        rows = sum(len(next(iter(feed.values()))) for feed in feeds)
        for name, first in feeds[0].items():
            if name not in self._padded:
                joined[name] = np.concatenate([feed[name] for feed in feeds])
                continue
            assert self.padding is not None
            axis = self.padding.axis
            shape = (rows, *first.shape[1:axis], padded, *first.shape[axis + 1 :])
            whole = joined[name] = np.full(shape, self._fill[name], first.dtype)
            start = 0
            for feed in feeds:
                part = feed[name]
                whole[(slice(start, start + len(part)), *[slice(None)] * (axis - 1), slice(part.shape[axis]))] = part
                start += len(part)
        return joined

    def split(self, outputs: Feed, shapes: Sequence[Shape]) -> list[Feed]:
        """The outputs of each request, its padding cut off: copies, since a view would hold its neighbours' rows."""
        rows = sum(shape.rows for shape in shapes)
        for name, array in outputs.items():
            if array.ndim == 0 or len(array) != rows:
                raise RuntimeMisuseError(
                    "splitting a batch",
                    f"output {name!r} is {list(array.shape)}, which is not a row for each of {rows}",
                )
        found = []
        start = 0
        for shape in shapes:
            end = start + shape.rows
            found.append({name: self._own(name, array[start:end], shape, whole=end - start == rows)
                          for name, array in outputs.items()})  # fmt: skip
            start = end
        return found

    def _own(self, name: str, part: Array, shape: Shape, *, whole: bool) -> Array:
        axis = self._cut.get(name)
        if axis is not None and shape.length != shape.padded:
            if part.shape[axis] != shape.padded:
                raise RuntimeMisuseError(
                    "splitting a batch", f"axis {axis} of output {name!r} is {part.shape[axis]}, not {shape.padded}"
                )
            return part[(*[slice(None)] * axis, slice(shape.length))].copy()
        return part if whole else part.copy()

    def _with_mask(self, inputs: Mapping[str, Any], padding: Padding) -> Mapping[str, Any]:
        first = inputs.get(next(iter(padding.values)))
        if padding.mask in inputs or not isinstance(first, np.ndarray) or first.ndim <= padding.axis:
            return inputs  # complete, or wrong in a way that the rules explain better
        shape = (len(first), *[1] * (padding.axis - 1), first.shape[padding.axis])
        return {**inputs, str(padding.mask): np.ones(shape, self._mask_type)}

    def _length(self, feed: Feed) -> int:
        assert self.padding is not None
        return int(feed[next(iter(self.padding.values))].shape[self.padding.axis])

    def _padded_shape(self, feed: Feed, rows: int, padding: Padding) -> Shape:
        first = next(iter(padding.values))
        length = self._length(feed)
        key: list[object] = []
        for name, array in feed.items():
            if name not in self._padded:
                key.append(array.shape[1:])
                continue
            if array.shape[padding.axis] != length:
                raise InvalidInputError(
                    name, f"{array.shape[padding.axis]} positions", f"as many as {first!r}, which has {length}"
                )
            key.append((array.shape[1 : padding.axis], array.shape[padding.axis + 1 :]))
        bucket = padding.bucket(length)
        if bucket is None or length < 1:
            raise InvalidInputError(first, f"{length} positions", f"1 to {padding.buckets[-1]} positions")
        return Shape((bucket, *key), rows, length, bucket)


def _free(port: Port, padding: Padding | None) -> Port:
    """The port as requests see it: any length, though the model may want just one."""
    if padding is None or padding.axis >= len(port.shape):
        return port
    return port._replace(shape=(*port.shape[: padding.axis], None, *port.shape[padding.axis + 1 :]))


def _check_rows(ports: Sequence[Port], what: str) -> None:
    for port in ports:
        if not port.type.startswith("tensor(") or not port.shape or isinstance(port.shape[0], int):
            raise InvalidSettingError(
                f"{what} {port} has no free first dimension, so rows of several requests cannot share a run: "
                "export the model with a dynamic batch axis, or use the backend without a batcher"
            )


def _check_padding(padding: Padding, inputs: Sequence[Port]) -> None:
    ports = {port.name: port for port in inputs}
    for name in padding.names:
        port = ports.get(name)
        if port is None:
            raise InvalidSettingError(f"padding names {name!r}, and the model takes {', '.join(map(repr, ports))}")
        if padding.axis >= len(port.shape):
            raise InvalidSettingError(f"padding has axis {padding.axis}, which {port} does not have")
        size = port.shape[padding.axis]
        if type(size) is int and padding.buckets != (size,):
            raise InvalidSettingError(
                f"{port} takes {size} positions: buckets must be ({size},), got {padding.buckets!r}"
            )


def _cuts(inputs: Sequence[Port], outputs: Sequence[Port], padding: Padding | None) -> dict[str, int]:
    """Which axis of which output is as long as the padded inputs."""
    if padding is None:
        return {}
    if padding.cut is None:
        axes = {port.shape[padding.axis] for port in inputs if port.name in padding.names} - {None}
        return {
            port.name: axis
            for port in outputs
            for axis, size in enumerate(port.shape)
            if axis and size in axes and type(size) is str
        }
    ports = {port.name: port for port in outputs}
    for name, axis in padding.cut.items():
        if name not in ports or type(axis) is not int or not 1 <= axis < max(2, len(ports[name].shape)):
            raise InvalidSettingError(f"cut must give an axis from 1 of an output, got {axis!r} for {name!r}")
    return dict(padding.cut)
