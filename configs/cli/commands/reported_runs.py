"""Reader of the reports of runs for ``malleable compare``: test metrics and test rows. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from malleable.callbacks.report.metric_notes import differing_inputs
from malleable.datamodules.files.text_files import parse_json, read_json
from malleable.datamodules.files.user_files import reading
from malleable.datamodules.files.yaml_files import read_yaml

METRICS_FILE = "metrics.json"
# Copies of the constants in malleable.callbacks.report.row_recorder, which imports torch.
ROWS_FILE = "test_rows.safetensors"
CONDITIONS = "conditions"
INPUTS = "inputs"
_COLUMNS = {"sample_id", "target", "rank"}
SHOWN = 3  # maximum number of differing options in a message
LISTED = 5  # maximum number of runs in a message


@dataclass(frozen=True)
class Run:
    """Report of a run.

    Attributes:
        name: Path of the run folder, relative to the folder of all runs if it is inside it.
        folder: Run folder.
        model: Class name of the model; empty if the run has no configuration.
        metrics: Test metrics, by name without the prefix ``test_``.
        rows: ``sample_id``, ``target`` and ``rank`` of each test row; empty if they are not stored.
        protocol: Options of the model that belong to the evaluation protocol, by name.
        data: Options of the data module that affect the test rows, by dotted name. They explain differences between the rows of two runs.
        note: Text that says which run was chosen, if several runs match the given name; otherwise empty.
        missing: Reason why ``rows`` is empty.
        conditions: Checksums of true items, seen items, candidates and titles of the test rows, by name.
        inputs: What metrics were computed with, such as genres, see :class:`~malleable.lightning_modules.metrics.exposure.ExposureMetrics`.
    """

    name: str
    folder: Path
    model: str
    metrics: Mapping[str, float]
    rows: Mapping[str, NDArray[Any]]
    protocol: Mapping[str, Any]
    data: Mapping[str, Any]
    note: str = ""
    missing: str = ""
    conditions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def load_run(name: str, runs: Path = Path("runs")) -> Run:
    """Read the report of a run.

    Args:
        name: A run folder, its report, or the name of a recipe.
        runs: Folder with the runs of recipes.

    Raises:
        FileNotFoundError: If the run has no report of a test.
        ValueError: If the report is damaged.
    """
    folder, note = find_report(name, runs)
    path = folder / METRICS_FILE
    try:
        metrics = read_json(path)
        own = {key.removeprefix("test_"): float(value) for key, value in metrics.items() if key.startswith("test_") and value is not None}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not the report of a run ({error}); test the run again") from error
    if not own:
        raise ValueError(f"{path} has no test metrics; run `malleable test` on the checkpoint of the run")
    config = _config(folder.parent)
    model = dict(_flatten(config["model"])) if isinstance(config.get("model"), dict) else {}
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
    """Return the report folder of a run, and a note on the choice if several runs match the name.

    For the name of a recipe, the latest tested run with a fit is chosen, or the latest tested run if none has a fit. Thus a later test without a fit,
    e.g. of a baseline, is not chosen.

    Raises:
        FileNotFoundError: If no run has a report of a test.
    """
    path = Path(name)
    if path.name == METRICS_FILE and path.is_file():
        return path.parent, ""
    recipe = runs / name.removesuffix(".yaml")
    for folder in (path, path / "report", recipe / "report"):
        if (folder / METRICS_FILE).is_file():
            return folder, ""
    versions = [version for folder in dict.fromkeys((recipe, path)) for version in _versions(folder)]
    tested = [version for version in versions if _is_tested(version)]
    if tested:
        return _latest(name, tested)
    raise FileNotFoundError(_missing_report(name, path, recipe, versions))


def _latest(name: str, tested: list[Path]) -> tuple[Path, str]:
    fits = [version for version in tested if (version / "config_fit.yaml").is_file()]
    chosen = (fits or tested)[0]
    others = [f"{version.as_posix()} ({_model_and_command(version)})" for version in tested if version != chosen]
    listed = f"; other runs: {', '.join(others[:LISTED])}{', ...' if len(others) > LISTED else ''}" if others else ""
    return chosen / "report", f"{name}: using {chosen.as_posix()} ({_model_and_command(chosen)}), the latest {'fit' if fits else 'test'}{listed}"


def _missing_report(name: str, given: Path, recipe: Path, versions: list[Path]) -> str:
    """Return the error message for a run without the report of a test."""
    folder = next((folder for folder in (given, recipe) if any(folder.glob("config_*.yaml"))), None)
    remedy = "run `malleable test` with the callback RunReport to write it"
    if folder is not None:
        commands = sorted(path.stem.removeprefix("config_") for path in folder.glob("config_*.yaml"))
        path = folder / "report" / METRICS_FILE
        return f"{folder.as_posix()} is a run of `{'`, `'.join(commands)}` without the report of a test: {path.as_posix()} does not exist; {remedy}"
    if versions:
        known = ", ".join(f"{version.as_posix()} ({_model_and_command(version)})" for version in versions[:LISTED])
        return f"no run of {name!r} has the report of a test ({known}); {remedy}"
    return (
        f"no report of a run {name!r}: neither {(given / 'report' / METRICS_FILE).as_posix()} nor "
        f"{recipe.as_posix()}/version_*/report/{METRICS_FILE} exists; {remedy}"
    )


def _versions(folder: Path) -> list[Path]:
    """Return the run folders in a folder, the latest first."""
    return sorted(folder.glob("version_*"), key=lambda path: (len(path.name), path.name), reverse=True)


def _is_tested(folder: Path) -> bool:
    path = folder / "report" / METRICS_FILE
    return path.is_file() and '"test_' in path.read_text(encoding="utf-8", errors="replace")


def _model_and_command(folder: Path) -> str:
    commands = [command for command in _COMMANDS if (folder / f"config_{command}.yaml").is_file()]
    return ", ".join(filter(None, [_model(_config(folder)), "fit" if "fit" in commands else "".join(commands[:1])]))


def _rows(path: Path) -> dict[str, Any]:
    """Return the columns and the metadata of a file of test rows, or the reason why there are no rows."""
    if not path.is_file():
        return {"rows": {}, "missing": f"{path.as_posix()} does not exist"}
    from safetensors import safe_open

    with reading(path), safe_open(path, framework="numpy") as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        metadata = file.metadata() or {}
    if not rows.keys() >= _COLUMNS or not metadata.keys() >= {CONDITIONS, INPUTS}:
        return {"rows": {}, "missing": f"{path.as_posix()} was written by another version"}
    if any(rows[name].ndim != 1 or len(rows[name]) != rows["rank"].size or rows[name].dtype.kind not in "iuf" for name in _COLUMNS):
        raise ValueError(f"{path} is damaged: {', '.join(sorted(_COLUMNS))} must be lists of numbers of one length; test the run again")
    conditions, inputs = (parse_json(metadata[name], f"{path}, metadata {name}") for name in (CONDITIONS, INPUTS))
    if not _are_texts(conditions) or not isinstance(inputs, dict) or not all(map(_are_texts, inputs.values())):
        raise ValueError(f"{path} is damaged: its metadata {CONDITIONS} and {INPUTS} must contain texts; test the run again")
    found = {"conditions": conditions, "inputs": inputs}
    return {"rows": rows, **found} if rows["rank"].size else {"rows": {}, "missing": f"{path.as_posix()} has no rows", **found}


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


# Options of data modules that change neither the test rows nor the items that are ranked.
_NEUTRAL = {
    "batch_size", "cache_dir", "eval_batch_size", "extend_catalog", "global_batch_size", "group_queries", "history_length", "local_files_only",
    "max_prompt_length", "negatives", "num_workers", "pack_length", "predict_file", "predict_users", "seed", "template", "tokenizer",
    "train_limit", "train_view", "val_limit", "vocab_size",
}  # fmt: skip
# Default values of `data.split`. They are repeated here because the import of the class takes half a second; a test compares them.
SPLIT_DEFAULTS: dict[str, Any] = {
    "kind": "leave_last_out", "min_rating": None, "min_user_events": 5, "min_item_events": 1, "fractions": [0.8, 0.1, 0.1], "repeats": "drop",
    "candidates": None, "test_limit": None,
}  # fmt: skip
# Commands in the order in which their configurations are read: that of `test` contains the tested data.
_COMMANDS = ("test", "fit", "validate", "predict")
# Options of models that belong to the evaluation protocol.
_PROTOCOL = ("exclude_seen", "decoding.exclude_seen", "decoding.grounding", "ranking.ties")


def _config(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of a run; empty if it does not exist."""
    path = next((path for command in _COMMANDS if (path := folder / f"config_{command}.yaml").is_file()), None)
    if path is None:
        return {}
    try:
        return read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a run ({error}); test the run again") from error


def _model(config: Mapping[str, Any]) -> str:
    """Return the class name of the model; empty if it is unknown."""
    model = config.get("model")
    path = model.get("class_path") if isinstance(model, dict) else model
    return str(path or "").rpartition(".")[2]


def _data(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the data module that affect the test rows, by dotted name."""
    data = config.get("data")
    found = dict(_flatten(data)) if isinstance(data, dict) else {}
    if "split" in found:
        del found["split"]
        found |= {f"split.{name}": value for name, value in SPLIT_DEFAULTS.items()}
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key in _NEUTRAL:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def why_unpaired(first: Run, other: Run) -> str | None:
    """Return the reason why the test rows of two runs cannot be paired; ``None`` if they can.

    The rows and the items are compared, not the options of the data: a table with another file name or encoding can contain the same data.
    """
    common = [name for name in first.protocol if name in other.protocol]
    if changed := _changed(*({f"model.{name}": run.protocol[name] for name in common} for run in (first, other))):
        return f"it was tested with another protocol ({changed})"
    for run, whose in ((other, "this run"), (first, "the first run")):
        if not run.rows:
            return f"the ranks of the test rows of {whose} are not stored ({run.missing}); test it again with the callback RunReport"
    if found := _row_differences(first, other):
        changed = _changed(first.data, other.data)
        return f"it was tested with {', '.join(found)}{f' ({changed})' if changed else ''}"
    return None


def _row_differences(first: Run, other: Run) -> list[str]:
    """Return what differs between the test rows of two runs."""
    one, two = first.conditions, other.conditions
    found = []
    if one.get("titles") != two.get("titles"):
        found.append(f"other titles: {two.get('titles', 'none')} instead of {one.get('titles', 'none')}")
    if not _same_rows(first, other):
        ids, others = first.rows["sample_id"], other.rows["sample_id"]
        absent = int((~np.isin(others, ids)).sum())
        found.append(f"other rows: {len(others):,} instead of {len(ids):,}, of which {absent:,} are not in the first run")
    elif not found:
        # With other titles or rows, these differ anyway.
        names = [name for name in dict.fromkeys((*one, *two)) if one.get(name) != two.get(name)]
        if "true items" not in names and not np.array_equal(first.rows["target"], other.rows["target"]):
            names.insert(0, "true items")
        found += [f"other {name}" for name in names]
    return found


def _same_rows(first: Run, other: Run) -> bool:
    return bool(first.rows) and bool(other.rows) and np.array_equal(first.rows["sample_id"], other.rows["sample_id"])


def why_incomparable(metric: str, first: Run, other: Run) -> str:
    """Return the reason why the values of a metric in two runs cannot be compared, such as other genres; empty if they can.

    Histories are compared only if the rows are the same. All metrics depend on the rows, and :func:`why_unpaired` compares them.
    """
    if metric not in first.metrics or metric not in other.metrics:
        return ""
    found = differing_inputs(metric, first.inputs, other.inputs, () if _same_rows(first, other) else ("histories",))
    return found and f"computed with other inputs ({found})"


def _changed(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Return a text with the first options that differ."""
    found = [f"{name}: {one.get(name)} and {two.get(name)}" for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    return ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
