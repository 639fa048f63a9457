"""What a model takes, checked before ONNX Runtime sees it. Pure: names, types and shapes in, an error out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from seawall.inference.errors import InvalidInputError

Array = np.ndarray[Any, Any]

_DTYPES: Mapping[str, np.dtype[Any]] = {
    f"tensor({name})": np.dtype(kind)
    for name, kind in {
        "float": np.float32, "double": np.float64, "float16": np.float16, "bool": np.bool_,
        "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
        "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    }.items()
}  # fmt: skip
_STRINGS = "tensor(string)"


class Described(Protocol):
    """An input or output as ONNX Runtime describes it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def type(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> list[int | str | None]: ...  # noqa: D102


class Port(NamedTuple):
    """An input or output of a model.

    Attributes:
        name: its name.
        type: ONNX Runtime's name of the type, such as "tensor(float)".
        shape: a number for each fixed dimension, a name or None for a free one. Empty for a scalar, and for
            a tensor of any rank: ONNX Runtime does not tell these apart.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @classmethod
    def of(cls, described: Described) -> Port:
        """The port that ONNX Runtime describes."""
        return cls(described.name, described.type, tuple(described.shape or ()))

    def __str__(self) -> str:
        return f"{self.name}: {self.type} {_shown(self.shape)}"


class InputRules:
    """The inputs of one model. `optional` ones have a value in the model, and may be left out."""

    def __init__(self, required: Iterable[Port], optional: Iterable[Port] = ()) -> None:
        self.required = tuple(required)
        self.optional = tuple(optional)
        self._needed = frozenset(port.name for port in self.required if not port.type.startswith("optional"))
        self._ports = {port.name: port for port in (*self.required, *self.optional)}
        # dtype, rank and fixed dimensions; the dtype is None where only ONNX Runtime can tell
        self._plain = {
            port.name: (
                _DTYPES.get(port.type),
                len(port.shape),
                tuple((axis, size) for axis, size in enumerate(port.shape) if type(size) is int and size >= 0),
            )
            for port in self._ports.values()
        }

    def check(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs as a dict, or InvalidInputError with the first one that is wrong."""
        if not isinstance(inputs, Mapping):
            raise InvalidInputError("*", type(inputs).__name__, "inputs are a mapping of names to arrays")
        for name, value in inputs.items():
            plain = self._plain.get(name)
            if plain is None:
                raise InvalidInputError(str(name), "an unknown name", f"the model takes {self._names()}")
            dtype, rank, fixed = plain
            if (
                dtype is None
                or not isinstance(value, np.ndarray)
                or value.dtype != dtype
                or (value.ndim != rank and rank)
                or not value.flags.c_contiguous
            ):
                self._explain(self._ports[name], dtype, value)
            for axis, size in fixed:
                if value.shape[axis] != size:
                    raise InvalidInputError(
                        name, _described(value), f"dimension {axis} of {_shown(self._ports[name].shape)} is {size}"
                    )
        for name in self._needed - inputs.keys():
            raise InvalidInputError(name, "nothing", f"the model needs {self._names()}")
        return dict(inputs)

    def sample(self) -> dict[str, Array]:
        """The smallest inputs that pass: zeros, or empty strings, and 1 for every free dimension."""
        return {port.name: _zeros(port) for port in self.required if port.name in self._needed}

    def _explain(self, port: Port, dtype: np.dtype[Any] | None, value: Any) -> None:
        """Raise for what is wrong with this value; or return, where only ONNX Runtime can tell."""
        if dtype is None and port.type != _STRINGS:
            if port.type.startswith("tensor("):  # bfloat16, float8, int4; ml_dtypes' are refused
                raise InvalidInputError(
                    port.name,
                    _described(value),
                    f"it is a {port.type}, which no numpy array carries to ONNX Runtime; let the model cast from float",
                )
            _check_made_up_of(port.name, port.type, value)
            return
        if not isinstance(value, np.ndarray):
            raise InvalidInputError(port.name, _described(value), "a numpy array")
        if dtype is None and not _are_strings(value):
            raise InvalidInputError(port.name, _described(value), "an array of str")
        if dtype is not None and value.dtype != dtype:
            raise InvalidInputError(port.name, _described(value), f"an array of {dtype}")
        if port.shape and value.ndim != len(port.shape):
            raise InvalidInputError(port.name, _described(value), f"{len(port.shape)} dimensions {_shown(port.shape)}")
        if not value.flags.c_contiguous:
            raise InvalidInputError(
                port.name, f"{_described(value)} with gaps", "a C-contiguous array (numpy.ascontiguousarray copies it)"
            )

    def _names(self) -> str:
        return ", ".join(map(repr, self._ports)) or "no inputs"


def dtype_of(port: Port) -> np.dtype[Any] | None:
    """Numpy's type of a port's values; None where numpy has none."""
    return _DTYPES.get(port.type)


def _check_made_up_of(name: str, kind: str, value: Any) -> None:
    """Raise for a value that is no sequence, map or optional as the type says; types that are rarer pass."""
    outer, _, rest = kind.partition("(")
    inner = rest[:-1]
    if outer == "optional":
        if value is not None:
            _check_made_up_of(name, inner, value)
    elif outer == "seq":
        if not isinstance(value, list):
            raise InvalidInputError(name, _described(value), f"a list, for a {kind}")
        for item in value:
            _check_made_up_of(name, inner, item)
    elif outer == "map":
        keys, _, values = inner.partition(",")
        if not isinstance(value, dict):
            raise InvalidInputError(name, _described(value), f"a dict, for a {kind}")
        key_type, value_type = str if keys == "string" else int, str if "string" in values else (int, float, np.number)
        for key, item in value.items():
            if type(key) is not key_type or not isinstance(item, value_type) or isinstance(item, bool):
                raise InvalidInputError(
                    name, f"{type(item).__name__} under {type(key).__name__}", f"keys and values of a {kind}"
                )
    elif outer == "tensor":
        dtype = _DTYPES.get(kind)
        strings = kind == _STRINGS and isinstance(value, np.ndarray) and _are_strings(value)
        if not strings and (dtype is None or not isinstance(value, np.ndarray) or value.dtype != dtype):
            raise InvalidInputError(name, _described(value), f"an array of {dtype or inner}")
        if not value.flags.c_contiguous:
            raise InvalidInputError(name, f"{_described(value)} with gaps", "C-contiguous arrays")


def _are_strings(value: Array) -> bool:
    return value.dtype.kind == "U" or (value.dtype.kind == "O" and all(isinstance(item, str) for item in value.flat))


def _zeros(port: Port) -> Array:
    shape = tuple(size if type(size) is int and size >= 0 else 1 for size in port.shape)
    if port.type == _STRINGS:
        return np.full(shape, "", dtype=object)
    if port.type not in _DTYPES:
        raise InvalidInputError(port.name, "nothing", f"warm_up cannot make up a {port.type}: give it inputs")
    return np.zeros(shape, dtype=_DTYPES[port.type])


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {_shown(value.shape)}"
    return f"{type(value).__name__}"


def _shown(shape: Iterable[object]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
