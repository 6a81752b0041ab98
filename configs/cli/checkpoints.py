"""Checkpoint I/O, search for checkpoints, and the model configuration that is stored in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.checkpoint_folders import missing_part
from malleable.datamodules.files.plain_checkpoint import read_plain, saving
from malleable.datamodules.files.run_folders import RunDescription, find_run_checkpoint
from malleable.datamodules.files.yaml_files import read_yaml

# Entries of a checkpoint that are needed only to resume its run.
_LOOP_STATES = {"optimizer_states", "lr_schedulers", "loops", "MixedPrecision", "AMPScalerState"}
# Entries that DeepSpeed adds to a checkpoint.
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
        """Save atomically to a local file. URLs are written by Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(Path(path)) as partial, saving(Path(path)):
            torch.save(checkpoint, partial)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain data from a local file."""
        return read_plain(path, mmap=False)


def find_checkpoint(ckpt_path: str, runs: Path, expected: RunDescription | None = None) -> str:
    """Return the path of the checkpoint given by ``--ckpt_path``.

    Args:
        ckpt_path: A file, a folder written by a sharded strategy, or ``last`` or ``best`` as in
            :func:`~malleable.datamodules.files.run_folders.find_run_checkpoint`.
        runs: Folder in which ``last`` and ``best`` are searched, with one subfolder ``version_*`` for each run.
        expected: Model and data of this command. The latest run with the same model and data is used for ``last`` or ``best``.

    Raises:
        FileNotFoundError: If the checkpoint does not exist, or a folder is incomplete.
        MisconfigurationException: If the path is a URL.
    """
    if ckpt_path in ("last", "best"):
        return find_run_checkpoint(ckpt_path, runs, expected)
    if "://" in ckpt_path:
        raise MisconfigurationException(f"--ckpt_path {ckpt_path} is a URL; download the file, check its origin, and give its local path")
    if not Path(ckpt_path).exists():
        raise FileNotFoundError(f"the checkpoint {ckpt_path} does not exist; give an existing file, or `last` or `best` for the latest run in {runs}")
    if Path(ckpt_path).is_dir() and (missing := missing_part(Path(ckpt_path))):
        raise FileNotFoundError(
            f"the checkpoint folder {ckpt_path} is incomplete: {missing} is missing or truncated, because the run was killed while it was written; "
            f"give another checkpoint, or `last` for the latest complete one in {runs}"
        )
    return ckpt_path


def consolidate(folder: str) -> str:
    """Convert a DeepSpeed checkpoint folder to a single file in the same parent folder, and return the path of the file.

    An existing file is used again unless the folder is newer. The file has all entries of the checkpoint except the states of optimizer, schedulers
    and loops, and contains plain data only. The folder contains pickles, so only folders from trusted sources should be converted.
    """
    source = Path(folder)
    file = source.with_name(f"consolidated-{source.name}")
    if not file.exists() or file.stat().st_mtime < (source / "latest").stat().st_mtime:
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        with atomic_write(file) as partial, saving(file):  # all ranks may do this at the same time
            states = convert_zero_checkpoint_to_fp32_state_dict(source, partial)
            torch.save({key: value for key, value in states.items() if key not in _LOOP_STATES | _ENGINE_STATES}, partial)
    return str(file)


def stored_model(ckpt_path: str) -> dict[str, Any] | None:
    """Return class and arguments of the model of a checkpoint, as a configuration; ``None`` if they are not stored.

    They are read from the hyper-parameters of the checkpoint. If it has none, as for folders of sharded strategies and modules without stored
    hyper-parameters, they are read from ``config_fit.yaml`` in its run folder.
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
    """Return a text with the values of a model configuration that differ from the checkpoint; empty if all are equal."""
    now, then = dict(_flatten(given)), dict(_flatten(stored))
    return ", ".join(f"{key} {now[key]} (checkpoint: {then[key]})" for key in sorted(now.keys() & then.keys()) if now[key] != then[key])


def changed_settings(given: Mapping[str, Any], stored: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Return the settings of a model that differ from a checkpoint: dotted name, given value and stored value.

    Args:
        given: Constructor arguments of the model.
        stored: Constructor arguments of the model in the checkpoint.
        names: Dotted names of the settings to compare. If only one side has the parent mapping of a name (e.g. one model has no adapters), the values
            of the parent are compared.
    """
    found = {}
    for name in names:
        path, now, then = _common_values(given, stored, name.split("."))
        if path and _to_json_types(now) != _to_json_types(then):
            found[path] = (now, then)
    return [(path, now, then) for path, (now, then) in found.items()]


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a mapping with dotted names to nested dictionaries."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def _common_values(given: Mapping[str, Any], stored: Mapping[str, Any], parts: Sequence[str]) -> tuple[str, Any, Any]:
    """Return the longest prefix of a dotted name at which both sides have a value, and the two values; an empty name if a side has no value."""
    for depth, part in enumerate(parts, start=1):
        if part not in given or part not in stored:
            return "", None, None
        now, then = given[part], stored[part]
        if not (isinstance(now, Mapping) and isinstance(then, Mapping)):
            return ".".join(parts[:depth]), now, then
        given, stored = now, then
    return ".".join(parts), given, stored


def _to_json_types(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))  # checkpoints store tuples as lists


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str)  # JSON text is the same for tuples and lists
