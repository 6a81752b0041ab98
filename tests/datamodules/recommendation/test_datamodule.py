import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from shared import shared_data

from malleable.datamodules import InstructionRows, MovieLens, Synthetic, Tables
from malleable.datamodules.batch import AnswerBatch, PackedBatch, PreferenceBatch
from malleable.datamodules.language.tokenizer import load_tokenizer
from malleable.datamodules.negative_samplers import Hardest, Popularity, Uniform
from malleable.datamodules.recommendation.datamodule import RecommendationDataModule
from malleable.datamodules.recommendation.prompt import PromptTemplate
from malleable.datamodules.recommendation.splits import Split

SOURCE = {"num_users": 20, "num_items": 24, "num_events": 6}


def make(stage="fit", source=None, **options):
    data = RecommendationDataModule(source or Synthetic(**SOURCE), **{"vocab_size": 300, "batch_size": 4} | options)
    data.prepare_data()
    data.setup(stage)
    return data


def caches(cache: Path) -> list[Path]:
    return sorted((cache / "recommendation").iterdir())


def test_attributes_after_setup():
    data = make()
    catalog = data.catalog
    assert data.num_items == len(catalog) == len(catalog.token_ids) == len(catalog.popularity) == len(catalog.genres) == 24
    assert (len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)) == (20 * 3, 20, 20)
    assert sum(catalog.popularity) == 20 * 4
    assert data.predict_dataset is None
    tokenizer = load_tokenizer(catalog.vocabulary.tokenizer)
    vocabulary = catalog.vocabulary
    assert (vocabulary.eos_token_id, vocabulary.pad_token_id, vocabulary.vocab_size) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
    )
    assert [tokenizer.decode(ids) for ids in catalog.token_ids] == [f"{title}</s>" for title in catalog.titles]
    assert vocabulary.largest_token_id == max(max(row["prompt"] + [*row["answers"][0]]) for row in map(data.train_dataset.__getitem__, range(40)))


def test_the_catalogue_has_the_ids_of_the_source(tmp_path):
    events, items = tmp_path / "events.csv", tmp_path / "items.csv"
    items.write_text("item_id,title\nb7,Heat\nc1,Heat\na3,Jaws\n09,Dune\n")
    events.write_text("user_id,item_id,timestamp\n" + "".join(f"u,{item},{time}\n" for time, item in enumerate(("09", "b7", "a3"))))
    catalog = make(source=Tables(str(events), str(items)), split=Split(min_user_events=3), batch_size=1).catalog
    assert (catalog.titles, catalog.keys) == (("Heat", "Jaws", "Dune"), ("b7", "a3", "09"))


def test_fields_of_rows():
    data = make(split=Split(history_length=2))
    tokenizer = load_tokenizer(data.catalog.vocabulary.tokenizer)
    titles = data.catalog.titles
    ids = []
    for dataset in (data.train_dataset, data.val_dataset, data.test_dataset):
        for index in range(len(dataset)):
            row = dataset[index]
            ids.append(row["sample_id"])
            assert row["history"] == row["seen"][-2:]
            assert row["item_ids"][0] not in row["seen"]
            assert tokenizer.decode(row["prompt"]) == "".join(f"{titles[item]}</s>" for item in row["history"])
            assert row["answers"] == [data.catalog.token_ids[row["item_ids"][0]]]
    assert len(set(ids)) == 100
    assert min(ids) >= 0


def test_row_tokens_are_the_lengths_of_answers():
    data = make()
    assert list(data.row_tokens()) == [len(data.train_dataset[row]["answers"][0]) for row in range(len(data.train_dataset))]


def test_loaders_return_typed_batches():
    data = make(eval_batch_size=7)
    batch = next(iter(data.train_dataloader()))
    assert type(batch) is AnswerBatch
    assert (len(batch), len(next(iter(data.val_dataloader())))) == (4, 7)
    assert batch.num_step_tokens == batch.answer_mask.sum()


def test_the_training_loader_has_both_kinds_of_rows():
    data = make()
    loader = data.train_dataloader()
    assert loader.view("answer") is data.train_dataset
    assert loader.view("packed") is data.packed_dataset
    with pytest.raises(KeyError, match="no rows 'pairs', only"):
        loader.view("pairs")


def test_packed_training():
    data = make(train_view="packed", pack_length=96)
    batch = next(iter(data.train_dataloader()))
    assert type(batch) is PackedBatch
    assert batch.num_step_tokens == ((batch.position_ids > 0) & (batch.document_ids > 0)).sum()
    # Every training interaction but nothing of validation and test: each title and its end once.
    expected = sum(len(data.catalog.token_ids[item]) * count for item, count in enumerate(data.catalog.popularity))
    assert sum(len(data.packed_dataset[row]["input_ids"]) for row in range(len(data.packed_dataset))) == expected
    assert data.train_dataloader().view("answer")[0]["history"]


@pytest.mark.parametrize("kind", [Uniform, Popularity])
def test_negatives(kind):
    data, again = (make(negatives=kind(num_negatives=3)) for _ in range(2))
    assert type(next(iter(data.train_dataloader()))) is PreferenceBatch
    for dataset in (data.train_dataset, data.val_dataset, data.test_dataset):
        for index in range(len(dataset)):
            row = dataset[index]
            assert len(set(row["item_ids"])) == 4
            assert not set(row["item_ids"]) & set(row["seen"])
            assert kind is Uniform or all(data.catalog.popularity[item] for item in row["item_ids"][1:])
    assert [data.train_dataset[i]["item_ids"] for i in range(60)] == [again.train_dataset[i]["item_ids"] for i in range(60)]
    other = make(negatives=kind(num_negatives=3), seed=1)
    assert [data.train_dataset[i]["item_ids"] for i in range(60)] != [other.train_dataset[i]["item_ids"] for i in range(60)]


def test_sampled_candidates_contain_the_target_at_any_position(cache):
    data = make(split=Split(candidates=4), template="instruction")
    places = set()
    for index in range(len(data.train_dataset)):
        row = data.train_dataset[index]
        places.add(row["candidates"].index(row["item_ids"][0]))
        assert len(set(row["candidates"])) == 4
        assert not set(row["candidates"]) & set(row["seen"])
    assert places == {0, 1, 2, 3}
    text = load_tokenizer(data.catalog.vocabulary.tokenizer).decode(row["prompt"])
    assert text == data.template.text(
        [data.catalog.titles[item] for item in row["history"]], [data.catalog.titles[item] for item in row["candidates"]]
    )
    make(split=Split(candidates=4), template="instruction", seed=1)
    assert len(caches(cache)) == 2


def test_limits_sample_rows_of_the_split(cache):
    full, data = make(), make(split=Split(train_limit=10, val_limit=5, test_limit=100))
    assert (len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)) == (10, 5, 20)
    rows = [data.train_dataset[row] for row in range(10)]
    every = {row["sample_id"]: row for row in map(full.train_dataset.__getitem__, range(len(full.train_dataset)))}
    assert rows == [every[row["sample_id"]] for row in rows]
    assert [row["sample_id"] for row in rows] != list(every)[:10]
    assert len(caches(cache)) == 1


def test_long_histories_are_shortened_from_their_oldest_item(caplog):
    full = make()
    data = make(max_prompt_length=20)
    assert "train prompts exceed max_prompt_length 20: their oldest items are omitted" in caplog.text
    for index in range(len(data.test_dataset)):
        short, whole = data.test_dataset[index], full.test_dataset[index]
        assert len(short["prompt"]) <= 20
        assert short["prompt"] == whole["prompt"][-len(short["prompt"]) :]


def test_rows_without_text(cache):
    data = make(tokenizer="none")
    batch = next(iter(data.test_dataloader()))
    assert batch.prompt_ids.shape == (4, 0)
    assert batch.answer_ids.shape == (4, 1, 0)
    assert (batch.target >= 0).all()
    assert data.catalog.token_ids == ()
    assert data.catalog.vocabulary is None
    assert not (cache / "tokenizers").exists()
    with pytest.raises(ValueError, match="packed histories need text, but tokenizer='none' has no text"):
        data.packed_dataset  # noqa: B018


def test_a_given_tokenizer_and_template():
    template = PromptTemplate(prefix="Seen:", item=" <{title}>", separator="", suffix=" Next:", answer=" <{title}>")
    data = make(tokenizer=str(shared_data("models/stories260k")), template=template)
    tokenizer = load_tokenizer(data.catalog.vocabulary.tokenizer)
    row = data.test_dataset[0]
    assert row["prompt"] == tokenizer(template.text([data.catalog.titles[item] for item in row["history"]]))["input_ids"]
    assert data.catalog.vocabulary.vocab_size == 512


def test_the_cache_is_read_and_not_built_again(cache, monkeypatch):
    make()
    monkeypatch.setattr(Synthetic, "load", lambda self: pytest.fail("made again"))
    make()
    assert len(caches(cache)) == 1


@pytest.mark.parametrize(
    "change", [{"vocab_size": 310}, {"template": "instruction"}, {"split": Split(history_length=3)}, {"max_prompt_length": 40}, {"tokenizer": "none"}]
)
def test_another_setting_uses_another_cache(cache, change):
    make()
    make(**change)
    assert len(caches(cache)) == 2


def test_an_incomplete_or_damaged_cache_is_built_again(cache, caplog):
    whole = [make().train_dataset[row] for row in range(60)]
    (folder,) = caches(cache)
    next((folder / "train").glob("*.arrow")).write_bytes(b"half")
    again = make()
    assert "is corrupt (train/" in caplog.text
    assert [again.train_dataset[row] for row in range(60)] == whole
    (folder / "manifest.json").unlink()
    make()
    assert "is incomplete" in caplog.text
    assert caches(cache) == [folder]


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_removed_tokenizer_is_trained_again(cache, damage):
    whole = make()
    folder = Path(whole.catalog.vocabulary.tokenizer)
    expected = (folder / "tokenizer.json").read_bytes()
    if damage == "removed":
        shutil.rmtree(folder)
    else:
        (folder / "tokenizer.json").write_bytes(expected.replace(b"ab", b"ba", 1))
    again = make()
    assert again.catalog == whole.catalog
    assert (folder / "tokenizer.json").read_bytes() == expected


def test_a_cache_that_cannot_be_read_back_is_an_error(monkeypatch):
    monkeypatch.setattr("malleable.datamodules.recommendation.store.open_tables", lambda _: None)
    with pytest.raises(OSError, match="cannot be read right after it was written; check the disk, or choose another cache_dir"):
        make()


def test_a_given_cache_folder(tmp_path, cache):
    make(cache_dir=str(tmp_path / "own"))
    assert len(list((tmp_path / "own" / "recommendation").iterdir())) == 1
    assert not (cache / "recommendation").exists()


def test_the_content_of_the_source_determines_the_cache(tmp_path, cache):
    events, items = tmp_path / "events.csv", tmp_path / "items.csv"
    items.write_text("item_id,title\n" + "".join(f"{item},Title {item}\n" for item in range(6)))
    for shift in (0, 1):
        events.write_text("user_id,item_id,timestamp\n" + "".join(f"u,{item},{(item + shift) % 6}\n" for item in range(6)))
        data = make(source=Tables(str(events), str(items)))
        assert data.test_dataset[0]["item_ids"] == [5 - shift]
    assert len(caches(cache)) == 2


def test_prediction_for_a_file_of_histories(tmp_path):
    titles = make().catalog.titles
    path = tmp_path / "histories.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ([titles[3], titles[5].upper()], {"history": [4], "user_id": "u"}, list(titles))))
    data = make("predict", predict_file=str(path), max_prompt_length=20)
    rows = [data.predict_dataset[row] for row in range(3)]
    assert [row["sample_id"] for row in rows] == [0, 1, 2]
    assert rows[0]["seen"] == [3, 5]
    assert rows[1]["history"] == [data._store.keys.index(["4"])]
    assert data.predicted_users == {1: "u"}
    assert rows[2]["seen"] == list(range(24))
    assert len(rows[2]["prompt"]) <= 20
    batch = next(iter(data.predict_dataloader()))
    assert batch.item_ids.tolist()[:3] == [[-1]] * 3
    path.write_text(json.dumps([titles[3][:-8]]))
    with pytest.raises(ValueError, match=r"histories.jsonl: omitted 1 items .*line 1: .* is neither a title nor an item id .*nearest titles: "):
        make("predict", predict_file=str(path))


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "id2name.json").write_text(json.dumps({"0": "A", "1": "B"}))
    (tmp_path / "test.json").write_text(json.dumps([{"input": '"A"', "output": '"B"'}]))
    data = make(source=InstructionRows(str(tmp_path)))
    assert next(iter(data.test_dataloader())).target.tolist()[0] == 1
    with pytest.raises(ValueError, match="the train split is empty"):
        data.train_dataloader()


def test_a_trainer_calls_setup_once():
    data = RecommendationDataModule(Synthetic(**SOURCE), vocab_size=300, batch_size=4)
    data.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    data.prepare_data()
    data.setup("fit")
    dataset, loader = data.train_dataset, data.train_dataloader()
    data.setup("test")
    assert data.train_dataset is dataset
    assert data.train_dataloader() is loader


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": Hardest()}, "Hardest needs a model, which a data module does not have: use it in SelfPlayLoop"),
        ({"train_view": "packed", "tokenizer": "none"}, "train_view='packed' packs the text of titles, but tokenizer='none' has no text"),
        ({"template": "story"}, "unknown template 'story'"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RecommendationDataModule(Synthetic(), **options)


def test_the_command_line_builds_it_from_text(cache):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(RecommendationDataModule, "data", fail_untyped=True)
    settings = {
        "source": {"class_path": "Synthetic", "init_args": SOURCE},
        "split": {"history_length": 3, "fractions": [0.7, 0.2, 0.1]},
        "template": {"prefix": "Seen:\n", "suffix": "Next:", "separator": "\n"},
        "vocab_size": 300,
    }
    parsed = parser.parse_object({"data": {"class_path": "malleable.datamodules.RecommendationDataModule", "init_args": settings}})
    again = parser.parse_string(parser.dump(parsed))
    data = parser.instantiate(again).data
    assert isinstance(data, RecommendationDataModule)
    assert data.split == Split(history_length=3, fractions=(0.7, 0.2, 0.1))
    assert data.template == PromptTemplate(prefix="Seen:\n", suffix="Next:", separator="\n")
    named = parser.parse_object({"data": {"class_path": "RecommendationDataModule", "init_args": settings | {"template": "instruction"}}})
    assert parser.instantiate(named).data.template == PromptTemplate.named("instruction")


def test_real_films():
    data = make(source=MovieLens(path=str(shared_data("rec/ml100k"))), split=Split(min_rating=4), vocab_size=2048, max_prompt_length=120)
    # 55,375 likes; 166 of them of a film under its second id, 14 of users with fewer than 5.
    assert len(data.catalog) == 1664
    assert (len(data.val_dataset), len(data.test_dataset)) == (938, 938)
    assert len(data.train_dataset) == 55_195 - 3 * 938
    assert sum(data.catalog.popularity) == 55_195 - 2 * 938
    assert data.catalog.titles[:2] == ("Toy Story (1995)", "GoldenEye (1995)")
    assert not [title for title in data.catalog.titles if title.endswith((", The", ", A")) or ", The (" in title]
    rows = [data.test_dataset[row] for row in range(0, 938, 20)]
    assert max(len(row["prompt"]) for row in rows) <= 120
    assert np.mean([len(row["history"]) for row in rows]) > 5
