"""Ids go in and come out: what a user's files call users and items is what predictions call them, to the character."""

import csv
import json
import random

import pandas as pd
import pytest
from lightning.pytorch import Trainer

from malleable.callbacks.predictions import PredictionWriter
from malleable.datamodules.recommendation.datamodule import RecommendationDataModule
from malleable.datamodules.recommendation.splits import Split
from malleable.datamodules.sources.recommendation.tables import Tables
from malleable.lightning_modules.recommendation.baselines import Popularity

COUNT = 24
# Each makes the id of an item or a user from its number and a draw.
FORMS = {
    "numeric": lambda number, rng: str(number),
    "zero-padded": lambda number, rng: f"{number:05}",
    "versions": lambda number, rng: f"pkg-{number // 3}{['', '.0', '.00'][number % 3]}",
    "fractions": lambda number, rng: f"{number // 2}{['', '.0'][number % 2]}",
    "unicode": lambda number, rng: rng.choice("é\u0301ß\u2028\U0001f600") + f"{number}\u0660",
    "titles": lambda number, rng: f"Title {(number + 1) % COUNT}",  # the title of another item
    "codes": lambda number, rng: rng.choice(["NA", "null", "1e3", "TRUE", "=1+1", 'a"b', "a,b", "-"]) + f"/{number}",
}


def write(path, table):
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records")), encoding="utf-8")
    else:
        table.to_csv(path, index=False)
    return str(path)


def write_histories(path, users, histories):
    """Write a file of histories by id."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("user_id", "item_id"), *((user, *items) for user, items in zip(users, histories, strict=True))])
    else:
        rows = [{"user_id": user, "history": [{"id": item} for item in items]} for user, items in zip(users, histories, strict=True)]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "query"), [("csv", "csv"), ("jsonl", "jsonl"), ("parquet", "json")])
def test_predictions_contain_the_ids_of_the_input(tmp_path, form, kind, query):
    rng = random.Random(f"{form} {kind}")
    ids = [FORMS[form](number, rng) for number in range(COUNT)]
    assert len(set(ids)) == COUNT
    rng.shuffle(ids)
    titles = {key: f"Title {number}" for number, key in enumerate(ids)}
    events = [(user, item, time) for user in ids for time, item in enumerate(rng.sample(ids, 6))]
    source = Tables(
        write(tmp_path / f"events.{kind}", pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"])),
        write(tmp_path / f"items.{kind}", pd.DataFrame({"item_id": ids, "title": list(titles.values())})),
    )
    # A user twice, a new one, and an item that the catalogue does not have.
    users = [*rng.sample(ids, 4), ids[0], ids[0], "new user"]
    histories = [rng.sample(ids, 3) for _ in users]
    path = write_histories(tmp_path / f"histories.{query}", users, [[*items, "no such item"] for items in histories])
    settings = {"cache_dir": str(tmp_path / "cache"), "tokenizer": "none", "split": Split(history_length=3)}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    data = RecommendationDataModule(source, predict_file=path, **settings)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[PredictionWriter()], max_epochs=1, **quiet)
    trainer.predict(Popularity(ks=(COUNT,)), data)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [row["user_id"] for row in rows] == users
    assert [row["sample_id"] for row in rows] == list(range(len(users)))
    for row, history in zip(rows, histories, strict=True):
        # All items but those of the history are recommended.
        assert {item["item_id"] for item in row["items"]} == set(ids) - set(history)
        assert all(item["title"] == titles[item["item_id"]] for item in row["items"])
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        lines = [(line["user_id"], line["item_id"], line["title"]) for line in csv.DictReader(file)]
    assert lines == [(row["user_id"], item["item_id"], item["title"]) for row in rows for item in row["items"]]
