"""Runs that ``malleable compare`` reads: found by folder or by the name of a recipe, with the metrics and the rows of their tests; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from malleable.datamodules.files.user_files import reading

METRICS_FILE = "metrics.json"
# As in malleable.callbacks.report.row_recorder, which imports torch.
ROWS_FILE = "test_rows.safetensors"
DIGEST = "asked"
SHOWN = 3
LISTED = 5


@dataclass(frozen=True)
class Run:
    """The report of a run.

    Attributes:
        name: Folder of the run, below the folder of all runs where it lies there.
        folder: Folder of the run.
        model: Class of the model; empty where there is no configuration.
        metrics: Test metrics, without the split's name.
        rows: ``sample_id``, ``target`` and ``rank`` of each test row; empty where they are not stored.
        digest: Of targets, seen items, candidates and titles of the test rows; empty where it is not stored.
        protocol: Options of the model that belong to the protocol of the test, by name.
        data: Options of the data module that decide what is tested, by dotted name; they tell why rows differ.
        note: How the run was chosen, where a name stands for several.
    """

    name: str
    folder: Path
    model: str
    metrics: Mapping[str, float]
    rows: Mapping[str, NDArray[Any]]
    digest: str
    protocol: Mapping[str, Any]
    data: Mapping[str, Any]
    note: str = ""


def load_run(name: str, runs: Path = Path("runs")) -> Run:
    """Read the report of a run.

    Args:
        name: A run folder, its report, or the name of a recipe.
        runs: Where the runs of recipes are.

    Raises:
        FileNotFoundError: If there is no report of a test.
        ValueError: If the report is damaged.
    """
    folder, note = find_report(name, runs)
    path = folder / METRICS_FILE
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        own = {key.removeprefix("test_"): float(value) for key, value in metrics.items() if key.startswith("test_") and value is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of a run ({error}); test the run again") from error
    if not own:
        raise ValueError(f"{path} has no test metrics; run `malleable test` on the run's checkpoint")
    config = _config(folder.parent)
    model = dict(_leaves(config["model"])) if isinstance(config.get("model"), dict) else {}
    return Run(
        name=folder.parent.as_posix().removeprefix(f"{runs}/"),
        folder=folder.parent,
        model=_model(config),
        metrics=own,
        **_rows(folder / ROWS_FILE),
        protocol={name.rpartition(".")[2]: model[name] for name in _PROTOCOL if name in model},
        data=_data(config),
        note=note,
    )


def find_report(name: str, runs: Path) -> tuple[Path, str]:
    """Return the folder with the metrics of a run, and how it was chosen where the name stands for several runs.

    The name of a recipe means its latest run with a fit, or else its latest test: a baseline that was tested under the recipe is a run of its own.

    Raises:
        FileNotFoundError: If there is none.
    """
    place = Path(name)
    if place.name == METRICS_FILE and place.is_file():
        return place.parent, ""
    recipe = runs / name.removesuffix(".yaml")
    for folder in (place, place / "report", recipe / "report"):
        if (folder / METRICS_FILE).is_file():
            return folder, ""
    versions = [version for folder in dict.fromkeys((recipe, place)) for version in _versions(folder)]
    tested = [version for version in versions if _is_tested(version)]
    if tested:
        return _latest(name, tested)
    raise FileNotFoundError(_missing(name, place, recipe, versions))


def _latest(name: str, tested: list[Path]) -> tuple[Path, str]:
    fits = [version for version in tested if (version / "config_fit.yaml").is_file()]
    chosen = (fits or tested)[0]
    others = [f"{version.as_posix()} ({_described(version)})" for version in tested if version != chosen]
    listed = f"; others: {', '.join(others[:LISTED])}{', ...' if len(others) > LISTED else ''}" if others else ""
    return chosen / "report", f"{name} is {chosen.as_posix()} ({_described(chosen)}), the latest {'fit' if fits else 'test'}{listed}"


def _missing(name: str, place: Path, recipe: Path, versions: list[Path]) -> str:
    """Return why a run has no report of a test."""
    folder = next((folder for folder in (place, recipe) if any(folder.glob("config_*.yaml"))), None)
    writes = "the callback RunReport writes it after a test"
    if folder is not None:
        commands = sorted(path.stem.removeprefix("config_") for path in folder.glob("config_*.yaml"))
        path = folder / "report" / METRICS_FILE
        return f"{folder.as_posix()} is a run of `{'`, `'.join(commands)}` without the report of a test: {path.as_posix()} does not exist; {writes}"
    if versions:
        known = ", ".join(f"{version.as_posix()} ({_described(version)})" for version in versions[:LISTED])
        return f"no run of {name!r} has the report of a test ({known}); {writes}"
    return (
        f"no report of a run {name!r}: neither {(place / 'report' / METRICS_FILE).as_posix()} nor "
        f"{recipe.as_posix()}/version_*/report/{METRICS_FILE} exists; {writes}"
    )


def _versions(folder: Path) -> list[Path]:
    """Return the runs below a folder, the latest first."""
    return sorted(folder.glob("version_*"), key=lambda path: (len(path.name), path.name), reverse=True)


def _is_tested(folder: Path) -> bool:
    path = folder / "report" / METRICS_FILE
    return path.is_file() and '"test_' in path.read_text(encoding="utf-8", errors="replace")


def _described(folder: Path) -> str:
    """Return model and command of a run."""
    commands = [command for command in _COMMANDS if (folder / f"config_{command}.yaml").is_file()]
    return ", ".join(filter(None, [_model(_config(folder)), "fit" if "fit" in commands else "".join(commands[:1])]))


def _rows(path: Path) -> dict[str, Any]:
    """Return the columns of a file of test rows, and the digest in it; nothing where there is no such file."""
    rows: dict[str, Any] = {}
    digest = ""
    if path.is_file():
        from safetensors import safe_open

        with reading(path), safe_open(path, framework="numpy") as file:
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            digest = (file.metadata() or {}).get(DIGEST, "")
    whole = {"sample_id", "target", "rank"} <= rows.keys() and len(rows["rank"]) and digest
    return {"rows": rows, "digest": digest} if whole else {"rows": {}, "digest": ""}


# Options of data modules that change neither the rows of the test nor what they are compared with.
_NEUTRAL = {
    "batch_size", "cache_dir", "eval_batch_size", "extend_catalog", "global_batch_size", "group_queries", "history_length", "local_files_only",
    "max_prompt_length", "negatives", "num_workers", "pack_length", "predict_file", "predict_users", "seed", "template", "tokenizer",
    "train_limit", "train_view", "val_limit", "vocab_size",
}  # fmt: skip
# What an absent `split` means; tests compare it with the class, which takes half a second to import.
SPLIT_DEFAULTS: dict[str, Any] = {
    "kind": "leave_last_out", "min_rating": None, "min_user_events": 5, "min_item_events": 1, "fractions": [0.8, 0.1, 0.1], "repeats": "drop",
    "candidates": None, "test_limit": None,
}  # fmt: skip
# The command whose configuration says what was tested comes first.
_COMMANDS = ("test", "fit", "validate", "predict")
# Options of models that belong to the protocol.
_PROTOCOL = ("exclude_seen", "decoding.exclude_seen", "decoding.grounding", "ranking.ties")


def _config(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of a run; empty where there is none."""
    path = next((path for command in _COMMANDS if (path := folder / f"config_{command}.yaml").is_file()), None)
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no configuration of a run ({error}); test the run again") from error
    return content if isinstance(content, dict) else {}


def _model(config: Mapping[str, Any]) -> str:
    """Return the name of the model's class; empty where it is not known."""
    model = config.get("model")
    path = model.get("class_path") if isinstance(model, dict) else model
    return str(path or "").rpartition(".")[2]


def _data(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of data that decide what is tested, by dotted name."""
    data = config.get("data")
    found = dict(_leaves(data)) if isinstance(data, dict) else {}
    if "split" in found:
        del found["split"]
        found |= {f"split.{name}": value for name, value in SPLIT_DEFAULTS.items()}
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key in _NEUTRAL:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def why_unpaired(first: Run, other: Run) -> str | None:
    """Return why the test rows of two runs cannot be paired; ``None`` if they can.

    What the rows ask and which items there are decides, not the options that led there: the same table under another name or in another encoding
    is the same data.
    """
    common = [name for name in first.protocol if name in other.protocol]
    if changed := _changed(*({f"model.{name}": run.protocol[name] for name in common} for run in (first, other))):
        return f"measured under another protocol ({changed})"
    if not first.rows or not other.rows:
        return "the ranks of its test rows, or of the first run's, are not stored; test the run again with the callback RunReport"
    if first.digest != other.digest or any(not np.array_equal(first.rows[name], other.rows[name]) for name in ("sample_id", "target")):
        changed = _changed(first.data, other.data)
        return f"it was tested on other rows, or with other candidates, seen items or titles{f' ({changed})' if changed else ''}"
    return None


def _changed(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Name the options that differ; the first few of them."""
    found = [f"{name}: {one.get(name)} and {two.get(name)}" for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    return ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
