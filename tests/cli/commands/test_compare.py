import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from malleable.callbacks.report.row_recorder import DIGEST, ROWS_FILE
from malleable.commands import compare
from malleable.commands.compare import SPLIT_DEFAULTS, difference, load_run, run_compare
from malleable.datamodules.recommendation.splits import Split
from malleable.lightning_modules.metrics.significance import paired_bootstrap, row_values
from malleable.main import main

RANKS = {"a": np.array([1, 2, 30, 4] * 10), "b": np.array([1, 1, 3, 40] * 10)}


def write_run(folder, ranks, split=None, target=None, seed=1, grounding="trie", digest="x"):
    """A run folder as a test leaves it."""
    ranks = np.where(ranks > 10, np.inf, ranks).astype(np.float32)
    report = folder / "report"
    report.mkdir(parents=True)
    values = {f"test_{name}": row_values(name, ranks).mean() for name in ("hr_5", "hr_10", "ndcg_10", "mrr_10")}
    extra = {"test_div_ratio_10": 0.5, "test_gini_10": None, "val_hr_10": 0.1, "baseline_popularity_hr_10": 0.2}
    (report / "metrics.json").write_text(json.dumps({**values, **extra}))
    save_file(
        {"sample_id": np.arange(len(ranks)), "target": np.arange(len(ranks)) if target is None else target, "rank": ranks},
        report / ROWS_FILE,
        metadata={DIGEST: digest},
    )
    split = None if split is None else {**SPLIT_DEFAULTS, **split}
    data = {"class_path": "RecommendationDataModule", "init_args": {"source": {"class_path": "X"}, "split": split, "seed": seed}}
    model = {"class_path": "SFT", "init_args": {"decoding": {"grounding": grounding}, "ks": [10]}} if grounding else "ItemKNN"
    (folder / "config_fit.yaml").write_text(yaml.safe_dump({"data": data, "model": model}))
    return str(folder)


def test_two_runs_have_their_metrics_and_paired_intervals(tmp_path, capsys):
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
    assert difference("div_ratio_10", first, second) == ""
    assert f"{second.metrics['ndcg_10']:.4f}" in line
    run_compare([*names, "--all"])
    assert "hr_5" in capsys.readouterr().out


def test_a_certain_difference_is_marked(tmp_path, capsys):
    run_compare([write_run(tmp_path / "a", np.full(50, 9)), write_run(tmp_path / "b", np.full(50, 1))])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["ndcg_10"].rstrip().endswith("*")
    assert not lines["hr_10"].rstrip().endswith("*")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split": {"kind": "global_time"}}, "measured on other data or under another protocol (split.kind: leave_last_out and global_time)"),
        ({"split": {"candidates": 20}}, "measured on other data or under another protocol (split.candidates: None and 20)"),
        ({"grounding": "embedding"}, "measured on other data or under another protocol (model.grounding: trie and embedding)"),
        ({"target": np.zeros(40, dtype=int)}, "it was tested on other rows, or with other candidates, seen items or titles"),
        ({"digest": "other"}, "it was tested on other rows, or with other candidates, seen items or titles"),
    ],
)
def test_runs_of_other_data_or_protocols_are_marked_and_not_paired(change, reason, tmp_path, capsys):
    names = [write_run(tmp_path / "a", RANKS["a"]), write_run(tmp_path / "b", RANKS["b"], **change)]
    run_compare(names)
    text = capsys.readouterr().out
    assert f"{names[1]}: {reason}" in text
    assert "not paired" in text
    assert "[" not in text.partition("\n\n")[0]


def test_what_changes_no_row_of_the_test_does_not_matter(tmp_path, capsys):
    names = [
        write_run(tmp_path / "a", RANKS["a"]),
        write_run(tmp_path / "b", RANKS["b"], {"history_length": 3, "val_limit": 4}, seed=2, grounding=""),
    ]
    run_compare(names)
    assert "difference (95 %)" in capsys.readouterr().out


def test_files_have_the_names_that_the_report_gives_them():
    assert (compare.ROWS_FILE, compare.DIGEST) == (ROWS_FILE, DIGEST)


def test_the_known_defaults_are_those_of_the_class():
    defaults = asdict(Split())
    assert {name: list(defaults[name]) if name == "fractions" else defaults[name] for name in SPLIT_DEFAULTS} == SPLIT_DEFAULTS


def test_runs_without_stored_rows_are_still_listed(tmp_path, capsys):
    names = [write_run(tmp_path / name, RANKS["a"]) for name in "ab"]
    (tmp_path / "b" / "report" / "test_rows.safetensors").unlink()
    run_compare(names)
    assert "the ranks of its test rows, or of the first run's, are not stored" in capsys.readouterr().out


def test_a_recipe_means_its_latest_run(tmp_path, monkeypatch):
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
        (["one"], "needs two runs at least"),
        (["one", "--al"], "no option --al; its only option is --all"),
        (["nowhere", "nothing"], "no report of a run 'nowhere'"),
    ],
)
def test_wrong_words_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_compare(words)


@pytest.mark.parametrize("text", ["{", "[1]", '{"test_hr_10": "many"}', "{}"])
def test_a_damaged_report_is_named(text, tmp_path):
    folder = write_run(tmp_path / "a", RANKS["a"])
    (tmp_path / "a" / "report" / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        load_run(folder)
    (tmp_path / "a" / "report" / "metrics.json").write_text('{"test_hr_10": 1}')
    (tmp_path / "a" / "report" / "test_rows.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"test_rows\.safetensors is damaged"):
        load_run(folder)


def test_it_starts_without_torch():
    code = "import sys, malleable.commands.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(capsys, flag):
    run_compare([flag])
    assert capsys.readouterr().out.startswith("usage: malleable compare [--all] RUN RUN")
