"""Histories to predict for, from a file: one row each, ids or titles, oldest first."""

from __future__ import annotations

import difflib
import json
import logging
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from malleable.datamodules.files.table_files import read_cells
from malleable.datamodules.files.text_files import cell_text, file_kind, id_text, read_json_rows, read_lines
from malleable.datamodules.recommendation.titles import clean_title

log = logging.getLogger(__name__)

KINDS = ("id", "title")
USER_FIELDS = ("user_id", "user")
# Names of the columns of CSV, and what the cells below are.
_COLUMNS = {"history": None, "item_id": "id", "title": "title"}
_SHOWN = 3


@dataclass(frozen=True)
class History:
    """A row of a file of histories.

    Attributes:
        number: Position among the rows of the file, from 0.
        items: Catalogue positions of its known items, oldest first.
        user_id: The user as the file gives it; ``None`` where the file has no users.
    """

    number: int
    items: list[int]
    user_id: str | None = None


class _Row(NamedTuple):
    place: str
    names: list[Any]
    kind: str | None = None
    user_id: str | None = None


class ItemLookup:
    """Finds items by the source's id, or by title: as given, without regard to case, or without its year, the latter two where they are unique.

    Args:
        titles: Titles of the catalogue.
        keys: The source's ids of each item.
    """

    def __init__(self, titles: Sequence[str], keys: Sequence[Sequence[str]]) -> None:
        self.titles = titles
        self.keys = keys
        self.by_key = {key: item for item, own in enumerate(keys) for key in own}
        self.exact = {title: item for item, title in enumerate(titles)}
        self.folded = _unique(title.casefold() for title in titles)
        self.short = _unique(_without_year(title.casefold()) for title in titles)

    def find(self, name: Any, place: str = "the item", kind: str | None = None) -> int | None:
        """Return the item of a name; ``None`` where there is none.

        A number is an id. A text is an id or a title, whichever it is of an item. An object ``{"id": ...}`` or ``{"title": ...}`` says which.

        Args:
            name: The name.
            place: File and line, for messages.
            kind: What a text is: ``id`` or ``title``; ``None`` for either.

        Raises:
            ValueError: If a text is the id of one item and a title of another, or the name is of another type.
        """
        if isinstance(name, Mapping):
            if len(name) != 1 or not name.keys() <= set(KINDS):
                raise ValueError(f'{place}: an item is a text, a number, {{"id": ...}} or {{"title": ...}}, got {name!r:.80}')
            ((kind, name),) = name.items()
            if kind == "title" and not isinstance(name, str):
                raise ValueError(f"{place}: a title is a text, got {name!r:.80}")
        if not isinstance(name, str):
            return self.by_key.get(id_text(name, place))
        by_key = self.by_key.get(name) if kind != "title" else None
        by_title = self._by_title(name) if kind != "id" else None
        if by_key is not None and by_title is not None and by_key != by_title:
            raise ValueError(
                f"{place}: {name!r} is the id of {self.titles[by_key]!r} and a title of {self.titles[by_title]!r} (id {self.keys[by_title][0]!r}); "
                f'say which: {{"id": {json.dumps(name)}}} or {{"title": {json.dumps(name)}}} in JSON, a header line with item_id or title in CSV'
            )
        return by_title if by_key is None else by_key

    def _by_title(self, name: str) -> int | None:
        cleaned = clean_title(name)
        folded = cleaned.casefold()
        found = (self.exact.get(name), self.exact.get(cleaned), self.folded.get(folded), self.short.get(folded))
        return next((item for item in found if item is not None), None)

    def nearest(self, name: str) -> list[str]:
        """Return the titles closest to a name."""
        names = self.short | self.folded
        close = difflib.get_close_matches(clean_title(name).casefold(), list(names), n=3, cutoff=0.5)
        return list(dict.fromkeys(self.titles[names[name]] for name in close))


def read_histories(path: Path, lookup: ItemLookup) -> list[History]:
    """Read a file of histories.

    ``.jsonl``, ``.json``
        A JSON value a line, or a JSON array of them: a list of items, oldest first, or an object with the list as ``history`` and, where known,
        ``user_id``. An item is a number, which is an id; a text, which is an id or a title; or ``{"id": ...}`` or ``{"title": ...}``.
    ``.csv``
        One history a line. The first line names the columns: ``user_id`` (may be missing), then ``item_id``, ``title`` or ``history`` (ids or
        titles), which takes all further cells. Without such a line all cells are titles, and a user has no place.

    Items that the catalogue does not have are left out, and so are empty rows and rows without any known item; all are counted and reported. A user
    may have several rows.

    Args:
        path: The file.
        lookup: Finds the items.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, a line is no history, a text names two items, or no item is known; with file and line.
    """
    kind = file_kind(path)
    if kind not in _READERS:
        raise ValueError(f"{path} is no file of histories: give .csv (one history a line), .jsonl or .json (one list of items a row)")
    rows = list(_READERS[kind](path, lookup))
    if not rows:
        raise ValueError(f"{path} holds no history")
    if all(not row.names for row in rows):
        raise ValueError(f"{rows[0].place}: the history is empty, and so are all others; give at least one item")
    if empty := [row.place for row in rows if not row.names]:
        log.warning("%s: %d of %d histories are empty and get no prediction (first: %s)", path, len(empty), len(rows), empty[0])
    found = [[lookup.find(name, row.place, row.kind) for name in row.names] for row in rows]
    histories = [
        History(number, items, row.user_id) for number, row in enumerate(rows) if (items := [item for item in found[number] if item is not None])
    ]
    _report(path, rows, found, lookup)
    return histories


def read_users(path: Path, known: Container[str]) -> list[tuple[int, str]]:
    """Read a file of users.

    Args:
        path: ``.csv`` with a column ``user_id``, or without a header and with the ids first; ``.txt`` with an id a line; ``.jsonl`` or ``.json`` with
            ids, or objects that have ``user_id``.
        known: The users of the data.

    Returns:
        Number of the row, from 0, and user. Unknown users are left out, counted and reported.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind, an id is missing, or no user is known; with file and line.
    """
    kind = file_kind(path)
    if kind not in (".csv", ".txt", ".jsonl", ".json"):
        raise ValueError(f"{path} is no file of users: give `all`, or a .csv, .txt, .jsonl or .json file with one id a row")
    rows = list(_users_of_json(path) if kind.startswith(".json") else _users_of_lines(path, kind))
    if not rows:
        raise ValueError(f"{path} holds no user")
    unknown = [(place, user) for place, user in rows if user not in known]
    if unknown:
        place, user = unknown[0]
        message = (
            f"{path}: {len(unknown)} of {len(rows)} users are not in the data, or the filters of the split left them out (first: {user!r}, "
            f"{place.rpartition(', ')[2]})"
        )
        if len(unknown) == len(rows):
            raise ValueError(f"{message}. No user is left; compare the ids with those of the interactions")
        log.warning("%s; they get no prediction", message)
    return [(number, user) for number, (_, user) in enumerate(rows) if user in known]


def _users_of_json(path: Path) -> Iterator[tuple[str, str]]:
    for _, place, row in read_json_rows(path):
        value = next((row[name] for name in USER_FIELDS if name in row), None) if isinstance(row, dict) else row
        yield place, id_text(value, f"{place}, field user_id")


def _users_of_lines(path: Path, kind: str) -> Iterator[tuple[str, str]]:
    rows = read_cells(path, ",") if kind == ".csv" else ((number, [cell_text(line)]) for number, line in read_lines(path))
    lines = [(f"{path}, line {number}", cells) for number, cells in rows]
    header = [cell.casefold() for cell in lines[0][1]] if lines else []
    column = next((header.index(name) for name in USER_FIELDS if name in header), None)
    for place, cells in lines if column is None else lines[1:]:
        if not (user := cells[column or 0] if len(cells) > (column or 0) else ""):
            raise ValueError(f"{place}, field user_id: the id is empty; give every row an id")
        yield place, user


def _report(path: Path, rows: Sequence[_Row], found: Sequence[Sequence[int | None]], lookup: ItemLookup) -> None:
    """Report what is left out.

    Raises:
        ValueError: If nothing is left.
    """
    unknown = [
        (str(name), row.place) for row, items in zip(rows, found, strict=True) for name, item in zip(row.names, items, strict=True) if item is None
    ]
    if not unknown:
        return
    first: dict[str, str] = {}
    for name, place in unknown:
        first.setdefault(name, place)
    message = f"{path}: left out {len(unknown)} items ({len(first)} distinct) that the catalogue does not have: {_described(first, lookup)}"
    empty = [row.place for row, items in zip(rows, found, strict=True) if items and all(item is None for item in items)]
    if len(empty) == sum(bool(items) for items in found):
        raise ValueError(f"{message}. No history has a known item; name items by the ids of the source or by their titles")
    log.warning("%s", message)
    if empty:
        log.warning("%s: %d of %d histories have no known item and get no prediction (first: %s)", path, len(empty), len(rows), empty[0])


def _described(first: Mapping[str, str], lookup: ItemLookup) -> str:
    shown = []
    for name, place in list(first.items())[:_SHOWN]:
        near = ", ".join(map(repr, lookup.nearest(name)))
        shown.append(f"{place.rpartition(', ')[2]}: {name!r} is neither a title nor an item id" + (f" (nearest titles: {near})" if near else ""))
    return "; ".join(shown) + ("; ..." if len(first) > _SHOWN else "")


def _read_json(path: Path, lookup: ItemLookup) -> Iterator[_Row]:
    del lookup
    for _, place, row in read_json_rows(path):
        fields = row if isinstance(row, dict) else {"history": row}
        names = fields.get("history")
        if not isinstance(names, list):
            raise ValueError(f"{place}: expected a list of ids or titles, or an object with a list 'history', got {row!r:.80}")
        user = next((fields[name] for name in USER_FIELDS if fields.get(name) is not None), None)
        yield _Row(place, names, None, None if user is None else id_text(user, f"{place}, field user_id"))


def _read_csv(path: Path, lookup: ItemLookup) -> Iterator[_Row]:
    lines = [(f"{path}, line {number}", cells) for number, cells in read_cells(path, ",") if any(map(str.strip, cells))]
    if not lines:
        return
    place, cells = lines[0]
    named = any(cell.casefold() in {*USER_FIELDS, *_COLUMNS} and lookup.find(cell, place, "title") is None for cell in cells)
    yield from _with_header(path, lines) if named else _titles(lines, lookup)


def _with_header(path: Path, lines: list[tuple[str, list[str]]]) -> Iterator[_Row]:
    (place, header), *lines = lines
    names = [cell.casefold() for cell in header]
    start = int(names[0] in USER_FIELDS)
    items = set(names[start:])
    if len(items) != 1 or not items <= set(_COLUMNS):
        raise ValueError(f"{place}: the header is {','.join(header)!r}; expected user_id (may be missing), then one of {', '.join(_COLUMNS)}")
    (column,) = items
    rows = [_Row(where, [cell for cell in cells[start:] if cell], _COLUMNS[column], cells[0] if start else None) for where, cells in lines]
    if start:
        _check_users(path, rows)
    yield from rows


def _check_users(path: Path, rows: Sequence[_Row]) -> None:
    if missing := next((row for row in rows if not row.user_id), None):
        raise ValueError(f"{missing.place}, field user_id: the id is empty; give every row an id, or leave the column out")
    repeated = Counter(row.user_id for row in rows).most_common(1)
    if repeated and repeated[0][1] > 1 and all(len(row.names) == 1 for row in rows):
        raise ValueError(
            f"{path}: every line has one item, and user {repeated[0][0]!r} has {repeated[0][1]} lines. A line is one history: put the items of a "
            "history on one line, oldest first, with commas between them"
        )


def _titles(lines: list[tuple[str, list[str]]], lookup: ItemLookup) -> Iterator[_Row]:
    """Rows of a file without a header: a cell that is no title but an id may as well be a user."""
    rows = [_Row(place, [cell for cell in cells if cell]) for place, cells in lines]
    for row in rows:
        found = (name for name in row.names if lookup.find(name, row.place) is not None and lookup.find(name, row.place, "title") is None)
        if (name := next(found, None)) is not None:
            raise ValueError(
                f"{row.place}: {name!r} is no title, but the id of an item. Without a header all cells are titles; put a header line over ids: "
                "item_id, or user_id,item_id where the first cell is the user"
            )
    leading = [lookup.find(row.names[0], row.place) for row in rows]
    following = [lookup.find(name, row.place) for row in rows for name in row.names[1:]]
    if all(item is None for item in leading) and any(item is not None for item in following):
        raise ValueError(f"{rows[0].place}: the first cell of no line is a title; if it is the user, put the header line user_id,title over the file")
    yield from rows


_READERS = {".csv": _read_csv, ".jsonl": _read_json, ".json": _read_json}


def _unique(names: Iterator[str]) -> dict[str, int]:
    """Return the positions of the names that occur once."""
    listed = list(names)
    counts = Counter(listed)
    return {name: position for position, name in enumerate(listed) if counts[name] == 1}


def _without_year(title: str) -> str:
    return title[:-7] if len(title) > 7 and title[-6] == "(" and title[-1] == ")" and title[-5:-1].isdigit() else title
