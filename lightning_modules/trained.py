"""Loading of modules that were trained in earlier runs, e.g. an oracle, a judge, an encoder, or the first of two stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import torch
from torch import Tensor

from malleable.datamodules.batch import Catalog
from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.files.run_folders import LAST, find_run, run_checkpoint
from malleable.lightning_modules.base import BaseModule

log = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=BaseModule)
SHOWN = 3


def find_trained(name: str, root: str | Path = "runs") -> Path:
    """Return the checkpoint of an earlier run.

    Args:
        name: A checkpoint file; a run folder; or ``last:<recipe>``, the latest run of a recipe. Of a run, the checkpoint that ``test`` uses is
            returned: the edited one, otherwise the best one, otherwise the last one.
        root: Folder of the runs of recipes.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint is a folder, which sharded strategies write.
    """
    path = Path(name).expanduser()
    if name.startswith(LAST) or (path.is_dir() and (path / "checkpoints").is_dir()):
        path = run_checkpoint(find_run(name, Path(root)))
        log.info("using checkpoint %s for %s", path, name)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder that a sharded strategy has written; convert it to a file: run `malleable test` with this --ckpt_path, which writes "
            "the file beside the folder, and give that file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {name}; give a checkpoint file, a run folder, or last:<recipe>")
    return path


def load_trained(name: str, kind: type[ModuleT], root: str | Path = "runs", **arguments: Any) -> ModuleT:
    """Load the module of an earlier run, in evaluation mode and with frozen weights, on the CPU.

    Args:
        name: As in :func:`find_trained`.
        kind: Class of the module, or a base class of it. A class that is not part of malleable is loaded only if it is given here.
        root: Folder of the runs of recipes.
        **arguments: Arguments of the module; they override stored ones.

    Raises:
        FileNotFoundError: If there is no such run or checkpoint.
        ValueError: If the checkpoint contains anything other than tensors and plain data, or if it is of another class.
    """
    path = find_trained(name, root)
    own = f"{kind.__module__}.{kind.__qualname__}"
    stored = (read_plain(path).get("hyper_parameters") or {}).get("_class_path", own)
    if stored != own and not (isinstance(stored, str) and stored.startswith("malleable.")):
        raise ValueError(
            f"{path} is of the class {stored}, which is not part of malleable; importing it could run code. If you trust it, give kind={stored}"
        )
    try:
        found = kind if stored == own else resolve_name(stored)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is of the class {stored}, which does not exist in this version of malleable; train the model again") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{path} is a {stored.rpartition('.')[2]}, expected a {kind.__name__}; give a run of a {kind.__name__}")
    module: ModuleT = found.load_from_checkpoint(path, map_location="cpu", weights_only=True, **arguments)
    return module.eval().requires_grad_(False)


def item_positions(catalog: Catalog, trained: Catalog, needed: Sequence[int] | None = None) -> Tensor:
    """Return the positions of the items of a catalogue in the catalogue of an earlier run. Items are identified by title.

    Source ids and positions may differ between runs, because of other filters, another order of rows, or merged titles.

    Args:
        catalog: Catalogue of N items.
        trained: Catalogue of the earlier run.
        needed: Positions in ``catalog`` of items that must be found; default: none.

    Returns:
        ``(N,)`` int64 positions in ``trained``; -1 for items that are not in it.

    Raises:
        ValueError: If a needed item is not found, or if no item is found.
    """
    position_of = {title: position for position, title in enumerate(trained.titles)}
    positions = torch.tensor([position_of.get(title, -1) for title in catalog.titles])
    missing = [catalog.titles[item] for item in needed or () if positions[item] < 0]
    if missing or not bool((positions >= 0).any()):
        titles = missing or catalog.titles
        examples = ", ".join(map(repr, titles[:SHOWN])) + (", ..." if len(titles) > SHOWN else "")
        raise ValueError(
            f"the titles of {len(titles)} items are not in the catalogue of {len(trained)} items of the earlier run: {examples}; "
            "train the earlier model on data with these items"
        )
    return positions
