import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_catalog
from tiny_data import TinyData, quiet_trainer
from tiny_graph import TinyGraphData

from malleable.callbacks.report.report import RunReport
from malleable.callbacks.report.row_recorder import CONDITIONS, INPUTS, ROWS_FILE
from malleable.lightning_modules.graphs.point_embeddings import DistMult
from malleable.lightning_modules.metrics.row_ranks import RowRanks
from malleable.lightning_modules.metrics.significance import row_values
from malleable.lightning_modules.recommendation.baselines import ItemKNN


def test_the_ranks_of_a_test_give_its_metrics(tmp_path):
    data = TinyData(eval_batch_size=4)
    trainer = quiet_trainer(tmp_path, callbacks=[RunReport()], enable_checkpointing=False)
    trainer.test(ItemKNN(tiny_catalog()), data, verbose=False)
    folder = tmp_path / "run" / "report"
    rows, metrics = load_file(folder / ROWS_FILE), json.loads((folder / "metrics.json").read_text())
    assert rows["sample_id"].tolist() == sorted(row["sample_id"] for row in data.test_dataset)
    assert rows["target"].tolist() == [row["item_ids"][0] for row in sorted(data.test_dataset, key=lambda row: row["sample_id"])]
    for name in ("hr_1", "hr_5", "hr_10", "ndcg_5", "mrr_10"):
        assert row_values(name, rows["rank"]).mean() == pytest.approx(metrics[f"test_{name}"], abs=1e-6)
    page = (folder / "report.md").read_text()
    assert "| metric | ItemKNN | 95 % interval |" in page
    assert "| hr_10 ↑ |" in page
    assert f"| test rows | {len(data.test_dataset)} |" in page
    assert "## Definitions of the metrics" in page


def metadata(tmp_path, catalog):
    trainer = quiet_trainer(tmp_path, callbacks=[RunReport()], enable_checkpointing=False)
    data = TinyData(eval_batch_size=4)
    data.catalog = catalog
    trainer.test(ItemKNN(catalog), data, verbose=False)
    with safe_open(tmp_path / "run" / "report" / ROWS_FILE, framework="pt") as file:
        return [json.loads(file.metadata()[name]) for name in (CONDITIONS, INPUTS)]


def test_conditions_and_inputs_of_metrics_are_stored(tmp_path):
    catalog = tiny_catalog()
    conditions, inputs = metadata(tmp_path / "a", replace(catalog, genres=(("x",), ("y",)) * 4))
    assert conditions.keys() == {"true items", "seen items", "candidates", "titles"}
    assert conditions["titles"].startswith("8 titles (")
    assert inputs["mgu"].keys() == {"genres", "histories"}
    same, others = metadata(tmp_path / "b", replace(catalog, genres=(("x",), ("y",), ("z",), ("y",)) * 2))
    assert same == conditions
    assert others["mgu"]["histories"] == inputs["mgu"]["histories"]
    assert others["mgu"]["genres"].startswith("3 (")
    assert inputs["mgu"]["genres"].startswith("2 (")


def test_the_ranks_of_a_graph_give_its_metrics(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[RunReport()], enable_checkpointing=False)
    trainer.test(DistMult(dimension=4), TinyGraphData(), verbose=False)
    folder = tmp_path / "run" / "report"
    rows, metrics = load_file(folder / ROWS_FILE), json.loads((folder / "metrics.json").read_text())
    for name in ("mr", "mrr", "hits_1", "hits_3", "hits_10"):
        assert row_values(name, rows["rank"]).mean() == pytest.approx(metrics[f"test_{name}"], abs=1e-5)
    assert len(rows["sample_id"].unique()) == len(rows["sample_id"])
    assert "| mr ↓ |" in (folder / "report.md").read_text()


def test_repeated_rows_are_omitted_and_rows_sorted():
    ranks = RowRanks()
    ranks.add(torch.tensor([5, -1]), torch.tensor([7, 8]), torch.tensor([2.0, 1.0]).double())
    ranks.add(torch.tensor([3]), torch.tensor([9]), torch.tensor([torch.inf]))
    found = ranks.gather(torch.device("cpu"))
    assert {name: column.tolist() for name, column in found.items()} == {"sample_id": [3, 5], "target": [9, 7], "rank": [torch.inf, 2.0]}
    assert RowRanks().gather(torch.device("cpu"))["rank"].tolist() == []
