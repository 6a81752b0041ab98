"""Histories to predict for, from a file: one row each, titles or item ids, oldest first."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from malleable.datamodules.titles import clean_title


class ItemLookup:
    """Finds items by title, as given, without regard to case, or without its year where that is unique; or by the source's id.

    Args:
        titles: Titles of the catalogue.
        keys: The source's ids of each item.
    """

    def __init__(self, titles: Sequence[str], keys: Sequence[Sequence[str]]) -> None:
        self.titles = titles
        self.by_key = {key: item for item, own in enumerate(keys) for key in own}
        self.by_title: dict[str, int] = {}
        short: dict[str, list[int]] = {}
        for item, title in enumerate(titles):
            self.by_title.setdefault(title.casefold(), item)
            short.setdefault(_without_year(title.casefold()), []).append(item)
        for name, items in short.items():
            if len(items) == 1:
                self.by_title.setdefault(name, items[0])

    def find(self, name: str) -> int | None:
        """Return the item that a title or an id names; a title goes before an id."""
        found = self.by_title.get(clean_title(name).casefold())
        return found if found is not None else self.by_key.get(name.strip())

    def nearest(self, name: str) -> list[str]:
        """Return the titles closest to a name."""
        names = difflib.get_close_matches(clean_title(name).casefold(), list(self.by_title), n=3, cutoff=0.5)
        return list(dict.fromkeys(self.titles[self.by_title[name]] for name in names))


def read_histories(path: Path, lookup: ItemLookup) -> list[list[int]]:
    """Read a file of histories.

    Args:
        path: ``.csv``: one history a line, one title or id a cell, no header. ``.jsonl``: one list a line, or an object with ``history``;
            numbers are ids, text is a title or an id.
        lookup: Finds the items.

    Raises:
        ValueError: If the file is of another kind, a line is no history or names an unknown item.
    """
    if path.suffix not in _READERS:
        raise ValueError(f"{path} is no file of histories: give .csv (one history a line) or .jsonl (one list of titles or ids a line)")
    histories = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, names in _READERS[path.suffix](file, path):
            items = [lookup.find(str(name)) for name in names]
            if None in items:
                name = str(names[items.index(None)])
                hint = f"; nearest titles: {', '.join(map(repr, near))}" if (near := lookup.nearest(name)) else ""
                raise ValueError(f"{path}, line {number}: {name!r} is neither a title nor an item id of the catalogue{hint}")
            if not items:
                raise ValueError(f"{path}, line {number}: the history is empty; give at least one item")
            histories.append([item for item in items if item is not None])
    if not histories:
        raise ValueError(f"{path} holds no history")
    return histories


def _read_csv(file: Any, path: Path) -> Iterator[tuple[int, list[Any]]]:
    del path
    reader = csv.reader(file, skipinitialspace=True)
    for cells in reader:
        if names := [cell for cell in cells if cell.strip()]:
            yield reader.line_num, names


def _read_jsonl(file: Any, path: Path) -> Iterator[tuple[int, list[Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
        names = row.get("history") if isinstance(row, dict) else row
        if not isinstance(names, list):
            raise ValueError(f"{path}, line {number}: expected a list of titles or ids, or an object with a list 'history', got {line.strip()[:80]}")
        yield number, names


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl}


def _without_year(title: str) -> str:
    return title[:-7] if len(title) > 7 and title[-6] == "(" and title[-1] == ")" and title[-5:-1].isdigit() else title
