"""Accepted shapes of preference records, dropped rows, and errors with file, line and field."""

import json

import pytest

from malleable.datamodules.sources.preference.base import Message
from malleable.datamodules.sources.preference.files import PreferenceFile

USER = {"role": "user", "content": "Capital of Peru?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Lima", "Cuzco"))
PAIR = {"prompt": "Capital of Peru?", "chosen": "Lima", "rejected": "Cuzco"}
TURNS = (Message("user", "Capital of Peru?"),)


def load(tmp_path, rows, **options):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferenceFile(str(path), **options).load()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "Lima", "rejected": "Cuzco"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER | {"tool_calls": None}], "chosen": [GOOD], "rejected": [[BAD]]},
    ],
)
def test_all_forms_of_a_conversation_give_the_same_row(tmp_path, row):
    ((found,),) = load(tmp_path, [row]).rows.values()
    assert (found.prompt, found.answers, found.desirable) == (TURNS, ("Lima", "Cuzco"), None)
    assert found.place.endswith("f.jsonl, line 1")


def test_plain_texts_are_not_changed(tmp_path):
    ((row,),) = load(tmp_path, [{"prompt": " P\n", "chosen": " a", "rejected": "b ", "other": 1}]).rows.values()
    assert (row.prompt, row.answers) == (" P\n", (" a", "b "))


def test_rows_may_have_several_rejected_answers(tmp_path):
    rows = [PAIR | {"rejected": ["Cuzco", "Quito", "Cuzco", "Lima", ""]}, PAIR]
    tables = load(tmp_path, rows)
    assert [row.answers for row in tables.rows["train"]] == [("Lima", "Cuzco", "Quito"), ("Lima", "Cuzco")]
    assert not tables.dropped
    ((row,),) = load(tmp_path, [{"chosen": [USER, GOOD], "rejected": [[USER, BAD], [USER, BAD | {"content": "Quito"}]]}]).rows.values()
    assert row.answers == ("Lima", "Cuzco", "Quito")


@pytest.mark.parametrize(("label", "expected"), [(True, True), (False, False), (1, True), (0, False), ("TRUE", True), ("false", False)])
def test_unpaired_rows(tmp_path, label, expected):
    for completion, prompt in (("Lima", "P"), ([GOOD], [USER]), ([USER, GOOD], None)):
        row = {"completion": completion, "label": label} | ({} if prompt is None else {"prompt": prompt})
        ((found,),) = load(tmp_path, [row]).rows.values()
        assert (found.answers, found.desirable) == (("Lima",), expected)
        assert found.prompt == ("P" if prompt == "P" else TURNS)


def test_columns_can_be_renamed(tmp_path):
    row = {"question": "Capital of Peru?", "good": "Lima", "bad": "Cuzco", "noise": "0.25"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "smoothing": "noise"}
    ((found,),) = load(tmp_path, [row], columns=columns).rows.values()
    assert (found.prompt, found.answers, found.smoothing) == ("Capital of Peru?", ("Lima", "Cuzco"), 0.25)


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path):
    rows = [PAIR, PAIR | {"rejected": "Lima"}, PAIR | {"rejected": []}, PAIR | {"chosen": " "}, PAIR | {"rejected": ["", "\n"]}]
    tables = load(tmp_path, rows)
    assert len(tables.rows["train"]) == 1
    assert tables.dropped == {"rejected answers equal to the chosen one": 1, "no rejected answer": 1, "empty answer": 2}
    assert load(tmp_path, [{"prompt": "P", "completion": "", "label": True}]).dropped == {"empty answer": 1}


def test_pairs_may_have_further_columns(tmp_path):
    """For example scores, or a column `label` of another kind."""
    plain = load(tmp_path, [PAIR])
    assert load(tmp_path, [PAIR | {"completion": "a", "label": "good", "score": 3}]).rows["train"][0].answers == plain.rows["train"][0].answers


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "expected an object with prompt, chosen and rejected"),
        ({"question": "P", "good": "a"}, r"expected prompt, chosen and rejected .* the fields are question, good; rename them with columns"),
        ({"prompt": "P", "chosen": "a"}, "the field 'rejected' is missing or null"),
        (PAIR | {"chosen": None}, "the field 'chosen' is missing or null"),
        ({"chosen": "a", "rejected": "b"}, "the field 'prompt' is missing; give a prompt, or whole conversations"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "the field 'prompt' is missing, and field chosen has no turn before the answer"),
        (PAIR | {"chosen": 3}, "field chosen: expected a string .*got 3"),
        (PAIR | {"prompt": 3}, "field prompt: expected a string or a list of messages with role and content, got 3"),
        (PAIR | {"prompt": []}, "field prompt: expected a string or a list of messages"),
        (PAIR | {"rejected": ["a", 3]}, "field rejected: expected a string, a list of messages, or a list of several such answers"),
        (PAIR | {"rejected": [BAD]}, "field rejected: expected a string like the prompt"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "field chosen: the last turn must be of the role assistant, got 'user'"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "field rejected: the turns before the answer differ"),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [BAD]}, "field chosen: the turns before the answer differ"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "field prompt: the last turn of a prompt must not be of the assistant"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "field prompt: a message must have a role and a content, both strings"),
        ({"prompt": [USER | {"tool_calls": [1]}], "chosen": "a", "rejected": "b"}, "field prompt: messages with tool calls are not supported"),
        (PAIR | {"smoothing": 1.5}, r"field smoothing: expected a probability in \[0, 1\], got 1.5"),
        (PAIR | {"smoothing": "much"}, "field smoothing: expected a probability"),
        (PAIR | {"smoothing": 10**400}, "field smoothing: expected a probability"),
        (PAIR | {"smoothing": True}, "field smoothing: expected a probability"),
        ({"prompt": "P", "completion": "a", "label": "yes"}, r"field label: expected true or false \(or 1 or 0\), got 'yes'"),
        ({"prompt": "P", "completion": "a"}, "the field 'label' is missing or null"),
    ],
)
def test_wrong_rows_are_errors_with_file_line_and_field(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"f.jsonl, line 1: {message}"):
        load(tmp_path, [row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "P", "completion": "a", "label": True}, "completion and label, but chosen and rejected in .*line 1"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "the prompt is a conversation, but the prompt is text in .*line 1"),
        (PAIR | {"smoothing": 0.1}, "smoothing is given, but smoothing is missing in .*line 1"),
    ],
)
def test_mixed_shapes_are_errors(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"f.jsonl, line 2: {message}; all rows of a source must have the same shape"):
        load(tmp_path, [PAIR, row])


def test_columns_must_exist(tmp_path):
    with pytest.raises(ValueError, match="columns has the unknown field 'answer'; the fields are prompt, chosen"):
        PreferenceFile("f.jsonl", columns={"answer": "a"})
    with pytest.raises(ValueError, match=r"f.jsonl, line 1: no column 'q' for prompt, only prompt, chosen, rejected; correct columns"):
        load(tmp_path, [PAIR], columns={"prompt": "q"})
