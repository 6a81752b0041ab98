import json
from pathlib import Path

import pytest
from shared import shared_data

from malleable.datamodules.sources.recommendation.instruction import InstructionRows, TitleFinder

NAMES = ["Superhero", 'A Child Called "It" (Dave Pelzer #1)', "Go, Dog, Go", "A  Clash of Kings", "It"]
FINDER = TitleFinder(NAMES)


def row(history, target):
    listed = ", ".join(f'"{title}"' for title in history)
    return {"instruction": "Recommend.", "input": f"The user has read: {listed}, please recommend", "output": f'"{target}"\n'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "id2name.json").write_text(json.dumps(dict(enumerate(NAMES))))
    (tmp_path / "name2genre.json").write_text(json.dumps({"Superhero": ["fiction", "rare"], "It": ["horror"]}))
    (tmp_path / "genre_dict.json").write_text(json.dumps({"fiction": 0, "horror": 0}))
    (tmp_path / "train.json").write_text(json.dumps([row(NAMES[:3], "It"), row(["Unknown", "Superhero"], "Nowhere")]))
    (tmp_path / "test.jsonl").write_text(json.dumps(row(["A Clash of Kings"], "Superhero")) + "\n\n")
    return tmp_path


@pytest.mark.parametrize("history", [[0, 1, 2], [1, 1], [4, 1, 4], [3, 2], []])
def test_titles_with_quotes_and_commas_are_found(history):
    assert FINDER.find_all(row([NAMES[item] for item in history], "It")["input"]) == history


@pytest.mark.parametrize("end", ["", ".", ". Please go on", "\nNext:", "  "])
def test_lists_with_different_endings(end):
    assert FINDER.find_all('Read: "It", "Superhero"' + end) == [4, 0]


def test_unknown_titles_are_minus_one_and_others_are_found():
    assert FINDER.find_all('Read: "Nothing", "Superhero", "No, one", "It"') == [-1, 0, -1, 4]
    assert FINDER.find_all('Read: "never closed') == [-1]


@pytest.mark.parametrize(
    ("text", "item"), [('"It"\n', 4), ("It", 4), ('"A Child Called "It" (Dave Pelzer #1)"', 1), ('"A Clash of Kings"', 3), ("x", -1), ('"', -1)]
)
def test_an_answer_is_found_with_or_without_quotes(text, item):
    assert FINDER.find(text) == item


def test_rows_and_catalogue_files(folder):
    source = InstructionRows(str(folder))
    ready = source.load()
    assert {split: [tuple(row) for row in rows] for split, rows in ready.rows.items()} == {
        "train": [([0, 1, 2], 4, ()), ([-1, 0], -1, ())],
        "test": [([3], 0, ())],
    }
    assert ready.items["genres"].tolist() == [("fiction",), (), (), (), ("horror",)]
    assert [path.name for path in source.files()] == ["train.json", "test.jsonl", "id2name.json", "name2genre.json", "genre_dict.json"]


def test_name2id_without_genres(folder):
    (folder / "name2id.json").write_text(json.dumps({name: number for number, name in enumerate(NAMES)}))
    for name in ("id2name.json", "name2genre.json"):
        (folder / name).unlink()
    items = InstructionRows(str(folder)).load().items
    assert items["item_id"].tolist() == ["0", "1", "2", "3", "4"]
    assert items["genres"].tolist() == [()] * 5


def test_a_folder_without_catalogue_or_rows(folder, tmp_path):
    (folder / "id2name.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"contains no catalogue; expected id2name.json or name2id.json"):
        InstructionRows(str(folder)).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"contains no rows; expected files such as train.json, val.json, test.json"):
        InstructionRows(str(tmp_path / "empty")).files()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "train.json: not JSON"),
        ("{}", "train.json, line 1: the field 'input' is missing"),
        ('[{"input": ""}]', r"train.json, entry 1: the field 'output' is missing; the fields are \['input'\]"),
        ('["x"]', "train.json, entry 1: the field 'input' is missing; expected a JSON object, got 'x'"),
    ],
)
def test_wrong_rows(folder, text, message):
    (folder / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        InstructionRows(str(folder)).load()


def test_counts_of_the_published_files():
    ready = InstructionRows(str(shared_data("rec/goodreads_sprec"))).load()
    assert len(ready.items) == 4058
    assert {split: len(rows) for split, rows in ready.rows.items()} == {"train": 5000, "val": 256, "test": 1000}
    # Its readme: 100 %, 99.6 % and 99.8 % of the targets are in the catalogue, and 10 items in 99.9 % of the histories.
    assert {split: sum(row.target < 0 for row in rows) for split, rows in ready.rows.items()} == {"train": 0, "val": 1, "test": 2}
    histories = [row.history for rows in ready.rows.values() for row in rows]
    assert sum(len(history) == 10 for history in histories) / len(histories) == pytest.approx(0.999, abs=0.001)
    assert sum(item < 0 for history in histories for item in history) == 19
    assert len({row.target for row in ready.rows["train"]}) == 2341
    assert len({genre for genres in ready.items["genres"] for genre in genres}) == 7
