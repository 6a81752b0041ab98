"""Paths of files in run folders. They are relative to the run folder, because a run can be moved, or resumed from another working directory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """Return the run folder, which is the same on all ranks. All ranks must call this function."""
    return Path(trainer.log_dir or trainer.default_root_dir)


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
