"""The model that a checkpoint describes, and the search for the latest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.plain_checkpoint import read_plain, saving
from malleable.datamodules.files.run_folders import Wanted, find_run_checkpoint
from malleable.datamodules.files.yaml_files import read_yaml

# Of a whole checkpoint: what only the continuation of its run needs.
_LOOP_STATES = {"optimizer_states", "lr_schedulers", "loops", "MixedPrecision", "AMPScalerState"}
# What DeepSpeed puts beside the entries of a checkpoint.
_ENGINE_STATES = {
    "buffer_names",
    "checkpoint_parallel_dimensions",
    "csr_tensor_module_names",
    "data_sampler",
    "dp_world_size",
    "ds_config",
    "ds_version",
    "frozen_param_fragments",
    "frozen_param_shapes",
    "global_samples",
    "global_steps",
    "lr_scheduler",
    "module",
    "mp_world_size",
    "optimizer",
    "param_shapes",
    "random_ltd",
    "shared_params",
    "skipped_steps",
    "sparse_tensor_module_names",
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that writes atomically, by renaming a temporary file in the same folder.

    Lightning writes to the system's temporary folder. If that is on another file system, the last step is a copy, and a process that is killed during
    the copy leaves an incomplete checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save to a file of this machine, or as Lightning does to an address."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(Path(path)) as partial, saving(Path(path)):
            torch.save(checkpoint, partial)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a file of this machine as tensors and plain data."""
        return read_plain(path, mmap=False)


def find_checkpoint(ckpt_path: str, runs: Path, wanted: Wanted | None = None) -> str:
    """Return the checkpoint that ``ckpt_path`` means.

    Args:
        ckpt_path: A file, a folder written by a sharded strategy, or ``last`` or ``best`` as in
            :func:`~malleable.datamodules.files.run_folders.find_run_checkpoint`.
        runs: Folder of the runs among which ``last`` and ``best`` are looked for, one ``version_*`` each.
        wanted: Model and data that such a run must have.

    Raises:
        FileNotFoundError: If there is none.
        MisconfigurationException: If the path is an address.
    """
    if ckpt_path in ("last", "best"):
        return find_run_checkpoint(ckpt_path, runs, wanted)
    if "://" in ckpt_path:
        raise MisconfigurationException(f"--ckpt_path {ckpt_path} is an address; download the file, check where it comes from, and give its path")
    if not Path(ckpt_path).exists():
        raise FileNotFoundError(f"no checkpoint {ckpt_path}; give an existing file, or `last` or `best` of the latest run under {runs}")
    return ckpt_path


def consolidate(folder: str) -> str:
    """Consolidate a DeepSpeed checkpoint to one file beside it, unless that exists, and return the path of the file.

    The file has all entries of a checkpoint except the states of optimizer, schedulers and loops. It contains plain data only. The folder contains
    pickles, so only folders from trusted sources should be consolidated.
    """
    source = Path(folder)
    file = source.with_name(f"consolidated-{source.name}")
    if not file.exists() or file.stat().st_mtime < (source / "latest").stat().st_mtime:
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        with atomic_write(file) as partial, saving(file):  # ranks may all come here at once
            states = convert_zero_checkpoint_to_fp32_state_dict(source, partial)
            torch.save({key: value for key, value in states.items() if key not in _LOOP_STATES | _ENGINE_STATES}, partial)
    return str(file)


def stored_model(ckpt_path: str) -> dict[str, Any] | None:
    """Return class and arguments of the model in a checkpoint, as a configuration; ``None`` if it does not tell.

    They come from the checkpoint's hyper-parameters, or else (folders of sharded strategies, modules that store none)
    from the ``config_fit.yaml`` of the run it lies in.
    """
    path = Path(ckpt_path)
    if path.is_file():
        values = read_plain(path).get("hyper_parameters") or {}
        if isinstance(values.get("_class_path"), str):
            return {"class_path": values["_class_path"], "init_args": {key: value for key, value in values.items() if not key.startswith("_")}}
    for folder in path.parents[:2]:
        saved = folder / "config_fit.yaml"
        if saved.is_file():
            model = read_yaml(saved).get("model")
            if not isinstance(model, dict) or not isinstance(model.get("class_path"), str) or not isinstance(model.get("init_args", {}), dict):
                return None
            return {"class_path": model["class_path"], "init_args": model.get("init_args", {})}
    return None


def differences(given: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Return the values of the model that differ from those of the checkpoint, as text; empty if there are none."""
    now, then = dict(_leaves(given)), dict(_leaves(stored))
    return ", ".join(f"{key} {now[key]} (checkpoint: {then[key]})" for key in sorted(now.keys() & then.keys()) if now[key] != then[key])


def other_settings(given: Mapping[str, Any], stored: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Return dotted name, given and stored value of those settings of a model that differ.

    Args:
        given: Arguments of the model's constructor.
        stored: Those of the model in a checkpoint.
        names: Dotted names of the settings to compare. Where one side lacks the mapping that a name leads through (no adapters), that is compared.
    """
    found = {}
    for name in names:
        path, now, then = _reach(given, stored, name.split("."))
        if path and _plain(now) != _plain(then):
            found[path] = (now, then)
    return [(path, now, then) for path, (now, then) in found.items()]


def as_layer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nest values of dotted names."""
    layer: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        place = layer
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return layer


def _reach(given: Mapping[str, Any], stored: Mapping[str, Any], parts: Sequence[str]) -> tuple[str, Any, Any]:
    """Follow a name as far as both sides have mappings; an empty name where a side does not know it."""
    for depth, part in enumerate(parts, start=1):
        if part not in given or part not in stored:
            return "", None, None
        now, then = given[part], stored[part]
        if not (isinstance(now, Mapping) and isinstance(then, Mapping)):
            return ".".join(parts[:depth]), now, then
        given, stored = now, then
    return ".".join(parts), given, stored


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))  # a tuple is stored as a list


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str)  # equal for a tuple and the list it is stored as
