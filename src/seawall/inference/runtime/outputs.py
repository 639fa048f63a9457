"""What a model answered, looked at before it is given out. Pure: arrays in, arrays or an error out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from seawall.inference.errors import InvalidSettingError, MissingExtraError, NotFiniteOutputError

from .inputs import Port

_NARROW = {
    "tensor(bfloat16)": "bfloat16",
    "tensor(float8e4m3fn)": "float8_e4m3fn",
    "tensor(float8e4m3fnuz)": "float8_e4m3fnuz",
    "tensor(float8e5m2)": "float8_e5m2",
    "tensor(float8e5m2fnuz)": "float8_e5m2fnuz",
}


def wanted(names: Sequence[str] | None, ports: tuple[Port, ...]) -> tuple[Port, ...]:
    """The outputs of these names, in their order; all for None. InvalidSettingError for one that there is not."""
    if names is None:
        return ports
    known = {port.name: port for port in ports}
    if isinstance(names, str) or not names or any(name not in known for name in names):
        raise InvalidSettingError(f"outputs must be some of {', '.join(map(repr, known))}, got {names!r}")
    return tuple(known[name] for name in dict.fromkeys(names))


def narrow_types(ports: Iterable[Port]) -> dict[str, np.dtype[Any]]:
    """The outputs whose type numpy has not and ml_dtypes has, by name; ONNX Runtime itself gives none, or raw bytes."""
    names = {port.name: _NARROW[port.type] for port in ports if port.type in _NARROW}
    if not names:
        return {}
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingExtraError("ml_dtypes") from error
    return {name: np.dtype(getattr(ml_dtypes, kind)) for name, kind in names.items()}


def check_finite(name: str, outputs: Mapping[str, object], narrow: Mapping[str, object]) -> None:
    """Raise NotFiniteOutputError for the first output of the model `name` that holds NaN or infinity."""
    for output, value in outputs.items():
        for array in value if isinstance(value, list) else (value,):  # a sequence of tensors is a list
            if isinstance(array, np.ndarray) and (array.dtype.kind == "f" or output in narrow):
                finite = np.isfinite(array)
                if not finite.all():
                    raise NotFiniteOutputError(name, output, int(finite.size - np.count_nonzero(finite)))
