"""What a model answered, looked at before it is given out. Pure: arrays in, an error out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from seawall.inference.errors import NotFiniteOutputError


def check_finite(name: str, outputs: Mapping[str, object]) -> None:
    """Raise NotFiniteOutputError for the first output of the model `name` that holds NaN or infinity."""
    for output, value in outputs.items():
        for array in value if isinstance(value, list) else (value,):  # a sequence of tensors is a list
            if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                finite = np.isfinite(array)
                if not finite.all():
                    raise NotFiniteOutputError(name, output, int(finite.size - np.count_nonzero(finite)))
