"""Rows with candidates to choose from: ``{historyList, itemList, trueSelection}`` beside a catalogue of ``id::title`` lines.

Origin of the format: LLaRA (https://github.com/ljy0ustc/LLaRA, Apache-2.0) and S-DPO (https://github.com/chenyuxin1999/S-DPO), whose LastFM rows
stem from HetRec 2011 (non-commercial research). Nothing is fetched: give the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from malleable.datamodules.sources.base import ReadyRow, ReadyRows, Source, items_table
from malleable.datamodules.sources.ready import TitleIndex, read_rows, split_files, value_of

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
        lines = (self.path / CATALOGUE).read_text(encoding="utf-8").split("\n")
        pairs = [line.rstrip("\r").split("::", 1) for line in lines if "::" in line]
        keys, names = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        by_key = {key: position for position, key in enumerate(keys)}
        by_name = TitleIndex(names)
        rows = {}
        for split, path in split_files(self.path).items():
            rows[split] = [_row(row, by_key, by_name, path, number) for number, row in enumerate(read_rows(path), start=1)]
        return ReadyRows(items_table(keys, names, [()] * len(names)), rows)


def _row(row: dict[str, Any], by_key: dict[str, int], by_name: TitleIndex, path: Path, number: int) -> ReadyRow:
    if "next" in row:
        history = [by_key.get(str(key), -1) for key in value_of(row, "history", path, number)]
        return ReadyRow(history, by_key.get(str(row["next"]), -1))
    listed, truth = value_of(row, "historyList", path, number), value_of(row, "trueSelection", path, number)
    offered = value_of(row, "itemList", path, number)
    if truth not in offered:
        raise ValueError(f"{path}, row {number}: trueSelection {truth!r} is not in itemList; every row must offer the truth")
    names = listed.split("::") if isinstance(listed, str) else listed
    positions = [[by_name.position(name) for name in group] for group in (names, offered, [truth])]
    return ReadyRow(positions[0], positions[2][0], positions[1])
