import csv
import json
import os
import runpy
import signal
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from boring import BoringDataModule, BoringModule
from hostile import FORMULA, HOSTILE
from launch import launch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from toy_graph import NAMES, RELATIONS, toy_triples, write_toy_graph
from toy_shop import TITLES, ToyShop

from malleable.callbacks.predictions import PredictionWriter
from malleable.datamodules.batch import Batch, Catalog, Recommendations
from malleable.datamodules.files.atomic import recover_below
from malleable.lightning_modules.recommendation.baselines import Markov


def write(tmp_path, module, data):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[PredictionWriter()], **quiet)
    return trainer.predict(module, data)


def test_files_contain_the_recommendations(tmp_path):
    batches = write(tmp_path, Markov(ks=(8,)), ToyShop())
    items, scores = (torch.cat([batch[place] for batch in batches]) for place in range(2))
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["sample_id"] for row in rows] == list(range(12))
    for row, own_items, own_scores in zip(rows, items.tolist(), scores.tolist(), strict=True):
        known = [item for item in own_items if item >= 0]
        assert [item["item_id"] for item in row["items"]] == [TITLES[item] for item in known]  # where the source has no ids
        assert [item["title"] for item in row["items"]] == [TITLES[item] for item in known]
        assert [item["rank"] for item in row["items"]] == list(range(1, len(known) + 1))
        assert [item["score"] for item in row["items"]] == pytest.approx(own_scores[: len(known)], abs=1e-6)
        assert len(known) < 8  # what was seen is missing
    flat = [
        (str(row["sample_id"]), str(item["rank"]), str(item["item_id"]), item["title"], str(item["score"])) for row in rows for item in row["items"]
    ]
    assert [tuple(line.values()) for line in lines] == flat


def test_ids_of_the_data_module_are_used_if_the_checkpoint_has_none(tmp_path):
    data, module = ToyShop(), Markov(ks=(2,))
    data.setup = lambda stage: (ToyShop.setup(data, stage), setattr(data, "catalog", replace(data.catalog, keys=tuple(f"key {t}" for t in TITLES))))
    module.catalog = Catalog(TITLES)
    write(tmp_path, module, data)
    items = [item for row in rows_of(tmp_path) for item in row["items"]]
    assert items
    assert all(item["item_id"] == f"key {item['title']}" for item in items)


def test_missing_catalogue_is_an_error(tmp_path):
    writer, trainer, module = PredictionWriter(), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), Markov()
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    with pytest.raises(MisconfigurationException, match=r"needs a catalogue, but neither Markov nor the data module has one"):
        writer.on_predict_batch_end(trainer, module, Recommendations(torch.zeros(1, 1).long(), torch.zeros(1, 1)), Batch(torch.tensor([0])), 0)


def test_repeated_rows_are_omitted_and_rows_sorted(tmp_path):
    writer, trainer, module = PredictionWriter(), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), Markov()
    module.catalog = Catalog(("Heat", "Alien"), keys=("007", "1.0"))
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    found = Recommendations(torch.tensor([[1, -1], [1, 0], [0, 1]]), torch.tensor([[2.0, -torch.inf], [1.0, 1.0], [0.5, 0.25]]))
    writer.on_predict_batch_end(trainer, module, found, Batch(torch.tensor([5, -3, 2])), 0)
    writer.on_predict_epoch_end(trainer, module)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [2, 5]
    assert rows[1]["items"] == [{"rank": 1, "item_id": "1.0", "title": "Alien", "score": 2.0}]
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines == [
        "sample_id,rank,item_id,title,score",
        "2,1,007,Heat,0.5",
        "2,2,1.0,Alien,0.25",
        "5,1,1.0,Alien,2.0",
    ]


def test_all_formats_have_the_same_content(tmp_path, monkeypatch):
    monkeypatch.setattr("malleable.callbacks.predictions.CHUNK", 5)  # several row groups
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    writer = PredictionWriter(formats=("parquet", "csv", "jsonl"))
    Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[writer], **quiet).predict(Markov(ks=(3,)), ToyShop())
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert pq.ParquetFile(tmp_path / "predictions.parquet").num_row_groups > 1
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in line.items()} for line in table.to_pylist()] == lines
    flat = [{"sample_id": row["sample_id"], **item} for row in rows_of(tmp_path) for item in row["items"]]
    assert table.to_pylist() == flat
    assert not list(tmp_path.glob(".predictions*"))


def test_named_columns_are_written(tmp_path):
    writer, trainer, module = PredictionWriter(formats=["parquet"]), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), Markov()
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    for ids, labels, scores in (([4, 3], ["a", "b"], [0.5, 0.25]), ([1, -2], [None, "c"], [1.0, 2.0])):
        writer.on_predict_batch_end(trainer, module, {"label": labels, "score": torch.tensor(scores)}, Batch(torch.tensor(ids)), 0)
    writer.on_predict_epoch_end(trainer, module)
    assert pq.read_table(tmp_path / "predictions.parquet").to_pydict() == {
        "sample_id": [1, 3, 4],
        "rank": [1, 1, 1],
        "label": [None, "b", "a"],
        "score": [1.0, 0.25, 0.5],
    }


def test_memory_does_not_grow_with_rows(tmp_path):
    """They lie in the file of the device as soon as a batch is done."""
    writer, trainer, module = PredictionWriter(), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), Markov()
    module.catalog = Catalog(("Heat", "Alien"))
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    found = Recommendations(torch.zeros(1000, 1).long(), torch.zeros(1000, 1))
    for batch in range(20):
        writer.on_predict_batch_end(trainer, module, found, Batch(torch.arange(1000) + 1000 * batch), batch)
    (part,) = tmp_path.glob(".predictions.*/*")
    written = part.stat().st_size
    assert written > 19_000 * len('[10000, [], [["Heat", "Heat", 0.0]]]')
    writer.on_exception(trainer, module, RuntimeError())
    assert not list(tmp_path.glob(".predictions*"))


def test_titles_are_no_formulas_and_ids_stay(tmp_path):
    writer, trainer, module = PredictionWriter(), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), Markov()
    module.catalog = Catalog((FORMULA, HOSTILE), keys=("=1+1", FORMULA))
    writer.setup(trainer, module, "predict")
    writer.on_predict_start(trainer, module)
    writer.on_predict_batch_end(trainer, module, Recommendations(torch.tensor([[0, 1]]), torch.ones(1, 2)), Batch(torch.tensor([0])), 0)
    writer.on_predict_epoch_end(trainer, module)
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [(line["item_id"], line["title"]) for line in csv.DictReader(file)] == [("=1+1", f"'{FORMULA}"), (FORMULA, HOSTILE)]


@pytest.fixture
def killed(tmp_path):
    """The folder of a prediction whose process was killed after its first batch."""
    child = os.fork()
    if child == 0:
        writer, trainer, module = PredictionWriter(), Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path), Markov()
        module.catalog = Catalog(("Heat", "Alien"))
        writer.setup(trainer, module, "predict")
        writer.on_predict_start(trainer, module)
        writer.on_predict_batch_end(trainer, module, Recommendations(torch.zeros(1, 1).long(), torch.ones(1, 1)), Batch(torch.tensor([0])), 0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".predictions*"))) == 1
    return tmp_path


def test_the_next_prediction_removes_what_a_killed_one_has_left(killed):
    write(killed, Markov(ks=(8,)), ToyShop())
    assert sorted(path.name for path in killed.iterdir()) == ["predictions.csv", "predictions.jsonl"]


def test_the_next_run_of_the_recipe_removes_what_a_killed_prediction_has_left(killed):
    recover_below(killed.parent)
    assert not list(killed.iterdir())


@pytest.mark.parametrize(
    ("formats", "message"), [(["xml"], r"formats must be among csv, jsonl and parquet, got \['xml'\]"), ([], "formats is empty")]
)
def test_unknown_formats(formats, message):
    with pytest.raises(ValueError, match=message):
        PredictionWriter(formats=formats)


QUERIES = """person 0	knows	?
person 0	?	person 3
?	older than	person 5
person 7	next to
newcomer	?	person 0
"""
GRAPH_SCRIPT = """
import os
from pathlib import Path
import torch
from tiny_data import quiet_trainer
from toy_graph import toy_graph
from malleable.callbacks.predictions import PredictionWriter
from malleable.lightning_modules.graphs.settings import LinkRanking
from malleable.lightning_modules.graphs.nfe import NFE

ranks = int(os.environ.get("WORLD_SIZE", 1))
folder = Path(f"ranks{ranks}")
data = toy_graph(Path("graph"), predict_file="queries.tsv", cache_dir="cache", eval_batch_size=2)
torch.manual_seed(0)
settings = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
trainer = quiet_trainer(folder, logger=False, enable_checkpointing=False, callbacks=[PredictionWriter()], **settings)
trainer.predict(NFE(dimension=4, ranking=LinkRanking(top_k=5)), data)
"""


@pytest.fixture
def answered(tmp_path):
    """A folder in which queries of a toy graph were answered on one device, and the script that did it."""
    (tmp_path / "queries.tsv").write_text(QUERIES)
    write_toy_graph(tmp_path / "graph")
    (tmp_path / "run.py").write_text(GRAPH_SCRIPT)
    runpy.run_path("run.py")
    return tmp_path


def rows_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_answers_of_a_graph_have_labels(answered):
    rows = rows_of(answered / "ranks1")
    asked = [tuple(line.split("\t")) for line in QUERIES.splitlines()]
    assert [(row["head"], row["relation"], row["tail"]) for row in rows] == [(*query, "?")[:3] for query in asked]
    known = {triple for triples in toy_triples().values() for triple in triples}
    for row in rows:
        query = [row[name] for name in ("head", "relation", "tail")]
        place = query.index("?")
        for item in row["items"]:
            assert item["answer"] in (RELATIONS if place == 1 else (*NAMES, "newcomer"))
            assert (*query[:place], item["answer"], *query[place + 1 :]) not in known
            assert (item["uncertainty"] is None) == (place == 1)
        assert len(row["items"]) == (5 if place != 1 else len(RELATIONS) - len({r for h, r, t in known if (h, t) == (query[0], query[2])}))
    with (answered / "ranks1" / "predictions.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["sample_id", "head", "relation", "tail", "rank", "answer", "score", "uncertainty"]
    flat = [{**{name: row[name] for name in row if name != "items"}, **item} for row in rows for item in row["items"]]
    assert lines == [{name: "" if value is None else str(value) for name, value in line.items()} for line in flat]


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_give_the_same_predictions_as_one(answered):
    """Five rows in batches of two: the second rank has a repeat, which is left out."""
    launch([answered / "run.py"], cwd=answered)
    for name in ("predictions.csv", "predictions.jsonl"):
        assert (answered / "ranks1" / name).read_text() == (answered / "ranks2" / name).read_text()


def test_other_outputs_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"BoringModule.predict_step returned Tensor for BoringBatch; remove PredictionWriter"):
        write(tmp_path, BoringModule(), BoringDataModule())
    assert not (tmp_path / "predictions.csv").exists()
