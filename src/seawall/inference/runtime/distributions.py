"""Which distributions of ONNX Runtime are installed, and whether they overwrote each other."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence

from seawall.inference.errors import RuntimeMisuseError

_DISTRIBUTIONS = tuple(
    f"onnxruntime{flavour}"
    for flavour in ("", "-gpu", "-directml", "-openvino", "-qnn", "-rocm", "-migraphx", "-silicon", "-training")
)


def installed_distributions() -> list[str]:
    """Installed distributions that bring a module `onnxruntime`, each with its version.

    Asked for by name: listing what every installed package brings takes 0.2 s.
    """
    found = []
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def check_single_distribution(installed: list[str]) -> None:
    """Raise where several distributions overwrote each other's `onnxruntime` folder."""
    if len(installed) > 1:
        raise RuntimeMisuseError(
            "importing onnxruntime",
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            "uninstall all of them, then install seawall[cpu] or seawall[gpu], never both",
        )


def check_no_skew(installed: Sequence[str], module: str, library: str) -> None:
    """Raise where the installed distribution, the module that is imported and its library are of different versions.

    That is what is left where one distribution overwrote another and was uninstalled again.
    """
    claimed = {name.rpartition(" ")[2] for name in installed}
    if claimed <= {module} and module == library:
        return
    raise RuntimeMisuseError(
        "importing onnxruntime",
        f"{' and '.join(installed) or 'no distribution'} is installed, but the module is {module} and its library "
        f"{library}: uninstall every onnxruntime distribution, then install seawall[cpu] or seawall[gpu] again",
    )
