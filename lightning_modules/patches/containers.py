"""Tell what a path is, and open it as a container of weights."""

from __future__ import annotations

from pathlib import Path

from malleable.datamodules.files.atomic import recover
from malleable.lightning_modules.patches.checkpoint_file import CheckpointFile
from malleable.lightning_modules.patches.container import Container
from malleable.lightning_modules.patches.patch import is_patch
from malleable.lightning_modules.patches.weights_folder import WeightsFolder

# What DeepSpeed and sharded strategies of Lightning write into a checkpoint's folder.
_SHARDED = ("latest", "zero_to_fp32.py", "checkpoint", ".metadata", "meta.pt")


def open_container(path: str | Path, prefix: str = "model.") -> Container:
    """Open stored weights, after undoing what a killed command may have left there.

    Args:
        path: A Lightning checkpoint (one file), or the folder of a PEFT adapter or a Hugging Face model (safetensors).
        prefix: Where the model lies in the module of a Lightning checkpoint.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is something else, or damaged.
    """
    path = Path(path).resolve()
    recover(path)
    if path.is_file():
        return CheckpointFile(path, prefix)
    if not path.exists():
        raise FileNotFoundError(f"no {path}; give a checkpoint, or the folder of a model or adapter")
    if is_patch(path):
        raise ValueError(f"{path} is a patch, not weights; give a checkpoint, or the folder of a model or adapter")
    if is_weights_folder(path):
        return WeightsFolder(path)
    if any((path / name).exists() for name in _SHARDED):
        raise ValueError(f"{path} is a checkpoint in shards; {_one_file(path)}")
    raise ValueError(f"{path} holds no weights: a model's folder has a config.json, an adapter's an adapter_config.json, a checkpoint is a file")


def is_weights_folder(path: Path) -> bool:
    """Say whether a path is the folder of a model or an adapter."""
    return any((path / name).is_file() for name in ("adapter_config.json", "config.json"))


def _one_file(folder: Path) -> str:
    whole = folder.with_name(f"consolidated-{folder.name}")
    if whole.is_file():
        return f"give its one-file form, {whole}"
    if (folder / "latest").exists():
        return f"`malleable test --ckpt_path {folder}` with its recipe writes its one-file form beside it: give that"
    return f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}` writes its one-file form: give that"
