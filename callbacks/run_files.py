"""Paths of files in run folders. They are relative to the run folder, because a run can be moved, or resumed from another working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import Trainer

from malleable.datamodules.files.atomic import atomic_write


def run_folder(trainer: Trainer) -> Path:
    """Return the run folder, which is the same on all ranks. All ranks must call this function."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def copy_to_run(trainer: Trainer, folder: Path, name: str) -> None:
    """Copy a file of the interrupted run to the folder of this run, unless it is there. All ranks must call this function.

    Args:
        trainer: Trainer.
        folder: Folder of this run.
        name: Path of the file, relative to the run folder.
    """
    stored, path = find_copies(trainer, folder, name)[0], folder / name
    if trainer.is_global_zero and stored.is_file() and stored.resolve() != path.resolve():
        with atomic_write(path) as temporary:
            shutil.copyfile(stored, temporary)
    trainer.strategy.barrier(name)


def find_copies(trainer: Trainer, folder: Path, name: str) -> list[Path]:
    """Return the existing copies of a file in the folders of the interrupted run and of this run, in this order.

    If there is no copy, the path in the folder of this run is returned.

    Args:
        trainer: Trainer. The folder of the interrupted run is derived from its ``ckpt_path``.
        folder: Folder of this run.
        name: Path of the file, relative to the run folder.
    """
    candidates = [folder / name]
    if trainer.ckpt_path and "://" not in str(trainer.ckpt_path):
        candidates = [*(parent / name for parent in Path(trainer.ckpt_path).absolute().parents[:2]), *candidates]
    return [path for path in candidates if path.is_file()] or candidates[-1:]
