"""Rows, views, cache, ids and prompts of PreferenceDataModule."""

import json
import logging

import numpy as np
import pytest
from chat_templates import chat_tokenizer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.batch import AnswerBatch, PreferenceBatch
from malleable.datamodules.preference import store
from malleable.datamodules.preference.datamodule import PreferenceDataModule
from malleable.datamodules.preference.split import PreferenceSplit
from malleable.datamodules.sources.preference.base import PreferenceRow, PreferenceSource, PreferenceTables
from malleable.datamodules.sources.preference.files import PreferenceFile
from malleable.datamodules.sources.preference.synthetic import SyntheticPreferences


class Rows(PreferenceSource):
    """Given rows."""

    def __init__(self, rows, val=None):
        self.rows, self.val = rows, val

    def files(self):
        return []

    def settings(self):
        return {"rows": repr(self.rows), "val": repr(self.val)}

    def load(self):
        return PreferenceTables({"train": self.rows} | ({} if self.val is None else {"val": self.val}))


def pair(prompt, *answers, **options):
    return PreferenceRow(prompt, answers, f"row of {prompt}", **options)


PAIRS = [pair(f"Question {n}?", f"right {n}", f"wrong {n}") for n in range(40)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("preference"))


@pytest.fixture
def make(cache):
    def make_data(source=None, **options):
        data = PreferenceDataModule(source or Rows(PAIRS), **{"batch_size": 4, "cache_dir": cache, **options})
        data.prepare_data()
        data.setup("fit")
        return data

    return make_data


def rows_of(dataset):
    return {row["sample_id"]: row for row in (dataset[index] for index in range(len(dataset)))}


def facts(data):
    return {name: text for name, text in data.data_summary() if name != "warning"}


def test_rows_have_the_chosen_answer_first_and_texts(make):
    data = make()
    datasets = {"train": data.train_dataset, "val": data.val_dataset, "test": data.test_dataset}
    assert sum(map(len, datasets.values())) == 40
    for split, dataset in datasets.items():
        for index in range(len(dataset)):
            row, texts = dataset[index], dataset.texts(index)
            number = texts.prompt.removeprefix("Question ").removesuffix("?")
            assert texts.answers == (f"right {number}", f"wrong {number}")
            assert texts == data.texts(split, row["sample_id"])
            assert set(row) == {"sample_id", "prompt", "answers"}
            assert all(answer[-1] == data.vocabulary.eos_token_id for answer in row["answers"])
    with pytest.raises(KeyError, match="the val split has no row with sample_id 5"):
        data.texts("val", 5)


def test_batches_are_preference_batches(make):
    """Only training batches have the number of chosen tokens of the step."""
    data = make()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert type(batch) is PreferenceBatch
        tokens = batch.answer_mask[:, 0].sum() if loader is data.train_dataloader() else None
        assert batch.num_step_tokens == tokens
        assert batch.desirable is None
        assert batch.smoothing is None


def test_the_chosen_view_has_answer_batches_for_training_only(make):
    data, pairs = make(train_view="chosen"), rows_of(make().train_dataset)
    batch = next(iter(data.train_dataloader()))
    assert type(batch) is AnswerBatch
    assert batch.num_step_tokens == batch.answer_mask.sum()
    assert type(next(iter(data.val_dataloader()))) is PreferenceBatch
    assert rows_of(data.train_dataset) == {key: row | {"answers": row["answers"][:1]} for key, row in pairs.items()}
    assert data.row_tokens().tolist() == [len(data.train_dataset[index]["answers"][0]) for index in range(len(data.train_dataset))]


def test_batch_sizes_do_not_change_rows(make):
    one, other = make(batch_size=4), make(batch_size=8, eval_batch_size=3)
    for split in ("train", "val", "test"):
        assert rows_of(getattr(one, f"{split}_dataset")) == rows_of(getattr(other, f"{split}_dataset"))


def test_ids_and_splits_do_not_depend_on_other_rows(make):
    tokenizer = make().vocabulary.tokenizer
    whole, part = make(tokenizer=tokenizer), make(Rows(PAIRS[::-1][3:]), tokenizer=tokenizer)
    for split in ("train", "val"):
        before, after = (rows_of(getattr(data, f"{split}_dataset")) for data in (whole, part))
        assert after.items() <= before.items()
    assert len(part.train_dataset) >= len(whole.train_dataset) - 3


def test_limits_and_seeds_select_rows_by_id(make):
    whole, limited = (rows_of(make(split=PreferenceSplit(train_limit=limit)).train_dataset) for limit in (None, 9))
    assert len(limited) == 9
    assert limited.items() <= whole.items()
    assert rows_of(make(seed=1, split=PreferenceSplit(train_limit=9)).train_dataset).keys() != limited.keys()


def test_several_rejected_answers_are_ragged_and_padded(make):
    rows = [pair("A?", "a", "b", "c", "d"), pair("B?", "a", "b"), *PAIRS[:10]]
    data = make(Rows(rows), split=PreferenceSplit(1, None))
    counts = sorted(len(row["answers"]) for row in rows_of(data.train_dataset).values())
    assert counts[-1] == 4 or len(data.val_dataset[0]["answers"]) == 4
    batch = data.train_dataset.collate([data.train_dataset[index] for index in range(len(data.train_dataset))])
    assert batch.answer_mask.any(-1).sum(1).tolist() == [len(row["answers"]) for row in rows_of(data.train_dataset).values()]
    assert "% of rows" in facts(data)["several rejected"]


def test_smoothing_reaches_the_batch(make):
    data = make(Rows([row._replace(smoothing=0.25) for row in PAIRS]))
    assert next(iter(data.train_dataloader())).smoothing.tolist() == [0.25] * 4


UNPAIRED = [PreferenceRow(f"Question {n // 2}?", (f"{'right' if n % 2 else 'wrong'} {n}",), "x", bool(n % 2)) for n in range(60)]


def test_unpaired_rows_have_the_answer_of_another_prompt_of_their_split(make):
    data = make(Rows(UNPAIRED), split=PreferenceSplit(0.2, None))
    own = {(row.prompt, row.answers[0]): row.desirable for row in UNPAIRED}
    for dataset in (data.train_dataset, data.val_dataset):
        texts = [dataset.texts(index) for index in range(len(dataset))]
        prompt_of = {text.answers[0]: text.prompt for text in texts}
        for index, (prompt, answers) in enumerate(texts):
            assert dataset[index]["desirable"] == own[prompt, answers[0]]
            assert prompt_of[answers[1]] != prompt
            assert len(dataset[index]["answers"]) == 2
    batch = next(iter(data.train_dataloader()))
    assert batch.desirable.dtype == batch.answer_mask.dtype
    assert facts(data)["desirable"] == "50.0% of rows"


def test_the_chosen_view_of_unpaired_rows_has_the_desirable_ones(make):
    data = make(Rows(UNPAIRED), train_view="chosen")
    assert all("right" in data.train_dataset.texts(index).answers[0] for index in range(len(data.train_dataset)))
    assert len(data.train_dataset) == data.row_tokens().size < len(data.train_dataset.table)
    assert "desirable" not in data.train_dataset[0]
    with pytest.raises(ValueError, match="train_view='chosen' needs desirable answers, but no training row has one"):
        make(Rows([row._replace(desirable=False) for row in UNPAIRED]), train_view="chosen")


def test_label_noise_reverses_training_rows_only(make):
    clean, noisy, every = (make(SyntheticPreferences(300), label_noise=share) for share in (0.0, 0.5, 1.0))
    before, after = rows_of(clean.train_dataset), rows_of(noisy.train_dataset)
    reversed_rows = [key for key in before if after[key] != before[key]]
    assert 0.4 < len(reversed_rows) / len(before) < 0.6
    assert all(after[key]["answers"] == before[key]["answers"][::-1] for key in reversed_rows)
    assert all(row["answers"] == before[key]["answers"][::-1] for key, row in rows_of(every.train_dataset).items())
    assert rows_of(noisy.val_dataset) == rows_of(clean.val_dataset)
    assert noisy.train_dataset.texts(0).answers in (clean.train_dataset.texts(0).answers, clean.train_dataset.texts(0).answers[::-1])
    assert facts(noisy)["label noise"] == "the preference of 50.0% of training rows is reversed"
    chosen = make(SyntheticPreferences(300), label_noise=1.0, train_view="chosen")
    assert chosen.row_tokens().tolist() == [len(row["answers"][0]) for row in rows_of(chosen.train_dataset).values()]
    flipped = make(Rows(UNPAIRED), label_noise=1.0)
    assert all(flipped.train_dataset[index]["desirable"] == ("wrong" in flipped.train_dataset.texts(index).answers[0]) for index in range(20))


def test_dropped_and_shortened_rows_are_counted(make):
    tokenizer = make().vocabulary.tokenizer
    long = [pair("Question " * 30 + "?", "right 1", "wrong 1"), pair("B?", "right " * 40 + "a", "right " * 40 + "b")]
    data = make(Rows(PAIRS + long), tokenizer=tokenizer, max_length=30, split=PreferenceSplit(1, None))
    assert facts(data)["dropped"] == "answers equal after truncation: 1"
    assert facts(data)["source"] == "42 rows"
    assert max(len(row["prompt"]) + max(map(len, row["answers"])) for row in rows_of(data.train_dataset).values()) <= 30
    assert facts(data)["shortened"] == "2.4% of rows"
    dropping = make(Rows(PAIRS + long), tokenizer=tokenizer, max_length=30, truncate="drop", split=PreferenceSplit(1, None))
    assert facts(dropping)["dropped"] == "too long: 2"
    assert facts(dropping)["shortened"] == "0.0% of rows"
    with pytest.raises(ValueError, match=r"no training row remains \(too long: 40\); check the data, and max_length"):
        make(tokenizer=tokenizer, max_length=2, truncate="drop")


def test_prompts_and_answers_without_tokens_are_dropped(make):
    data = make(Rows([*PAIRS, pair("", "a", "b"), pair("A?", "</s>", "b")]), split=PreferenceSplit(1, None))
    assert facts(data)["dropped"] == "answer without tokens: 1; prompt without tokens: 1"


def test_the_summary_is_logged_and_warns(make, caplog):
    rows = [pair("Question " * 30 + f"{n}?", "right", "wrong") for n in range(20)] + [pair("Q?", "</s>", "b")] * 8
    with caplog.at_level(logging.INFO):
        data = make(Rows(rows, val=rows[:2]), max_prompt_length=8)
    warnings = [text for name, text in data.data_summary() if name == "warning"]
    assert any("8 of 30 rows were dropped (answer without tokens: 8)" in text for text in warnings)
    assert any("100.0% of training rows exceed max_length or max_prompt_length" in text for text in warnings)
    assert any("of the val prompts are also training prompts" in text for text in warnings)
    assert "data of Rows:" in caplog.text
    assert facts(data)["prompt tokens"] == "mean 8.0, median 8, 95 % 8, maximum 8"
    assert facts(data)["rows"].startswith("train ")


def test_the_cache_is_reused_until_the_data_or_a_setting_change(make, tmp_path, monkeypatch):
    path = tmp_path / "f.jsonl"

    def write(count):
        path.write_text(
            "".join(json.dumps({"prompt": row.prompt, "chosen": row.answers[0], "rejected": row.answers[1]}) + "\n" for row in PAIRS[:count])
        )

    built = []
    build = store.build
    monkeypatch.setattr(store, "build", lambda settings: built.append(1) or build(settings))
    write(30)
    source = PreferenceFile(str(path))
    first = make(source)
    make(source, batch_size=2, label_noise=0.5, split=PreferenceSplit(train_limit=5), train_view="chosen")
    assert len(built) == 1
    for options in ({"max_length": 20}, {"vocab_size": 300}, {"seed": 1}, {"split": PreferenceSplit(0.2)}):
        make(source, **options)
    assert len(built) == 5
    write(40)
    assert len(make(source).train_dataset) > len(first.train_dataset)
    assert len(built) == 6


def test_a_damaged_cache_and_a_removed_tokenizer_are_built_again(tmp_path, caplog):
    def make_own():
        data = PreferenceDataModule(Rows(PAIRS), vocab_size=311, cache_dir=str(tmp_path))
        data.setup("fit")
        return data

    rows = rows_of(make_own().train_dataset)
    (file,) = tmp_path.glob("preference/*/train.prompts.npy")
    file.write_bytes(file.read_bytes()[:-1])
    assert rows_of(make_own().train_dataset) == rows
    assert "train.prompts.npy): building it again" in caplog.text
    tokenizer = make_own().vocabulary.tokenizer
    (tmp_path.__class__(tokenizer) / "tokenizer.json").unlink()
    assert make_own().vocabulary.tokenizer == tokenizer
    assert (tmp_path.__class__(tokenizer) / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer("llama3", [row.prompt for row in PAIRS]).save_pretrained(folder)
    return str(folder)


def test_the_vocabulary_has_the_token_that_ends_an_answer(make, chat_folder):
    data = make(chat=True, tokenizer=chat_folder)
    end = data.vocabulary.eos_token_id
    assert all(answer[-1] == end for row in rows_of(data.train_dataset).values() for answer in row["answers"])
    assert data.vocabulary.tokenizer == chat_folder
    assert data.vocabulary.largest_token_id < data.vocabulary.vocab_size
    plain = make(tokenizer=chat_folder)
    assert plain.vocabulary.eos_token_id != end
    scored = make(chat=True, tokenizer=chat_folder, mask_assistant_header=False)
    assert len(scored.train_dataset[0]["prompt"]) < len(data.train_dataset[0]["prompt"])


def test_conversations_need_a_chat_template(make):
    with pytest.raises(ValueError, match="has no chat template, which conversations need"):
        make(chat=True)


def test_prompts_to_answer_are_tokenised_like_those_of_the_data(make, chat_folder, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": row.prompt}) for row in PAIRS))
    (tmp_path / "p.txt").write_text("\n".join(row.prompt for row in PAIRS))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"prompt": [{"role": "user", "content": row.prompt}]}) for row in PAIRS))
    for options, names in (({"chat": True, "tokenizer": chat_folder}, ("p.jsonl", "p.txt", "t.jsonl")), ({}, ("p.jsonl", "p.txt"))):
        for name in names:
            data = make(**options, predict_file=str(tmp_path / name))
            known = {
                text.prompt: row["prompt"] for text, row in ((data.val_dataset.texts(n), data.val_dataset[n]) for n in range(len(data.val_dataset)))
            }
            found = {data.predict_dataset.texts(n).prompt: data.predict_dataset[n]["prompt"] for n in range(40)}
            assert len(found) == 40
            assert known.items() <= found.items()
    batch = next(iter(data.predict_dataloader()))
    assert type(batch) is AnswerBatch
    assert batch.sample_id.tolist() == [0, 1, 2, 3]
    assert not batch.answer_mask.any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"question": "a"}', "p.jsonl, line 1: the field 'prompt' is missing; the fields are question"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl, line 1: field prompt: expected a string or a list of messages"),
        ("p.jsonl", '{"prompt": " "}', "p.jsonl, line 1: the prompt is empty"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}]}',
            "p.jsonl, line 1: the prompt is a conversation, but the data have plain prompts",
        ),
        ("p.txt", "\n", "p.txt contains no prompts"),
        ("p.txt", "a " * 50, "p.txt, line 1: the prompt has .* tokens, more than max_prompt_length or max_length allow"),
    ],
)
def test_unusable_prompts_are_errors(make, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        make(predict_file=str(tmp_path / name), max_prompt_length=20, truncate="drop")


def test_missing_splits_are_errors_that_name_the_options(make):
    data = make(split=PreferenceSplit(None, None))
    with pytest.raises(MisconfigurationException, match=r"no val data: give the source validation rows, or set split.val_size"):
        data.val_dataloader()
    with pytest.raises(MisconfigurationException, match="no data for prediction: set predict_file"):
        data.predict_dataloader()


def test_all_rows_dropped_is_an_error(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"prompt": "P", "chosen": "a", "rejected": "a"}\n')
    with pytest.raises(ValueError, match=r"all train rows of PreferenceFile were dropped \(rejected answers equal to the chosen one: 1\)"):
        PreferenceDataModule(PreferenceFile(str(tmp_path / "f.jsonl"))).setup("fit")


@pytest.mark.parametrize(
    "options", [{"max_length": 1}, {"max_prompt_length": 0}, {"truncate": "end"}, {"train_view": "sft"}, {"label_noise": 2}, {"batch_size": 0}]
)
def test_arguments_out_of_range_are_errors(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be "):
        PreferenceDataModule(Rows(PAIRS), **options)


def test_ids_of_equal_rows_differ(make):
    data = make(Rows(PAIRS * 2))
    ids = np.concatenate([data.train_dataset.sample_ids, data.val_dataset.sample_ids, data.test_dataset.sample_ids])
    assert len(set(ids.tolist())) == 80
    assert ids.min() >= 0
