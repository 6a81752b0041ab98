"""Search for the folders and checkpoints of earlier runs."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from malleable.datamodules.files.checkpoint_folders import missing_part
from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.files.yaml_files import read_yaml

log = logging.getLogger(__name__)

EDITED = "edited.ckpt"
"""Name of an edited checkpoint, in the folder ``checkpoints`` of a run."""
LAST = "last:"
"""Prefix of the name of a recipe; ``last:<recipe>`` is the latest run of the recipe."""


def run_versions(root: Path) -> list[tuple[int, Path]]:
    """Return the numbers and folders of the runs in ``root``, the latest first."""
    found = ((re.fullmatch(r"version_(\d+)", path.name), path) for path in root.glob("version_*") if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def find_run(name: str, root: Path = Path("runs")) -> Path:
    """Return the run folder for a name.

    Args:
        name: Path of a run folder, or ``last:NAME`` for the latest run with a checkpoint. NAME is a recipe, or the folder of its runs.
        root: Folder of the runs of all recipes.

    Raises:
        FileNotFoundError: If the run does not exist.
    """
    if not name.startswith(LAST):
        if not Path(name).is_dir():
            raise FileNotFoundError(
                f"the run folder {name} does not exist; give an existing folder, or last:<recipe> for the latest run of a recipe in {root}"
            )
        return Path(name)
    recipe = name.removeprefix(LAST).removesuffix(".yaml")
    folders = [root / recipe, Path(recipe)]
    for folder in folders:
        for _, run in run_versions(folder):
            if _latest_checkpoint(run / "checkpoints") is not None:
                return run
    raise FileNotFoundError(f"{name}: there is no run with a checkpoint in {' or '.join(map(str, folders))}; fit the recipe first")


def run_checkpoint(run: Path) -> Path:
    """Return the checkpoint of a run that its test uses: the edited one, else the best one.

    Raises:
        FileNotFoundError: If the run has no checkpoint.
    """
    latest = _latest_checkpoint(run / "checkpoints")
    if latest is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint; train at least one epoch, or give another run")
    return _best_checkpoint(latest, run.parent)


def find_exported_model(name: str) -> str:
    """Return the folder ``model`` or ``adapter`` of the run ``last:<recipe>``. Other names are returned unchanged.

    Raises:
        FileNotFoundError: If the run does not exist, or has neither folder.
    """
    if not name.startswith(LAST):
        return name
    run = find_run(name)
    folder = next((run / kind for kind in ("model", "adapter") if (run / kind).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{name} is {run}, which has no folder model or adapter, because the run is not finished or its model is not a language model; "
            "give another run"
        )
    log.info("using the exported model %s for %s", folder, name)
    return str(folder)


class RunDescription(NamedTuple):
    """Model and data of a run.

    Attributes:
        model: Import path of the module; ``None`` if unknown.
        data: Import path of the data module; ``None`` if there is none, or if it is unknown.
        source: Option ``source`` of the data module, as plain data; ``None`` if it has none.
    """

    model: str | None = None
    data: str | None = None
    source: Any = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RunDescription:
        """Return the model and data of a configuration.

        Args:
            config: Plain data with the keys ``model`` and ``data``.
        """
        model, data = (part if isinstance(part := config.get(key), Mapping) else {} for key in ("model", "data"))
        arguments = data.get("init_args")
        return cls(model.get("class_path"), data.get("class_path"), arguments.get("source") if isinstance(arguments, Mapping) else None)

    def differences(self, stored: RunDescription) -> list[str]:
        """Return texts with the differences to a stored run. Unknown values are not compared."""
        found = [
            f"{name} {then} instead of {now}"
            for name, then, now in (("model", stored.model, self.model), ("data", stored.data, self.data))
            if then and now and then != now
        ]
        if not found and stored.source and self.source:
            then, now = dict(_flatten(stored.source)), dict(_flatten(self.source))
            # An option that exists on one side only comes from another version of the package.
            changed = [key for key in sorted(then.keys() & now.keys()) if not _are_equal(then[key], now[key])]
            found += [f"data.source{key} {then[key]} instead of {now[key]}" for key in changed]
        return found


def find_run_checkpoint(which: str, runs: Path, expected: RunDescription | None = None) -> str:
    """Return a checkpoint of the latest run that has the expected model and data.

    The latest run is the one with the largest number. Modification times are not used, because they change when files are copied. The latest
    checkpoint of a run is the one with the most optimizer steps. If an edited checkpoint has the same number of steps, it is the latest one.
    Checkpoint folders without a number of steps are compared by modification time, and are older than all others. Incomplete files and folders, which
    a killed run can leave, are skipped with a warning.

    Args:
        which: ``last`` for the latest checkpoint of the run, ``best`` for the checkpoint that its test uses.
        runs: Folder of the runs, with one subfolder ``version_*`` for each run.
        expected: Model and data that the run must have; default: any.

    Raises:
        FileNotFoundError: If there is no such checkpoint. The message contains the most similar run and its differences.
    """
    nearest: tuple[int, str] | None = None
    for _, run in run_versions(runs):
        latest = _latest_checkpoint(run / "checkpoints")
        if latest is None:
            continue
        differences = (expected or RunDescription()).differences(_describe_run(run, latest))
        if not differences:
            if nearest:
                log.info("using the %s checkpoint of %s, because later runs have another model or other data", which, run)
            return str(latest if which == "last" else _best_checkpoint(latest, runs))
        if nearest is None or len(differences) < nearest[0]:
            nearest = len(differences), f"the most similar run is {run}, with {'; '.join(differences)}. To use it, give --ckpt_path {latest}"
    if nearest:
        raise FileNotFoundError(f"no run in {runs} has this model and this data; {nearest[1]}")
    raise FileNotFoundError(f"there is no {which} checkpoint in {runs}; give a file with --ckpt_path")


def _latest_checkpoint(folder: Path) -> Path | None:
    named = [path for name in ("last*.ckpt", EDITED) for path in folder.glob(name)]
    progress = {path: _progress(path) for path in named}
    if not named or None in progress.values():
        # If a run was killed while `last.ckpt` was replaced, the file is missing or a broken link. The checkpoints of epochs are complete.
        progress |= {path: _progress(path) for path in folder.glob("*.ckpt") if path not in progress}
    known = {path: reached for path, reached in progress.items() if reached is not None}
    return max(known, key=lambda path: (known[path], path.name == EDITED, path.name == "last.ckpt", path.name), default=None)


class _Progress(NamedTuple):
    """Progress of a checkpoint, for comparison with others.

    Attributes:
        steps: Number of optimizer steps; -1 if unknown.
        time: Modification time if the number of steps is unknown, otherwise 0.
    """

    steps: float
    time: float = 0.0


def _progress(path: Path) -> _Progress | None:
    """Return the progress of a checkpoint; ``None`` if it is incomplete."""
    if not path.exists():
        return None
    if path.is_dir():
        if missing := missing_part(path):
            log.warning("%s is not a complete checkpoint and is skipped (%s is missing or incomplete)", path, missing)
            return None
        steps = _folder_steps(path)
        return _Progress(-1.0, path.stat().st_mtime) if steps is None else _Progress(steps)
    try:
        return _Progress(float(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]))
    except Exception as error:  # damaged files cause various exceptions
        log.warning("%s is not a complete checkpoint and is skipped (%s)", path, type(error).__name__)
        return None


def _folder_steps(folder: Path) -> float | None:
    """Return the number of optimizer steps of a checkpoint folder, from its state or else from its name; ``None`` if neither contains it."""
    # State files of FSDP and of DeepSpeed, which are stored in addition to the shards.
    for state in (folder / "meta.pt", *sorted((folder / "checkpoint").glob("*mp_rank_00_model_states.pt"))):
        with suppress(OSError, ValueError):
            steps = read_plain(state).get("global_step")
            if isinstance(steps, int):
                return float(steps)
    named = re.search(r"step=(\d+)", folder.name)
    return float(named[1]) if named else None


def _best_checkpoint(latest: Path, runs: Path) -> Path:
    """Return the best checkpoint of a run, whose path is stored in its latest checkpoint."""
    if latest.name == EDITED or latest.is_dir():
        return latest
    states = read_plain(latest).get("callbacks") or {}
    found = [state for key, state in states.items() if str(key).startswith("ModelCheckpoint") and state.get("best_model_path")]
    if not found:
        raise FileNotFoundError(f"{latest} does not contain the path of the best checkpoint of its run; give the file with --ckpt_path")
    state = max(found, key=lambda state: state.get("monitor") is not None)
    stored = Path(state["best_model_path"])
    # The run folder may have been renamed. The best checkpoint of a resumed run may still be in the folder of the interrupted run.
    is_own = stored.parent == Path(state.get("dirpath") or stored.parent)
    candidates = [latest.parent / stored.name] if is_own else [runs.joinpath(*stored.parts[-3:]), stored]
    existing = [path for path in candidates if path.exists()]
    if not existing:
        raise FileNotFoundError(
            f"the best checkpoint of {latest.parent.parent} is missing: {candidates[0]} does not exist; give another file with --ckpt_path"
        )
    return existing[0]


def _describe_run(run: Path, checkpoint: Path) -> RunDescription:
    """Return model and data of a run, from its configuration or else from its checkpoint."""
    with suppress(OSError, ValueError):
        if config := read_yaml(run / "config_fit.yaml"):
            return RunDescription.from_config(config)
    if checkpoint.is_dir():
        return RunDescription()
    values = read_plain(checkpoint).get("hyper_parameters") or {}
    return RunDescription(values.get("_class_path"))


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flatten(value, prefix if key == "init_args" else f"{prefix}.{key}")
    else:
        yield prefix, tree


def _are_equal(then: Any, now: Any) -> bool:
    if isinstance(then, str) and isinstance(now, str) and os.path.realpath(then) == os.path.realpath(now):
        return True
    return json.dumps(then, default=str) == json.dumps(now, default=str)
