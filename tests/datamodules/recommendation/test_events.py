"""The store of interactions: what it keeps, and what views of it choose."""

import numpy as np
import pandas as pd
import pytest

from malleable.datamodules import Tables
from malleable.datamodules.batch import Catalog
from malleable.datamodules.recommendation.alignment import align
from malleable.datamodules.recommendation.datamodule import RecommendationDataModule
from malleable.datamodules.recommendation.events import Events
from malleable.datamodules.recommendation.splits import Split, prepare
from malleable.datamodules.sources.recommendation.base import InteractionTables, items_table

TITLES = ("Alien", "Brazil", "Casablanca", "Dune", "Eraserhead", "Fargo")
ITEMS = items_table(list("abcdef"), TITLES, [()] * 6)
# user, item, time, rating, split; v dislikes "a" and "f"
EVENTS = [
    ("v", "b", 3, 5, "train"),
    ("u", "a", 1, 4, "train"),
    ("u", "b", 1, 2, "train"),
    ("v", "a", 1, 1, "train"),
    ("u", "c", 2, 5, "Train"),
    ("u", "d", 7, 5, "valid"),
    ("v", "c", 4, 4, "train"),
    ("u", "e", 8, 4, "test"),
    ("v", "d", 5, 5, "test"),
    ("v", "f", 9, 2, "test"),
]
COLUMNS = ["user_id", "item_id", "timestamp", "rating", "split"]


def tables(events=EVENTS, columns=COLUMNS):
    return InteractionTables(pd.DataFrame(events, columns=columns), ITEMS)


@pytest.fixture
def shop(tmp_path):
    """Return a function that makes a data module of the events, with changes to its files and options."""

    def make(stage="fit", events=EVENTS, titles=None, **options):
        pd.DataFrame(events, columns=COLUMNS).to_csv(tmp_path / "events.csv", index=False)
        lines = [f"{key},{title}\n" for key, title in (titles or dict(zip("abcdef", TITLES, strict=True))).items()]
        (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(lines))
        source = Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"))
        data = RecommendationDataModule(source, **{"vocab_size": 300, "split": Split(min_rating=4, min_user_events=1), "batch_size": 2} | options)
        data.prepare_data()
        data.setup(stage)
        return data

    return make


def test_events_keep_user_time_rating_row_and_split():
    events = Events.from_tables(tables(), list(range(6)))
    assert events.users == ["u", "v"]
    assert events.user.tolist() == [0] * 5 + [1] * 5
    assert events.item.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5]  # equal times in the order of the source
    assert events.time.tolist() == [1, 1, 2, 7, 8, 1, 3, 4, 5, 9]
    assert events.rating.tolist() == [4, 2, 5, 5, 4, 1, 5, 4, 5, 2]
    assert events.row.tolist() == [1, 2, 4, 5, 7, 3, 0, 6, 8, 9]
    assert events.split.tolist() == [0, 0, 0, 1, 2, 0, 0, 0, 2, 2]


def test_events_without_rating_and_split():
    events = Events.from_tables(tables([row[:3] for row in EVENTS], COLUMNS[:3]), list(range(6)))
    assert np.isnan(events.rating).all()
    assert set(events.split.tolist()) == {-1}


def test_low_ratings_are_in_the_events_but_not_in_the_sequences():
    data = prepare(tables(), Split(min_rating=4, min_user_events=1))
    assert [items.tolist() for items in data.sequences] == [[0, 2, 3, 4], [1, 2, 3]]
    assert len(data.events) == len(EVENTS)
    assert [data.events.rating[own].tolist() for own in data.positions] == [[4, 5, 5, 4], [5, 4, 5]]
    assert [time.tolist() for time in data.times] == [[1, 2, 7, 8], [3, 4, 5]]
    assert data.users == ["u", "v"]


def test_interactions_with_removed_items_are_dropped():
    data = prepare(tables(), Split(min_rating=4, min_user_events=1, min_item_events=2))
    assert data.titles == ["Casablanca", "Dune"]
    assert data.events.item.tolist() == [0, 1, 0, 1]
    assert [data.events.item[own].tolist() for own in data.positions] == [items.tolist() for items in data.sequences] == [[0, 1], [0, 1]]
    assert data.events.row.tolist() == [4, 5, 6, 8]


def test_the_store_contains_the_events(shop):
    store = shop()._store
    assert store.events.rating.tolist() == [4, 2, 5, 5, 4, 1, 5, 4, 5, 2]
    assert store.events.row.dtype == np.int64
    assert store.users == ["u", "v"]
    assert [store.events.time[own].tolist() for own in store.positions] == [[1, 2, 7, 8], [3, 4, 5]]
    assert [store.items_of(sequence).tolist() for sequence in (0, 1)] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]


@pytest.mark.parametrize(("repeats", "hidden"), [("drop", [0, 1, 2, 3, 5]), ("keep", [])])
def test_items_with_low_ratings_are_not_recommended(shop, repeats, hidden):
    data = shop("predict", predict_users="all", split=Split(min_rating=4, min_user_events=1, repeats=repeats))
    row = data.predict_dataset[1]
    assert row["history"] == [1, 2, 3]
    assert sorted(set(row["seen"])) == hidden


def test_seen_items_in_evaluation_are_those_with_high_ratings(shop):
    assert [shop().test_dataset[row]["seen"] for row in (0, 1)] == [[0, 2, 3], [1, 2]]


def test_stored_items_that_are_not_in_the_data_are_not_recommended(shop, tmp_path, monkeypatch, caplog):
    stored = shop().catalog
    histories = tmp_path / "histories.jsonl"
    histories.write_text('["Dune"]\n')
    kept = {key: title for key, title in zip("abcdef", TITLES, strict=True) if key not in "ef"}
    events = [row for row in EVENTS if row[1] in kept]
    vocabulary = stored.vocabulary
    monkeypatch.setattr(RecommendationDataModule, "_text_settings", lambda self: {
        "tokenizer": vocabulary.tokenizer, "template": self.template, "catalog": stored, "extend_catalog": False,
    })  # fmt: skip
    with caplog.at_level("INFO"):
        data = shop("predict", events, kept, predict_file=str(histories), template="history")
    assert data.catalog.titles == TITLES
    assert "2 of the 6 stored items are not in the data" in caplog.text
    assert data._store.listed.tolist() == [True] * 4 + [False] * 2
    assert data.predict_dataset[0]["seen"] == [3, 4, 5]
    data = shop("predict", events, kept, predict_users="all", template="history", split=Split(min_user_events=1, repeats="keep"))
    assert data.predict_dataset[0]["seen"] == [4, 5]


def test_swapped_titles_are_reported(caplog):
    stored = Catalog(TITLES, keys=tuple("abcdef"))
    swapped = InteractionTables(tables().interactions, items_table(list("abcdef"), [TITLES[1], TITLES[0], *TITLES[2:]], [()] * 6))
    data = align(prepare(swapped, Split(min_user_events=1)), stored)
    assert data.keys[:2] == [["b"], ["a"]]
    assert "2 ids have another title than in the checkpoint (id b: 'Brazil' in the checkpoint, 'Alien' in the data; id a" in caplog.text


def test_a_given_split():
    data = prepare(tables(), Split(kind="given", min_user_events=1))
    assert data.train_end.tolist() == [3, 3]
    rows = {name: [(int(s), int(e)) for s, e in zip(index.sequence, index.end, strict=True)] for name, index in data.rows.items()}
    assert rows == {"train": [(0, 1), (0, 2), (1, 1), (1, 2)], "val": [(0, 3)], "test": [(0, 4), (1, 3), (1, 4)]}


def test_a_given_split_of_likes_only():
    data = prepare(tables(), Split(kind="given", min_user_events=1, min_rating=4))
    assert data.train_end.tolist() == [2, 2]
    assert {name: index.end.tolist() for name, index in data.rows.items()} == {"train": [1, 1], "val": [2], "test": [3, 2]}


@pytest.mark.parametrize(
    ("row", "split", "message"),
    [
        (0, "later", r"needs a split \(train, val or test\) for each interaction, but 1 of 10 have none \(first: data row 1\)"),
        (6, "", "but 1 of 10 have none"),
        (7, "train", r"user 'u' has a train interaction \(data row 8\) after a val interaction"),
    ],
)
def test_a_given_split_that_cannot_be_used(row, split, message):
    events = [(*event[:4], split) if number == row else event for number, event in enumerate(EVENTS)]
    with pytest.raises(ValueError, match=message):
        prepare(tables(events), Split(kind="given", min_user_events=1))


def test_a_column_split_with_other_values_is_ignored():
    events = [(*event[:4], "A") for event in EVENTS]
    assert len(prepare(tables(events), Split(min_user_events=1)).rows["test"]) == 2


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (lambda events: events[:0], Split(), "the table of interactions has no row"),
        (
            lambda events: [(e[0], "x" + e[1], *e[2:]) for e in events],
            Split(),
            r"the source: no item of the 10 interactions is in the items table .*'xb' in the .*'a' in the",
        ),
        (
            lambda events: events,
            Split(min_rating=6),
            "none of 10 interactions has a rating >= min_rating=6: ratings are between 1 and 5; decrease min_rating",
        ),
        (
            lambda events: events,
            Split(min_user_events=7),
            "none of 10 interactions of 2 users remains with min_user_events=7 and min_item_events=1; decrease them",
        ),
    ],
)
def test_errors_if_no_interaction_remains(change, split, message):
    with pytest.raises(ValueError, match=message):
        prepare(tables(change(EVENTS)), split)


def test_prompt_sequence_and_metric_lengths_are_separate(shop):
    split = Split(min_user_events=1, history_length=1, sequence_length=3, metric_length=2)
    data = shop(split=split)
    row = data.test_dataset[0]
    assert len(row["prompt"]) == len(data._store.pieces.prompt([3]))
    assert (row["history"], row["metric_history"], row["seen"]) == ([1, 2, 3], [2, 3], [0, 1, 2, 3])
    batch = data.test_dataset.collate([row, data.val_dataset[0]])
    assert batch.history.tolist()[0] == [1, 2, 3]
    assert batch.metric_history.tolist()[0] == [2, 3]


def test_metrics_count_items_that_a_shortened_prompt_omits(shop):
    data = shop(split=Split(min_user_events=1, history_length=4), max_prompt_length=12)
    row = data.test_dataset[0]
    assert row["history"] == [0, 1, 2, 3]
    assert len(row["prompt"]) <= 12
    assert "metric_history" not in row
    assert data.test_dataset.collate([row]).metric_history is None


def test_training_without_rows_changes_no_other_row(shop, tmp_path):
    path = tmp_path / "forget.txt"
    whole = shop(split=Split(min_user_events=1))
    rows = {row["sample_id"]: row for row in map(whole.train_dataset.__getitem__, range(len(whole.train_dataset)))}
    left_out = list(rows)[1:3]
    path.write_text("".join(f"{sample_id}\n" for sample_id in left_out))
    data = shop(split=Split(min_user_events=1, train_without=str(path)))
    assert [data.train_dataset[number] for number in range(len(data.train_dataset))] == [row for key, row in rows.items() if key not in left_out]
    assert data.catalog == whole.catalog
    limited = shop(split=Split(min_user_events=1, train_limit=4)).train_dataset.sample_ids.tolist()
    path.write_text(f"{limited[0]}\n")
    assert shop(split=Split(min_user_events=1, train_limit=4, train_without=str(path))).train_dataset.sample_ids.tolist() == limited[1:]
    with pytest.raises(ValueError, match="train_without omits rows with a prompt and an answer, but packed histories have no such rows"):
        _ = data.packed_dataset


@pytest.mark.parametrize("line", ["7", "-1", "x", "1.0"])
def test_unknown_sample_ids_are_an_error(shop, tmp_path, line):
    (tmp_path / "forget.txt").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"forget.txt, line 2: .* is not the sample_id of a training row"):
        shop(split=Split(min_user_events=1, train_without=str(tmp_path / "forget.txt")))
