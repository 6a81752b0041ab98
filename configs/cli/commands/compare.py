"""``malleable compare``: the test metrics of several runs side by side, with paired intervals where the runs tested the same rows; without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from malleable.callbacks.report.metric_notes import marked
from malleable.callbacks.report.page import number, plain_table
from malleable.datamodules.files.user_files import reading
from malleable.lightning_modules.metrics.significance import paired_bootstrap, row_values

METRICS_FILE = "metrics.json"
# As in malleable.callbacks.report.row_recorder, which imports torch.
ROWS_FILE = "test_rows.safetensors"
DIGEST = "asked"
SHOWN = 3


@dataclass(frozen=True)
class Run:
    """The report of a run.

    Attributes:
        name: Heading of its column.
        metrics: Test metrics, without the split's name.
        rows: ``sample_id``, ``target`` and ``rank`` of each test row; empty where they are not stored.
        digest: Of what the test rows ask; empty where it is not stored.
        protocol: The settings that decide what is tested, by dotted name; ``None`` where there is no configuration.
    """

    name: str
    metrics: Mapping[str, float]
    rows: Mapping[str, NDArray[Any]]
    digest: str
    protocol: Mapping[str, Any] | None


HELP = """usage: malleable compare [--all] RUN RUN [RUN ...]

Show the test metrics of runs side by side; differences to the first run have paired 95 % intervals where the test rows are the same.

  RUN    a run folder such as runs/sprec/tiny/version_0, or a name such as sprec/tiny for the latest run below `runs`
  --all  show all metrics and cut-offs
"""


def run_compare(words: Sequence[str]) -> None:
    """Run ``malleable compare [--all] RUN RUN...``.

    Args:
        words: Runs: folders such as ``runs/sprec/tiny/version_0``, or names such as ``sprec/tiny`` for the latest run below ``runs``. The first is
            the one to compare with. ``--all`` lists all cut-offs.

    Raises:
        ValueError: If there are fewer than two runs, or an option is unknown.
        FileNotFoundError: If a run or its report is missing.
    """
    if set(words) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return
    names = [word for word in words if not word.startswith("-")]
    if unknown := set(words) - set(names) - {"--all"}:
        raise ValueError(f"malleable compare has no option {sorted(unknown)[0]}; its only option is --all")
    if len(names) < 2:
        raise ValueError("malleable compare needs two runs at least: malleable compare runs/sprec/tiny/version_0 runs/sft/tiny/version_0")
    runs = [load_run(name) for name in names]
    sys.stdout.write(comparison(runs, every="--all" in words))


def load_run(name: str, runs: Path = Path("runs")) -> Run:
    """Read the report of a run.

    Args:
        name: A run folder, its report, or the name of a recipe.
        runs: Where the runs of recipes are.

    Raises:
        FileNotFoundError: If there is no report.
        ValueError: If the report is damaged.
    """
    folder = find_report(name, runs)
    path = folder / METRICS_FILE
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        own = {key.removeprefix("test_"): float(value) for key, value in metrics.items() if key.startswith("test_") and value is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of a run ({error}); test the run again") from error
    if not own:
        raise ValueError(f"{path} has no test metrics; run `malleable test` on the run's checkpoint")
    return Run(folder.parent.as_posix().removeprefix(f"{runs}/"), own, *_rows(folder / ROWS_FILE), _protocol(folder.parent))


def find_report(name: str, runs: Path) -> Path:
    """Return the folder with the metrics of a run.

    Raises:
        FileNotFoundError: If there is none.
    """
    place = Path(name)
    if place.name == METRICS_FILE and place.is_file():
        return place.parent
    recipe = runs / name.removesuffix(".yaml")
    versions = sorted(recipe.glob("version_*"), key=lambda path: (len(path.name), path.name), reverse=True)
    places = [place, place / "report", recipe / "report", *(version / "report" for version in versions)]
    found = [folder for folder in places if (folder / METRICS_FILE).is_file()]
    if not found:
        raise FileNotFoundError(
            f"no report of a run {name!r}: neither {place / 'report' / METRICS_FILE} nor {recipe}/version_*/report/{METRICS_FILE} is there; "
            "the callback RunReport writes it after a test"
        )
    return found[0]


def comparison(runs: Sequence[Run], every: bool = False) -> str:
    """Return the table, and what is to be said of it.

    Args:
        runs: The first one is the one to compare with.
        every: List all metrics, not only those at cut-off 10 and without a cut-off.
    """
    first, *others = runs
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    shown = [name for name in names if every or _is_main(name)] or names
    reasons = [why_unpaired(first, other) for other in others]
    header = ["metric", first.name]
    for other, reason in zip(others, reasons, strict=True):
        header += [other.name, "difference (95 %)" if reason is None else "not paired"]
    rows = []
    for name in shown:
        cells = [marked(name), number(first.metrics.get(name))]
        for other, reason in zip(others, reasons, strict=True):
            cells += [number(other.metrics.get(name)), difference(name, first, other) if reason is None else ""]
        rows.append(cells)
    lines = [plain_table(header, rows), ""]
    if any(reason is None for reason in reasons):
        lines.append("differences to the first run: paired bootstrap over the test rows, seed 0; * where the interval excludes 0")
    lines += [f"{other.name}: {reason}" for other, reason in zip(others, reasons, strict=True) if reason is not None]
    return "\n".join(lines) + "\n"


def difference(metric: str, first: Run, other: Run) -> str:
    """Return the difference of a metric with its interval; empty where it is no mean over rows."""
    one, two = (row_values(metric, run.rows["rank"]) for run in (first, other))
    if one is None or two is None or metric not in first.metrics or metric not in other.metrics:
        return ""
    mean, low, high = paired_bootstrap(one, two)
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]{' *' if low > 0 or high < 0 else '  '}"


def why_unpaired(first: Run, other: Run) -> str | None:
    """Return why rows of two runs cannot be paired; ``None`` if they can."""
    if first.protocol is not None and other.protocol is not None and (changed := _changed(first.protocol, other.protocol)):
        return f"measured on other data or under another protocol ({', '.join(changed[:SHOWN])}{', ...' if len(changed) > SHOWN else ''})"
    if not first.rows or not other.rows:
        return "the ranks of its test rows, or of the first run's, are not stored; test the run again with the callback RunReport"
    if first.digest != other.digest or any(not np.array_equal(first.rows[name], other.rows[name]) for name in ("sample_id", "target")):
        return "it was tested on other rows, or with other candidates, seen items or titles"
    return None


def _is_main(name: str) -> bool:
    stem, _, cut = name.rpartition("_")
    return not (stem and cut.isdigit()) or cut == "10" or stem == "hits"


def _rows(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """Return the columns of a file of test rows, and the digest in it; nothing where there is no such file."""
    if not path.is_file():
        return {}, ""
    from safetensors import safe_open

    with reading(path), safe_open(path, framework="numpy") as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        digest = (file.metadata() or {}).get(DIGEST, "")
    return (rows, digest) if {"sample_id", "target", "rank"} <= rows.keys() and len(rows["rank"]) else ({}, "")


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
# Options of modules that belong to the protocol.
_PROTOCOL = ("exclude_seen", "decoding.exclude_seen", "decoding.grounding", "ranking.ties")


def _protocol(folder: Path) -> dict[str, Any] | None:
    """Return the settings of data and model that decide what is tested, by dotted name."""
    path = next((path for name in ("config_test.yaml", "config_fit.yaml") if (path := folder / name).is_file()), None)
    content: Any = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(data := content.get("data"), dict):
        return None
    found = dict(_leaves(data))
    if "split" in found:
        del found["split"]
        found |= {f"split.{name}": value for name, value in SPLIT_DEFAULTS.items()}
    model = dict(_leaves(content["model"])) if isinstance(content.get("model"), dict) else {}
    return found | {f"model.{name.rpartition('.')[2]}": model[name] for name in _PROTOCOL if name in model}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        if key in _NEUTRAL:
            continue
        if isinstance(value, Mapping):
            found += _leaves(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _changed(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Name the settings that differ; those of the model count where both have them."""
    names = [name for name in sorted(one.keys() | two.keys()) if not name.startswith("model.") or (name in one and name in two)]
    return [f"{name}: {one.get(name)} and {two.get(name)}" for name in names if one.get(name) != two.get(name)]
