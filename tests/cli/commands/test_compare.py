import csv
import io
import json
import logging
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from hostile import HOSTILE, is_inert
from safetensors.numpy import save_file

from malleable.callbacks.report.row_recorder import CONDITIONS, INPUTS, ROWS_FILE
from malleable.commands import reported_runs
from malleable.commands.compare import difference, run_compare
from malleable.commands.reported_runs import SPLIT_DEFAULTS, load_run
from malleable.datamodules.recommendation.splits import Split
from malleable.lightning_modules.metrics.significance import paired_bootstrap, row_values
from malleable.main import main

RANKS = {"a": np.array([1, 2, 30, 4] * 10), "b": np.array([1, 1, 3, 40] * 10)}


DATA = {"true items": "t", "seen items": "s", "candidates": "c", "titles": "40 titles (x)"}
GENRES = {"mgu": {"genres": "3 (g)", "histories": "with 90 items (h)"}}


def write_run(folder, ranks, split=None, target=None, seed=1, grounding="trie", command="fit", source=None, conditions=None, inputs=GENRES, first=0):
    """A run folder as a fit with its test leaves it, or a test."""
    ranks = np.where(ranks > 10, np.inf, ranks).astype(np.float32)
    report = folder / "report"
    report.mkdir(parents=True)
    values = {f"test_{name}": row_values(name, ranks).mean() for name in ("hr_5", "hr_10", "ndcg_10", "mrr_10")}
    extra = {
        "test_div_ratio_10": 0.5,
        "test_mgu_10": 0.125,
        "test_loss": 2.5,
        "test_gini_10": None,
        "val_hr_10": 0.1,
        "baseline_popularity_hr_10": 0.2,
    }
    (report / "metrics.json").write_text(json.dumps({**values, **extra}))
    save_file(
        {"sample_id": np.arange(first, first + len(ranks)), "target": np.arange(len(ranks)) if target is None else target, "rank": ranks},
        report / ROWS_FILE,
        metadata={} if conditions == {} else {CONDITIONS: json.dumps({**DATA, **(conditions or {})}), INPUTS: json.dumps(inputs)},
    )
    split = None if split is None else {**SPLIT_DEFAULTS, **split}
    data = {
        "class_path": "RecommendationDataModule",
        "init_args": {"source": {"class_path": "X", "init_args": source or {}}, "split": split, "seed": seed},
    }
    model = {"class_path": "malleable.SFT", "init_args": {"decoding": {"grounding": grounding}, "ks": [10]}}
    model = model if grounding else {"class_path": "malleable.ItemKNN"}
    (folder / f"config_{command}.yaml").write_text(yaml.safe_dump({"data": data, "model": model}))
    return str(folder)


def test_metrics_and_paired_intervals_of_two_runs(tmp_path, capsys):
    names = [write_run(tmp_path / name, ranks, seed=number) for number, (name, ranks) in enumerate(RANKS.items())]
    main(["compare", *names])
    text = capsys.readouterr().out
    assert "hr_10 ↑" in text
    assert "hr_5" not in text
    assert "baseline" not in text
    assert "difference (95 %)" in text
    assert "paired bootstrap over the test rows, seed 0" in text
    (line,) = (line for line in text.splitlines() if line.startswith("ndcg_10"))
    first, second = (load_run(name) for name in names)
    mean, low, high = paired_bootstrap(*(row_values("ndcg_10", run.rows["rank"]) for run in (first, second)))
    assert f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" in line
    assert difference("div_ratio_10", first, second) is None
    assert f"{second.metrics['ndcg_10']:.4f}" in line
    run_compare([*names, "--all"])
    assert "hr_5" in capsys.readouterr().out


def test_significant_difference_is_marked(tmp_path, capsys):
    run_compare([write_run(tmp_path / "a", np.full(50, 9)), write_run(tmp_path / "b", np.full(50, 1))])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["ndcg_10"].rstrip().endswith("*")
    assert not lines["hr_10"].rstrip().endswith("*")


OTHER = "it was tested with other candidates"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"split": {"kind": "global_time"}, "first": 30, "conditions": {"candidates": "x"}},
            "it was tested with other rows: 40 instead of 40, of which 30 are not in the first run (split.kind: leave_last_out and global_time)",
        ),
        ({"split": {"candidates": 20}, "conditions": {"candidates": "x"}}, f"{OTHER} (split.candidates: None and 20)"),
        ({"conditions": {"seen items": "x", "candidates": "x"}}, "it was tested with other seen items, other candidates"),
        ({"grounding": "embedding"}, "it was tested with another protocol (model.grounding: trie and embedding)"),
        ({"target": np.zeros(40, dtype=int)}, "it was tested with other true items"),
        (
            {"conditions": {"titles": "41 titles (y)", "true items": "u"}},
            "it was tested with other titles: 41 titles (y) instead of 40 titles (x)",
        ),
        ({"conditions": {}}, "the ranks of the test rows of this run are not stored ("),
    ],
)
def test_runs_of_other_data_or_protocols_are_marked_and_not_paired(change, reason, tmp_path, capsys):
    names = [write_run(tmp_path / "a", RANKS["a"]), write_run(tmp_path / "b", RANKS["b"], **change)]
    run_compare(names)
    text = capsys.readouterr().out
    assert f"{names[1]}: {reason}" in text
    assert "not paired" in text
    assert "[" not in text.partition("\n\n")[0]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"mgu": {**GENRES["mgu"], "genres": "4 (x)"}}, "genres 3 (g) and 4 (x)"),
        ({"mgu": {**GENRES["mgu"], "histories": "with 95 items (x)"}}, "histories with 90 items (h) and with 95 items (x)"),
        ({}, "genres 3 (g) and unknown, histories with 90 items (h) and unknown"),
    ],
)
def test_metrics_of_other_genres_are_not_compared(inputs, reason, tmp_path, capsys):
    names = [write_run(tmp_path / name, RANKS[name], **options) for name, options in (("a", {}), ("b", {"inputs": inputs}))]
    run_compare(names)
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["mgu_10"].split()[2:] == ["0.1250", "not", "comparable"]
    assert "not comparable" not in lines["hr_10"]
    assert f"{names[1]}: mgu_10 not comparable, computed with other inputs ({reason})" in text
    run_compare([*names, "--format", "json"])
    (row,) = (row for row in json.loads(capsys.readouterr().out)["metrics"] if row["metric"] == "mgu_10")
    assert row["values"] == [0.125, None]
    assert row["not_comparable"] == [None, f"computed with other inputs ({reason})"]


def test_histories_of_other_rows_are_not_compared(tmp_path, capsys):
    other = {"mgu": {**GENRES["mgu"], "histories": "with 95 items (x)"}}
    run_compare([write_run(tmp_path / "a", RANKS["a"]), write_run(tmp_path / "b", RANKS["b"], inputs=other, first=1)])
    assert "not comparable" not in capsys.readouterr().out


def test_metrics_without_intervals_are_listed(tmp_path, capsys):
    run_compare([write_run(tmp_path / name, ranks) for name, ranks in RANKS.items()])
    text = capsys.readouterr().out
    assert "no interval for div_ratio_10, mgu_10: computed from totals over all rows, not a mean over rows\n" in text
    assert "no interval for loss: the values of single rows are not stored\n" in text
    run_compare([write_run(tmp_path / "c", RANKS["a"]), write_run(tmp_path / "d", RANKS["b"], first=1)])
    assert "no interval" not in capsys.readouterr().out


def test_options_without_effect_on_test_rows_are_ignored(tmp_path, capsys):
    names = [
        write_run(tmp_path / "a", RANKS["a"]),
        write_run(tmp_path / "b", RANKS["b"], {"history_length": 3, "val_limit": 4}, seed=2, grounding=""),
        write_run(tmp_path / "c", RANKS["b"], source={"interactions": "other.csv", "encoding": "cp1252", "delimiter": ";"}),
    ]
    run_compare(names)
    text = capsys.readouterr().out
    assert text.count("difference (95 %)") == 2
    assert "not paired" not in text


def test_headings_contain_the_models_if_they_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, grounding in enumerate(("trie", "")):
        write_run(tmp_path / "runs" / "shop" / f"version_{number}", RANKS["a"], grounding=grounding)
    run_compare(["shop/version_0", "shop/version_1"])
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split("  ")[0] == "metric"
    assert "SFT shop/version_0" in header
    assert "ItemKNN shop/version_1" in header
    run_compare(["shop/version_0", "shop/version_0"])
    assert "SFT" not in capsys.readouterr().out


def test_the_name_of_a_recipe_is_its_latest_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs" / "shop"
    write_run(runs / "version_0", RANKS["a"])
    write_run(runs / "version_1", RANKS["b"])
    write_run(runs / "version_2", RANKS["b"], grounding="", command="test")
    assert load_run("shop").name == load_run("runs/shop").name == "shop/version_1"
    run_compare(["shop", "shop/version_2"])
    text = capsys.readouterr().out
    assert (
        "shop: using runs/shop/version_1 (SFT, fit), the latest fit; other runs: runs/shop/version_2 (ItemKNN, test), runs/shop/version_0 (SFT, fit)"
        in text
    )
    write_run(tmp_path / "runs" / "baselines" / "version_0", RANKS["a"], command="test", grounding="")
    assert load_run("baselines").note == "baselines: using runs/baselines/version_0 (ItemKNN, test), the latest test"


def test_error_for_a_run_without_a_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "shop" / "version_3"
    folder.mkdir(parents=True)
    (folder / "config_predict.yaml").write_text("model: ItemKNN\n")
    for name in ("shop/version_3", "runs/shop/version_3"):
        with pytest.raises(FileNotFoundError, match=r"^runs/shop/version_3 is a run of `predict` without the report of a test: runs/shop/ver"):
            load_run(name)
    with pytest.raises(FileNotFoundError, match=r"^no run of 'shop' has the report of a test \(runs/shop/version_3 \(ItemKNN, predict\)\)"):
        load_run("shop")


def test_other_formats(tmp_path, capsys, caplog):
    names = [
        write_run(tmp_path / "a", RANKS["a"]),
        write_run(tmp_path / "b", RANKS["b"], grounding=""),
        write_run(tmp_path / "c", RANKS["b"], conditions={"candidates": "x"}),
    ]
    first, second, _ = (load_run(name) for name in names)
    mean, low, high = difference("ndcg_10", first, second)
    run_compare([*names, "--format", "markdown"])
    text = capsys.readouterr().out
    assert text.startswith(f"| metric | SFT {names[0]} | ItemKNN {names[1]} | difference (95 %) | SFT {names[2]} | not paired |\n| --- | ")
    assert "\n\n- differences to the first run" in text
    with caplog.at_level(logging.INFO):
        run_compare([*names, "--format=csv"])
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    own = f"ItemKNN {names[1]}"
    assert header == ["metric", f"SFT {names[0]}", own, f"{own}: difference", f"{own}: low", f"{own}: high", f"SFT {names[2]}"]
    (row,) = (row for row in rows if row[0] == "ndcg_10")
    assert [float(cell) for cell in row[1:6]] == [first.metrics["ndcg_10"], second.metrics["ndcg_10"], mean, low, high]
    assert f"SFT {names[2]}: {OTHER}" in caplog.text
    run_compare(["--format", "json", *names])
    content = json.loads(capsys.readouterr().out)
    assert [run["model"] for run in content["runs"]] == ["SFT", "ItemKNN", "SFT"]
    assert [run["not_paired"] for run in content["runs"]] == [None, None, OTHER]
    (row,) = (row for row in content["metrics"] if row["metric"] == "ndcg_10")
    assert row["differences"] == [None, {"mean": mean, "low": low, "high": high}, None]


def test_values_of_other_people_are_not_interpreted(tmp_path, capsys, monkeypatch):
    """Values of settings reach the notes, names of folders the headings."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "=1+1", RANKS["a"])
    write_run(tmp_path / "other", RANKS["b"], source={"interactions": HOSTILE}, conditions={"candidates": "x"})
    main(["compare", "=1+1", "other", "--format", "markdown"])
    assert is_inert(capsys.readouterr().out)
    main(["compare", "=1+1", "=1+1", "--format", "csv"])
    header = next(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len(header) == 6
    assert all(cell.startswith("'=1+1") for cell in header[1:])


def test_constants_equal_those_of_the_report():
    assert (reported_runs.ROWS_FILE, reported_runs.CONDITIONS, reported_runs.INPUTS) == (ROWS_FILE, CONDITIONS, INPUTS)


def test_the_known_defaults_are_those_of_the_class():
    defaults = asdict(Split())
    assert {name: list(defaults[name]) if name == "fractions" else defaults[name] for name in SPLIT_DEFAULTS} == SPLIT_DEFAULTS


def test_runs_without_stored_rows_are_still_listed(tmp_path, capsys):
    names = [write_run(tmp_path / name, RANKS["a"]) for name in "ab"]
    (tmp_path / "b" / "report" / "test_rows.safetensors").unlink()
    run_compare(names)
    text = capsys.readouterr().out
    assert f"the ranks of the test rows of this run are not stored ({tmp_path.as_posix()}/b/report/test_rows.safetensors does not exist)" in text
    run_compare(names[::-1])
    assert "the ranks of the test rows of the first run are not stored (" in capsys.readouterr().out


def test_recipe_name_selects_the_latest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for version in (2, 9, 10):
        write_run(tmp_path / "runs" / "sprec" / "tiny" / f"version_{version}", np.full(5, version))
    assert load_run("sprec/tiny.yaml").rows["rank"].tolist() == [10] * 5
    assert load_run("sprec/tiny.yaml").name == "sprec/tiny/version_10"
    assert load_run("sprec/tiny/version_9").rows["rank"].tolist() == [9] * 5
    assert load_run("runs/sprec/tiny/version_2").rows["rank"].tolist() == [2] * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one"], "needs at least two runs"),
        (["one", "--al"], "no option --al \\(did you mean --all\\?\\); its options are --all and --format"),
        (["one", "two", "--format", "cvs"], r"--format cvs: the formats are table, markdown, csv, json \(did you mean csv"),
        (["one", "two", "--format"], "the formats are"),
        (["nowhere", "nothing"], "no report of a run 'nowhere'"),
    ],
)
def test_wrong_arguments_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_compare(words)


HUGE = f'{{"test_hr_10": 1{"0" * 400}}}'
NESTED = f'{{"test_hr_10": {"[" * 50_000}'


@pytest.mark.parametrize("text", ["{", "[1]", '{"test_hr_10": "many"}', "{}", HUGE, NESTED], ids=range(6))
def test_damaged_report_error_contains_the_file(text, tmp_path):
    folder = write_run(tmp_path / "a", RANKS["a"])
    (tmp_path / "a" / "report" / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        load_run(folder)
    (tmp_path / "a" / "report" / "metrics.json").write_text('{"test_hr_10": 1}')
    (tmp_path / "a" / "report" / "test_rows.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"test_rows\.safetensors is damaged"):
        load_run(folder)


METADATA = {CONDITIONS: json.dumps(DATA), INPUTS: json.dumps(GENRES)}


@pytest.mark.parametrize("metadata", [{CONDITIONS: "{"}, {CONDITIONS: "[]"}, {INPUTS: '{"mgu": {"genres": 3}}'}, {INPUTS: '{"mgu": 3}'}], ids=str)
def test_damaged_metadata_error_contains_the_file(metadata, tmp_path):
    name = write_run(tmp_path / "a", np.ones(4))
    save_file({name: np.ones(4) for name in ("sample_id", "target", "rank")}, tmp_path / "a/report" / ROWS_FILE, metadata=METADATA | metadata)
    with pytest.raises(ValueError, match=r"test_rows\.safetensors"):
        load_run(name)


@pytest.mark.parametrize("rows", [{"rank": np.ones(3)}, {"target": np.ones((4, 2))}, {"sample_id": np.zeros(4, dtype=bool)}], ids=str)
def test_damaged_rows_error_contains_the_file(rows, tmp_path):
    name = write_run(tmp_path / "a", np.ones(4))
    save_file({"sample_id": np.arange(4), "target": np.arange(4), "rank": np.ones(4)} | rows, tmp_path / "a/report" / ROWS_FILE, metadata=METADATA)
    with pytest.raises(ValueError, match=r"test_rows\.safetensors is damaged: rank, sample_id, target must be lists of numbers of one length"):
        load_run(name)


def test_it_starts_without_torch():
    code = "import sys, malleable.commands.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(capsys, flag):
    run_compare([flag])
    assert capsys.readouterr().out.startswith("usage: malleable compare [--all] [--format FORMAT] RUN RUN")
