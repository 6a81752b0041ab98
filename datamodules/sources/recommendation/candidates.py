"""Rows with candidates, ``{historyList, itemList, trueSelection}``, and a catalogue with lines ``id::title``.

Origin of the format: LLaRA (https://github.com/ljy0ustc/LLaRA, Apache-2.0) and S-DPO (https://github.com/chenyuxin1999/S-DPO). The LastFM rows in
these repositories are from HetRec 2011 (non-commercial research). Nothing is downloaded: give the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import id_text, list_of, read_lines, text_of, texts_of
from malleable.datamodules.sources.recommendation.base import ReadyRow, ReadyRows, Source, items_table
from malleable.datamodules.sources.recommendation.ready_rows import TitleIndex, read_field, read_rows, split_files

CATALOGUE = "id2name.txt"


class CandidateRows(Source):
    """Rows of titles (``historyList`` joined by ``::``, ``itemList``, ``trueSelection``) or of ids (``history``, ``next``).

    Args:
        path: Folder with ``train``, ``val`` and ``test`` as ``.json`` or ``.jsonl`` (for training also ``train_seq.jsonl``), and ``id2name.txt``.

    Raises:
        FileNotFoundError: If the folder has no rows or no catalogue.
        ValueError: If a file is not JSON, if a field is missing in a row, or if the true item is not among the candidates.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()

    def files(self) -> list[Path]:
        """Return the files of the rows and of the catalogue."""
        if not (self.path / CATALOGUE).is_file():
            raise FileNotFoundError(f"{self.path} contains no catalogue; expected {CATALOGUE} with lines id::title")
        return [*split_files(self.path).values(), self.path / CATALOGUE]

    def load(self) -> ReadyRows:
        """Read catalogue and rows."""
        self.files()
        pairs = [_pair(line, f"{self.path / CATALOGUE}, line {number}") for number, line in read_lines(self.path / CATALOGUE)]
        keys, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        by_key = {key: position for position, key in enumerate(keys)}
        by_name = TitleIndex(names)
        rows = {}
        for split, path in split_files(self.path).items():
            rows[split] = [_row(row, by_key, by_name, place) for place, row in read_rows(path)]
        return ReadyRows(items_table(keys, names, [()] * len(names)), rows)


def _pair(line: str, place: str) -> tuple[str, str]:
    key, found, name = line.partition("::")
    if not found:
        raise ValueError(f"{place}: expected id::title, got {brief_repr(line)}")
    return key, name


def _row(row: Any, by_key: dict[str, int], by_name: TitleIndex, place: str) -> ReadyRow:
    if isinstance(row, dict) and "next" in row:
        history = [by_key.get(id_text(key, f"{place}, field history"), -1) for key in read_field(place, list_of, row, "history")]
        return ReadyRow(history, by_key.get(id_text(row["next"], f"{place}, field next"), -1))
    target, candidates = read_field(place, text_of, row, "trueSelection"), read_field(place, texts_of, row, "itemList")
    if target not in candidates:
        raise ValueError(f"{place}: trueSelection {target!r} is not in itemList; add it to itemList")
    joined = isinstance(row.get("historyList"), str)
    names = row["historyList"].split("::") if joined else read_field(place, texts_of, row, "historyList")
    positions = [[by_name.position(name) for name in group] for group in (names, candidates, [target])]
    return ReadyRow(positions[0], positions[2][0], positions[1])
