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

from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.files.yaml_files import read_yaml

log = logging.getLogger(__name__)

EDITED = "edited.ckpt"
LAST = "last:"
"""Prefix of the name of a recipe, for its latest run."""


def run_versions(root: Path) -> list[tuple[int, Path]]:
    """Return numbers and folders of the runs below ``root``, the latest first."""
    found = ((re.fullmatch(r"version_(\d+)", path.name), path) for path in root.glob("version_*") if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def find_run(name: str, root: Path = Path("runs")) -> Path:
    """Return the run folder that a name means.

    Args:
        name: Path of a run folder; or ``last:NAME``, where NAME is a recipe or the folder of its runs, for its latest run with a checkpoint.
        root: Folder of the runs of recipes.

    Raises:
        FileNotFoundError: If there is no such run.
    """
    if not name.startswith(LAST):
        if not Path(name).is_dir():
            raise FileNotFoundError(f"no run folder {name}; give an existing folder, or last:<recipe> for the latest run of a recipe below {root}")
        return Path(name)
    recipe = name.removeprefix(LAST).removesuffix(".yaml")
    places = [root / recipe, Path(recipe)]
    for place in places:
        for _, run in run_versions(place):
            if _newest(run / "checkpoints") is not None:
                return run
    raise FileNotFoundError(f"{name}: there is no run with a checkpoint below {' or '.join(map(str, places))}; fit the recipe first")


def run_checkpoint(run: Path) -> Path:
    """Return the checkpoint that a run would test: the edited one, else the best, else the last one.

    Raises:
        FileNotFoundError: If it has none.
    """
    newest = _newest(run / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"{run} has no whole checkpoint; train it to the end of an epoch, or give another run")
    return _best(newest, run.parent)


def exported(name: str) -> str:
    """Return the exported weights of the run that ``last:<recipe>`` means: its folder ``model`` or ``adapter``; other names pass through.

    Raises:
        FileNotFoundError: If there is no such run, or it exported nothing.
    """
    if not name.startswith(LAST):
        return name
    run = find_run(name)
    folder = next((run / kind for kind in ("model", "adapter") if (run / kind).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{name} is {run}, which has no folder model or adapter: it is no finished run of a language model; give another run")
    log.info("%s is %s", name, folder)
    return str(folder)


class RunDescription(NamedTuple):
    """What a checkpoint is expected for.

    Attributes:
        model: Import path of the module.
        data: Import path of the data module; ``None`` where there is none.
        source: The data module's ``source``, as plain data; ``None`` where it has none.
    """

    model: str | None = None
    data: str | None = None
    source: Any = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RunDescription:
        """Return what a configuration describes.

        Args:
            config: Plain data with the keys ``model`` and ``data``.
        """
        model, data = (part if isinstance(part := config.get(key), Mapping) else {} for key in ("model", "data"))
        arguments = data.get("init_args")
        return cls(model.get("class_path"), data.get("class_path"), arguments.get("source") if isinstance(arguments, Mapping) else None)

    def differences(self, stored: RunDescription) -> list[str]:
        """Name what a stored configuration has differently; what it does not say is not compared."""
        found = [
            f"{name} {then}, here {now}"
            for name, then, now in (("model", stored.model, self.model), ("data", stored.data, self.data))
            if then and now and then != now
        ]
        if not found and stored.source and self.source:
            then, now = dict(_leaves(stored.source)), dict(_leaves(self.source))
            # An option that only one side knows is of another version of the package.
            changed = [key for key in sorted(then.keys() & now.keys()) if not _same(then[key], now[key])]
            found += [f"data.source{key} {then[key]}, here {now[key]}" for key in changed]
        return found


def find_run_checkpoint(which: str, runs: Path, expected: RunDescription | None = None) -> str:
    """Return a checkpoint of the latest run that fits.

    The latest run is the one with the largest number, whatever the times of its files: clocks are set back, and copies are new. The newest
    checkpoint of a run is the one with the most optimizer steps; the edited one is newer than the trained one. Only checkpoint folders that do not
    contain their steps are compared by modification time, and are older than all others.

    Args:
        which: ``last``: the run's newest checkpoint; ``best``: the one that the run would test.
        runs: Folder of the runs, one ``version_*`` each.
        expected: Model and data that the run must have; default: any.

    Raises:
        FileNotFoundError: If there is none; the message names the nearest run and how it differs.
    """
    nearest: tuple[int, str] | None = None
    for _, run in run_versions(runs):
        newest = _newest(run / "checkpoints")
        if newest is None:
            continue
        other = (expected or RunDescription()).differences(_stored(run, newest))
        if not other:
            if nearest:
                log.info("%s is that of %s; later runs are of another model or other data", which, run)
            return str(newest if which == "last" else _best(newest, runs))
        if nearest is None or len(other) < nearest[0]:
            nearest = len(other), f"the nearest run is {run}: {'; '.join(other)}. To use it nevertheless, give --ckpt_path {newest}"
    if nearest:
        raise FileNotFoundError(f"no run under {runs} has this model and this data; {nearest[1]}")
    raise FileNotFoundError(f"no {which} checkpoint under {runs}; give the file with --ckpt_path")


def _newest(folder: Path) -> Path | None:
    named = [path for name in ("last*.ckpt", EDITED) for path in folder.glob(name)]
    progress = {path: _progress(path) for path in named}
    if not named or None in progress.values():
        # A run killed while `last.ckpt` was replaced leaves none, or a link to nowhere; the checkpoints of epochs are whole.
        progress |= {path: _progress(path) for path in folder.glob("*.ckpt") if path not in progress}
    known = {path: reached for path, reached in progress.items() if reached is not None}
    return max(known, key=lambda path: (known[path], path.name == EDITED, path.name == "last.ckpt", path.name), default=None)


class _Progress(NamedTuple):
    """Progress of a checkpoint, for comparison with others.

    Attributes:
        steps: Optimizer steps; -1 if they are not known.
        time: Modification time if the steps are not known, otherwise 0.
    """

    steps: float
    time: float = 0.0


def _progress(path: Path) -> _Progress | None:
    """Return the progress of a checkpoint, ``None`` if it is not whole."""
    if not path.exists():
        return None
    if path.is_dir():
        steps = _folder_steps(path)
        return _Progress(-1.0, path.stat().st_mtime) if steps is None else _Progress(steps)
    try:
        return _Progress(float(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]))
    except Exception as error:  # whatever a damaged file makes torch raise
        log.warning("%s is no whole checkpoint and is left out (%s)", path, type(error).__name__)
        return None


def _folder_steps(folder: Path) -> float | None:
    """Return the optimizer steps of a checkpoint folder from its state, or else from its name; ``None`` if neither contains them."""
    # Of FSDP and of DeepSpeed, each beside its shards.
    for state in (folder / "meta.pt", *sorted((folder / "checkpoint").glob("*mp_rank_00_model_states.pt"))):
        with suppress(OSError, ValueError):
            steps = read_plain(state).get("global_step")
            if isinstance(steps, int):
                return float(steps)
    named = re.search(r"step=(\d+)", folder.name)
    return float(named[1]) if named else None


def _best(newest: Path, runs: Path) -> Path:
    """Return the checkpoint that a run would test, by what its newest one says."""
    if newest.name == EDITED or newest.is_dir():
        return newest
    states = read_plain(newest).get("callbacks") or {}
    found = [state for key, state in states.items() if str(key).startswith("ModelCheckpoint") and state.get("best_model_path")]
    if not found:
        raise FileNotFoundError(f"{newest} does not say which checkpoint of its run is the best one; give the file with --ckpt_path")
    state = max(found, key=lambda state: state.get("monitor") is not None)
    stored = Path(state["best_model_path"])
    # The run's folder may have another name by now; a resumed run may still have its best checkpoint in the folder of the first.
    own = stored.parent == Path(state.get("dirpath") or stored.parent)
    places = [newest.parent / stored.name] if own else [runs.joinpath(*stored.parts[-3:]), stored]
    existing = [path for path in places if path.exists()]
    if not existing:
        raise FileNotFoundError(
            f"the best checkpoint of {newest.parent.parent} is gone: {places[0]} does not exist; give another file with --ckpt_path"
        )
    return existing[0]


def _stored(run: Path, checkpoint: Path) -> RunDescription:
    """Return what a run was made of, by its configuration or else by its checkpoint."""
    with suppress(OSError, ValueError):
        if config := read_yaml(run / "config_fit.yaml"):
            return RunDescription.from_config(config)
    if checkpoint.is_dir():
        return RunDescription()
    values = read_plain(checkpoint).get("hyper_parameters") or {}
    return RunDescription(values.get("_class_path"))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, prefix if key == "init_args" else f"{prefix}.{key}")
    else:
        yield prefix, tree


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, str) and isinstance(now, str) and os.path.realpath(then) == os.path.realpath(now):
        return True
    return json.dumps(then, default=str) == json.dumps(now, default=str)
