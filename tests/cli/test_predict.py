"""``malleable predict`` writes its answers without a word about writing, for histories and for users of the data."""

import csv
import json

import pytest
import small_shop
from boring import BoringModule
from lightning.pytorch.callbacks import BasePredictionWriter

from malleable.callbacks.predictions import PredictionWriter
from malleable.cli import _prediction_writer
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.language.causal_lm import CausalLM
from malleable.lightning_modules.recommendation.sft import SFT

RECIPE = """\
model: ItemKNN
data:
  class_path: RecommendationDataModule
  init_args:
    source:
      class_path: Tables
      init_args: {interactions: events.csv, items: items.csv}
    tokenizer: none
"""
GRAPH = """\
model: {class_path: DistMult, init_args: {dimension: 4}}
data:
  class_path: KnowledgeGraphDataModule
  init_args: {source: SyntheticGraph}
"""


class OwnWriter(BasePredictionWriter):
    """Counts the batches that it is given."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.batches = 0

    def write_on_batch_end(self, *_) -> None:
        self.batches += 1


@pytest.fixture
def predict(tmp_path, capsys):
    """Predict with item neighbours of a shop, quietly, and return the command line object."""
    from malleable.cli import run

    small_shop.write(tmp_path)
    (tmp_path / "shop.yaml").write_text(RECIPE)
    (tmp_path / "graph.yaml").write_text(GRAPH)
    quiet = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]

    def command(*words, recipe="shop.yaml"):
        return run(["predict", "--config", recipe, *quiet, *map(str, words)])

    return command


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_users_get_recommendations_without_seen_items(predict, tmp_path, caplog):
    with caplog.at_level("INFO"):
        predict("--data.predict_users", "all")
    rows = table(tmp_path / "runs" / "shop" / "version_0" / "predictions.csv")
    assert f"wrote predictions for 16 rows to {'runs/shop/version_0/predictions.csv'}" in caplog.text
    had = {}
    for user, item in small_shop.events():
        had.setdefault(user, []).append(item)
    # All of a user's items are history, also those that the test asks for; users come in order of their ids.
    assert {row["user_id"] for row in rows} == set(had)
    assert not [row for row in rows if row["item_id"] in had[row["user_id"]]]
    assert [row["user_id"] for row in rows if row["rank"] == "1"] == sorted(had)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("users.txt", "u3\nnobody\n\nu12\n"),
        ("users.csv", "country,user_id\nde,u3\nfr,nobody\nit,u12\n"),
        ("plain.csv", "u3,x\nnobody,y\nu12,z\n"),
        ("users.jsonl", '"u3"\n{"user_id": "nobody"}\n{"user_id": "u12"}\n'),
    ],
)
def test_a_file_of_users(name, text, predict, tmp_path, caplog):
    (tmp_path / name).write_text(text)
    predict("--data.predict_users", name)
    rows = table(tmp_path / "runs" / "shop" / "version_0" / "predictions.csv")
    assert [(row["sample_id"], row["user_id"]) for row in rows if row["rank"] == "1"] == [("0", "u3"), ("2", "u12")]
    assert "1 of 3 users are not in the data ('nobody' in line" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("users.txt", "nobody\n", r"users.txt: 1 of 1 users are not in the data.*No user remains"),
        ("users.txt", "", "contains no user"),
        ("users.csv", "name,user_id\nx,\n", "line 2, field user_id: the id is empty"),
        ("users.xlsx", "", "is not a file of users: give `all`, or a .csv, .tsv, .txt, .jsonl or .json"),
        ("users.jsonl", "{}\n", "field user_id: the id is empty"),
    ],
)
def test_wrong_files_of_users(name, text, message, predict, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        predict("--data.predict_users", name)


def test_missing_prediction_input_is_an_error(predict, tmp_path, monkeypatch):
    monkeypatch.setattr("malleable.cli.MalleableCLI.instantiate_classes", None)  # before model and data are built
    for words in ((), ("--data.predict_users", "null")):
        with pytest.raises(ValueError, match=r"has no data for prediction: add --data\.predict_file FILE, or --data\.predict_users all$"):
            predict(*words)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="predict_file and predict_users exclude each other"):
        predict("--data.predict_users", "all", "--data.predict_file", "x.csv")
    (tmp_path / "none.csv").write_text("item_id\nnothing\n")
    with pytest.raises(ValueError, match="No history has a known item"):
        predict("--data.predict_file", "none.csv")
    assert not list((tmp_path / "runs").rglob("version_*"))


def test_predictions_of_a_graph_are_written_without_a_callback(predict, tmp_path):
    (tmp_path / "queries.csv").write_text("district 0,next,?\n")
    predict("--allow_untrained", "--data.predict_file", "queries.csv", recipe="graph.yaml")
    rows = [json.loads(line) for line in (tmp_path / "runs" / "graph" / "version_0" / "predictions.jsonl").read_text().splitlines()]
    assert [row["head"] for row in rows] == ["district 0"]


def test_user_writer_replaces_the_default_writer(predict, tmp_path):
    cli = predict("--data.predict_users", "all", f"--trainer.callbacks+={__name__}.OwnWriter")
    (own,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, BasePredictionWriter))
    assert own.batches == 1
    assert not list(tmp_path.rglob("predictions.*"))


def test_models_with_describable_predictions_have_a_writer(caplog):
    for model in (NFE(), SFT(), CausalLM()):
        assert [type(writer) for writer in _prediction_writer(model)] == [PredictionWriter]
    assert _prediction_writer(BoringModule()) == []
    assert "predictions of BoringModule are not written" in caplog.text
