"""Files that belong to a run, named relative to its folder: the run may be renamed, moved, or resumed from another working directory."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run, the same on all ranks; every rank must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def stored_copies(trainer: Trainer, folder: Path, name: str) -> list[Path]:
    """Return the existing files of a name, the likeliest one first; where there is none, the place where it should be.

    Args:
        trainer: The checkpoint that it resumes from lies in the folder of the interrupted run, or in a folder of that.
        folder: Where this run writes such files.
        name: Path of the file, relative to the folder in which it was written.
    """
    places = [folder / name]
    if trainer.ckpt_path and "://" not in str(trainer.ckpt_path):
        places = [*(parent / name for parent in Path(trainer.ckpt_path).absolute().parents[:2]), *places]
    return [place for place in places if place.is_file()] or places[-1:]
