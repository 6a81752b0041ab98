"""Vectors of users and items: files of both formats, order of rows, several ranks, and modules without vectors."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from tiny_data import quiet_trainer
from toy_sequences import ToySequences, query_rows
from toy_shop import ToyShop

from malleable import EncoderSettings, Popularity, SequenceBatch, SequentialRecommender, VectorWriter, collate


def predict(folder, data=None, **options):
    torch.manual_seed(0)
    module = SequentialRecommender(EncoderSettings(dim=8, num_layers=1, max_length=12))
    writer = VectorWriter(str(folder), **options)
    trainer = quiet_trainer(folder, callbacks=[writer], logger=False)
    trainer.predict(module, data or ToySequences(eval_batch_size=2), return_predictions=False)
    return module


def test_scores_follow_from_the_files(tmp_path):
    data = ToySequences(eval_batch_size=2)
    data.predicted_users = {number: f"u{number}" for number in range(5)}
    module = predict(tmp_path, data, formats=("parquet", "safetensors"))
    items, users = (pq.read_table(tmp_path / f"{name}_vectors.parquet") for name in ("item", "user"))
    assert items["title"].to_pylist() == list(module.catalog.titles)
    assert users["sample_id"].to_pylist() == list(range(5))
    assert users["user_id"].to_pylist() == ["u0", "u1", "u2", "u3", "u4"]
    scores = torch.tensor(users["vector"].to_pylist()) @ torch.tensor(items["vector"].to_pylist()).T
    torch.testing.assert_close(scores, module.eval().scores(collate(query_rows(5), SequenceBatch)))
    for name, table in (("item", items), ("user", users)):
        assert load_file(tmp_path / f"{name}_vectors.safetensors")["vectors"].tolist() == table["vector"].to_pylist()
        lines = [json.loads(line) for line in (tmp_path / f"{name}_vectors.jsonl").read_text().splitlines()]
        assert lines == table.drop_columns(["vector"]).to_pylist()


def test_rows_are_sorted_and_padding_rows_left_out(tmp_path):
    rows = [row | {"sample_id": number} for row, number in zip(query_rows(4), (3, -1, 0, 2), strict=True)]
    data = ToySequences(eval_batch_size=2)
    data.setup = lambda stage: setattr(data, "predict_dataset", rows)
    predict(tmp_path, data)
    table = pq.read_table(tmp_path / "user_vectors.parquet")
    assert table["sample_id"].to_pylist() == [0, 2, 3]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_module_without_vectors_is_refused(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="VectorWriter needs a module with vectors of users and items, but Popularity has no `encode`"
    ):
        quiet_trainer(tmp_path, callbacks=[VectorWriter()]).predict(Popularity(), ToyShop())


@pytest.mark.parametrize(("formats", "got"), [((), "none"), (("csv",), r"\['csv'\]")])
def test_unknown_formats_are_refused(formats, got):
    with pytest.raises(ValueError, match=f"formats must be parquet, safetensors or both, got {got}"):
        VectorWriter(formats=formats)
