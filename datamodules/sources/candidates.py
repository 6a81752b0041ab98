"""Rows with candidates to choose from: ``{historyList, itemList, trueSelection}`` beside a catalogue of ``id::title`` lines.

Origin of the format: LLaRA (https://github.com/ljy0ustc/LLaRA, Apache-2.0) and S-DPO (https://github.com/chenyuxin1999/S-DPO), whose LastFM rows
stem from HetRec 2011 (non-commercial research). Nothing is fetched: give the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from malleable.datamodules.sources.base import ReadyRow, ReadyRows, Source, items_table
from malleable.datamodules.sources.ready import TitleIndex, read_rows, split_files, value_of
from malleable.datamodules.text_files import id_text, read_lines

CATALOGUE = "id2name.txt"


class CandidateRows(Source):
    """Rows of names (``historyList`` joined by ``::``, ``itemList``, ``trueSelection``) or of ids (``history``, ``next``), file by file.

    Args:
        path: Folder with ``train``, ``val`` and ``test`` as ``.json`` or ``.jsonl`` (for training also ``train_seq.jsonl``), and ``id2name.txt``.

    Raises:
        FileNotFoundError: If the folder has no rows or no catalogue.
        ValueError: If a file is no JSON, a row misses a field, or the truth is not among its candidates.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()

    def files(self) -> list[Path]:
        """Return rows and catalogue."""
        if not (self.path / CATALOGUE).is_file():
            raise FileNotFoundError(f"{self.path} holds no catalogue; expected {CATALOGUE} with lines id::title")
        return [*split_files(self.path).values(), self.path / CATALOGUE]

    def load(self) -> ReadyRows:
        """Read catalogue and rows."""
        self.files()
        pairs = [line.split("::", 1) for _, line in read_lines(self.path / CATALOGUE) if "::" in line]
        keys, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        by_key = {key: position for position, key in enumerate(keys)}
        by_name = TitleIndex(names)
        rows = {}
        for split, path in split_files(self.path).items():
            rows[split] = [_row(row, by_key, by_name, place) for place, row in read_rows(path)]
        return ReadyRows(items_table(keys, names, [()] * len(names)), rows)


def _row(row: dict[str, Any], by_key: dict[str, int], by_name: TitleIndex, place: str) -> ReadyRow:
    if "next" in row:
        history = [by_key.get(id_text(key, f"{place}, field history"), -1) for key in value_of(row, "history", place)]
        return ReadyRow(history, by_key.get(id_text(row["next"], f"{place}, field next"), -1))
    listed, truth = value_of(row, "historyList", place), value_of(row, "trueSelection", place)
    offered = value_of(row, "itemList", place)
    if truth not in offered:
        raise ValueError(f"{place}: trueSelection {truth!r} is not in itemList; every row must offer the truth")
    names = listed.split("::") if isinstance(listed, str) else listed
    positions = [[by_name.position(name) for name in group] for group in (names, offered, [truth])]
    return ReadyRow(positions[0], positions[2][0], positions[1])
