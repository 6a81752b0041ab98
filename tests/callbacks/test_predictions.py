import csv
import json

import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from toy_shop import TITLES, ToyShop

from malleable.callbacks.predictions import PredictionWriter
from malleable.lightning_modules.baselines import Markov


def write(tmp_path, module, data):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[PredictionWriter()], **quiet)
    return trainer.predict(module, data)


def test_files_hold_what_was_recommended(tmp_path):
    batches = write(tmp_path, Markov(ks=(8,)), ToyShop())
    items, scores = (torch.cat([batch[place] for batch in batches]) for place in range(2))
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["sample_id"] for row in rows] == list(range(12))
    for row, own_items, own_scores in zip(rows, items.tolist(), scores.tolist(), strict=True):
        known = [item for item in own_items if item >= 0]
        assert [item["item_id"] for item in row["items"]] == known
        assert [item["title"] for item in row["items"]] == [TITLES[item] for item in known]
        assert [item["rank"] for item in row["items"]] == list(range(1, len(known) + 1))
        assert [item["score"] for item in row["items"]] == pytest.approx(own_scores[: len(known)], abs=1e-6)
        assert len(known) < 8  # what was seen is missing
    flat = [
        (str(row["sample_id"]), str(item["rank"]), str(item["item_id"]), item["title"], str(item["score"])) for row in rows for item in row["items"]
    ]
    assert [tuple(line.values()) for line in lines] == flat


def test_repeats_are_left_out_and_rows_sorted(tmp_path):
    writer = PredictionWriter()
    writer.folder = tmp_path
    writer.write(torch.tensor([5, -3, 2]), torch.tensor([[1, -1], [1, 0], [0, 1]]), torch.tensor([[2.0, -torch.inf], [1.0, 1.0], [0.5, 0.25]]), ())
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [2, 5]
    assert rows[1]["items"] == [{"rank": 1, "item_id": 1, "title": "", "score": 2.0}]


def test_other_outputs_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"BoringModule.predict_step gave Tensor for BoringBatch; leave PredictionWriter out"):
        write(tmp_path, BoringModule(), BoringDataModule())
    assert not (tmp_path / "predictions.csv").exists()
