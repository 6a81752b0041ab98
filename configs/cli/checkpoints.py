"""What a checkpoint says about the model it holds, and where the latest one lies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.files import atomic_write

_PLAIN_STATES = ("state_dict", "epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "callbacks", "patches")


def find_checkpoint(ckpt_path: str, runs: Path) -> str:
    """Return the checkpoint that ``ckpt_path`` means.

    Args:
        ckpt_path: A file, a folder written by a sharded strategy, an address, or ``last``: the latest, an edited one among them.
        runs: Folder of the runs among which ``last`` is looked for, one ``version_*`` each.

    Raises:
        FileNotFoundError: If there is none.
        MisconfigurationException: If ``best`` is asked for outside the run that knows it.
    """
    if ckpt_path == "best":
        raise MisconfigurationException(f"`best` is known only to the run itself; give the file, e.g. one of {runs}/version_0/checkpoints, or `last`")
    if ckpt_path == "last":
        files = (path for name in ("last*.ckpt", "edited.ckpt") for path in runs.glob(f"version_*/checkpoints/{name}"))
        found = sorted(files, key=lambda path: path.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"no last checkpoint under {runs}; give the file with --ckpt_path")
        return str(found[-1])
    if "://" not in ckpt_path and not Path(ckpt_path).exists():
        raise FileNotFoundError(f"no checkpoint {ckpt_path}; give an existing file, or `last` for the latest under {runs}")
    return ckpt_path


def consolidate(folder: str) -> str:
    """Write the one-file form of a DeepSpeed checkpoint beside it, unless it is there, and return its path.

    The file holds plain data; the folder itself does not, and opening it trusts whoever wrote it.
    """
    source = Path(folder)
    file = source.with_name(f"consolidated-{source.name}")
    if not file.exists() or file.stat().st_mtime < (source / "latest").stat().st_mtime:
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        with atomic_write(file) as partial:  # ranks may all come here at once
            states = convert_zero_checkpoint_to_fp32_state_dict(source, partial)
            torch.save({key: states[key] for key in _PLAIN_STATES if key in states}, partial)
    return str(file)


def stored_model(ckpt_path: str) -> dict[str, Any] | None:
    """Return class and arguments of the model in a checkpoint, as a configuration; ``None`` if it does not tell.

    They come from the checkpoint's hyper-parameters, or else (folders of sharded strategies, modules that store none)
    from the ``config_fit.yaml`` of the run it lies in.
    """
    path = Path(ckpt_path)
    if path.is_file():
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("hyper_parameters", {})
        if "_class_path" in values:
            return {"class_path": values["_class_path"], "init_args": {key: value for key, value in values.items() if not key.startswith("_")}}
    for folder in path.parents[:2]:
        saved = folder / "config_fit.yaml"
        if saved.is_file():
            model: dict[str, Any] | None = yaml.safe_load(saved.read_text(encoding="utf-8")).get("model")
            return model
    return None


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Name every value of a checkpoint's model that is another one now; empty if there is none."""
    now, then = dict(_leaves(given)), dict(_leaves(stored))
    return ", ".join(f"{key} {now[key]} (checkpoint: {then[key]})" for key in sorted(now.keys() & then.keys()) if now[key] != then[key])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str)  # equal for a tuple and the list it is stored as
