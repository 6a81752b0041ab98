"""Readers of the files of prediction: histories of items, given by id or title, and users."""

from __future__ import annotations

import difflib
import json
import logging
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.sniffing import DELIMITERS, sniff_delimiter, sniff_encoding
from malleable.datamodules.files.table_files import read_cells
from malleable.datamodules.files.text_files import JsonRow, cell_text, file_kind, id_text, read_json_rows, read_lines
from malleable.datamodules.recommendation.titles import clean_title

log = logging.getLogger(__name__)

KINDS = ("id", "title")
USER_FIELDS = ("user_id", "user")
# Names of the columns of items, and the kind of their cells: ids, titles, or both (`None`).
_COLUMNS = {"history": None, "item_id": "id", "title": "title"}
# The other kind of a cell, and its description for messages.
_OTHER_KINDS = {"id": ("title", "a title"), "title": ("id", "an item id")}
_COLUMN_OF = {"id": "item_id", "title": "title"}
_SHOWN = 3  # maximum number of examples in a message


@dataclass(frozen=True)
class History:
    """Row of a file of histories.

    Attributes:
        number: Number of the row in the file, from 0.
        items: Positions in the catalogue of the known items, oldest first.
        user_id: The user; ``None`` if the row has no user.
    """

    number: int
    items: list[int]
    user_id: str | None = None


class _Row(NamedTuple):
    """Row of a file, before its items are looked up.

    Attributes:
        place: File and line, for messages.
        names: Ids or titles of the items, oldest first.
        kind: Kind of the names: ``id``, ``title``, or ``None`` for both.
        user_id: The user, or ``None``.
    """

    place: str
    names: list[Any]
    kind: str | None = None
    user_id: str | None = None


class TextFormat(NamedTuple):
    """Delimiter and encoding of text files. Files of prediction have the format of the source's files, unless they indicate another one.

    Attributes:
        delimiter: Delimiter between cells; ``None`` for a comma.
        encoding: Encoding of files that are not UTF-8; ``None`` if unknown.
    """

    delimiter: str | None = None
    encoding: str | None = None

    @classmethod
    def of_source(cls, source: Any) -> TextFormat:
        """Return the format of the files of a source, given or detected."""
        return cls(*source.text_format()) if hasattr(source, "text_format") else cls()

    def cells(self, path: Path, names: Container[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield number and cells of the rows of a table, see :mod:`malleable.datamodules.files.sniffing`."""
        encoding = sniff_encoding(path, self.encoding)
        is_tsv = file_kind(path) == ".tsv"
        delimiter = sniff_delimiter(path, names, None if is_tsv else self.delimiter, encoding, default="\t" if is_tsv else ",")
        return read_cells(path, delimiter, encoding)

    def json_rows(self, path: Path) -> Iterator[JsonRow]:
        """Yield the rows of a JSON file."""
        return read_json_rows(path, sniff_encoding(path, self.encoding))


DEFAULT_FORMAT = TextFormat()
"""Format without a source: UTF-8 or cp1252, with commas."""


class ItemLookup:
    """Lookup of items by their ids in the source, or by title.

    A title is first compared unchanged, then without case, then without its year; the latter two only if the result is unique.

    Args:
        titles: Titles of the catalogue.
        keys: Ids of each item in the source.
    """

    def __init__(self, titles: Sequence[str], keys: Sequence[Sequence[str]]) -> None:
        self.titles = titles
        self.keys = keys
        self.by_key = {key: item for item, own in enumerate(keys) for key in own}
        self.exact = {title: item for item, title in enumerate(titles)}
        self.folded = _unique(title.casefold() for title in titles)
        self.short = _unique(_without_year(title.casefold()) for title in titles)

    def find(self, name: Any, place: str = "the item", kind: str | None = None) -> int | None:
        """Return the item with an id or title; ``None`` if there is none.

        A number is an id. A string is an id or a title. An object ``{"id": ...}`` or ``{"title": ...}`` states the kind.

        Args:
            name: Id or title.
            place: File and line, for messages.
            kind: Kind of a string: ``id`` or ``title``; ``None`` for both.

        Raises:
            ValueError: If a string is the id of one item and the title of another one, or if ``name`` has another type.
        """
        if isinstance(name, Mapping):
            if len(name) != 1 or not name.keys() <= set(KINDS):
                raise ValueError(f'{place}: an item must be a string, a number, {{"id": ...}} or {{"title": ...}}, got {brief_repr(name)}')
            ((kind, name),) = name.items()
            if kind == "title" and not isinstance(name, str):
                raise ValueError(f"{place}: a title must be a string, got {brief_repr(name)}")
        if not isinstance(name, str):
            return self.by_key.get(id_text(name, place))
        by_key = self.by_key.get(name) if kind != "title" else None
        by_title = self._by_title(name) if kind != "id" else None
        if by_key is not None and by_title is not None and by_key != by_title:
            raise ValueError(
                f"{place}: {name!r} is the id of {self.titles[by_key]!r} and the title of {self.titles[by_title]!r} (id {self.keys[by_title][0]!r}); "
                f'state the kind: {{"id": {json.dumps(name)}}} or {{"title": {json.dumps(name)}}} in JSON, a column item_id or title in CSV'
            )
        return by_title if by_key is None else by_key

    def _by_title(self, name: str) -> int | None:
        cleaned = clean_title(name)
        folded = cleaned.casefold()
        found = (self.exact.get(name), self.exact.get(cleaned), self.folded.get(folded), self.short.get(folded))
        return next((item for item in found if item is not None), None)

    def nearest(self, name: str) -> list[str]:
        """Return the titles that are most similar to a string."""
        names = self.short | self.folded
        close = difflib.get_close_matches(clean_title(name).casefold(), list(names), n=3, cutoff=0.5)
        return list(dict.fromkeys(self.titles[names[name]] for name in close))


def read_histories(path: Path, lookup: ItemLookup, text_format: TextFormat = DEFAULT_FORMAT) -> list[History]:
    """Read a file of histories.

    ``.jsonl``, ``.json``
        One JSON value on each line, or a JSON array of values. A value is a list of items, oldest first, or an object with the fields ``history``
        (the list) and optionally ``user_id``. An item is a number (an id), a string (an id or a title), ``{"id": ...}`` or ``{"title": ...}``.
    ``.csv``, ``.tsv``
        One history on each line. The first line contains the names of the columns: ``user_id`` (optional), then ``item_id``, ``title`` or ``history``
        (ids or titles), to which all further cells belong. Without this line, all cells are titles, and there are no users. The delimiter is detected
        in the first line, see :mod:`malleable.datamodules.files.sniffing`.

    The encoding is UTF-8, that of the byte-order mark, that of the source, or cp1252 (Windows).

    Unknown items, empty rows and rows without a known item are omitted, and their numbers are logged. A user may have several rows.

    Args:
        path: The file.
        lookup: Lookup of the items.
        text_format: Format of the source's files.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another format, if a line is not a history, if a string means two items, or if no item is known; with file and
            line.
    """
    kind = file_kind(path)
    if kind not in _READERS:
        raise ValueError(
            f"{path} is not a file of histories: give .csv or .tsv (one history on each line), .jsonl or .json (one list of items in each row)"
        )
    rows = list(_READERS[kind](path, lookup, text_format))
    if not rows:
        raise ValueError(f"{path} contains no history; give at least one")
    if all(not row.names for row in rows):
        raise ValueError(f"{rows[0].place}: this history and all others are empty; give at least one item")
    if empty := [row.place for row in rows if not row.names]:
        log.warning("%s: %d of %d histories are empty and get no prediction (first: %s)", path, len(empty), len(rows), empty[0])
    found = [[lookup.find(name, row.place, row.kind) for name in row.names] for row in rows]
    histories = [
        History(number, items, row.user_id) for number, row in enumerate(rows) if (items := [item for item in found[number] if item is not None])
    ]
    _report_unknown(path, rows, found, lookup)
    return histories


def read_users(path: Path, known: Container[str], text_format: TextFormat = DEFAULT_FORMAT, filtered: Container[str] = ()) -> list[tuple[int, str]]:
    """Read a file of users.

    Args:
        path: ``.csv`` or ``.tsv`` with a column ``user_id``, or without a header and with ids in the first column; ``.txt`` with one id on each line;
            ``.jsonl`` or ``.json`` with ids, or with objects that have the field ``user_id``.
        known: Users of the data who remain after the filters of the split.
        text_format: Format of the source's files.
        filtered: Users of the data, including those that the filters remove.

    Returns:
        Number of the row, from 0, and user. Unknown and removed users are omitted, and their numbers are logged, as is the number of users with
        several rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another format, if an id is missing, or if no user is known; with file and line.
    """
    kind = file_kind(path)
    if kind not in (".csv", ".tsv", ".txt", ".jsonl", ".json"):
        raise ValueError(f"{path} is not a file of users: give `all`, or a .csv, .tsv, .txt, .jsonl or .json file with one id in each row")
    rows = list(_users_of_json(path, text_format) if kind.startswith(".json") else _users_of_lines(path, kind, text_format))
    if not rows:
        raise ValueError(f"{path} contains no user; give at least one id")
    _report_repeated(path, rows)
    omitted = [(place, user) for place, user in rows if user not in known]
    causes = {
        "are not in the data": [row for row in omitted if row[1] not in filtered],
        "were removed by the filters of the split": [row for row in omitted if row[1] in filtered],
    }
    texts = [f"{len(own)} of {len(rows)} users {cause} ({_user_examples(own)})" for cause, own in causes.items() if own]
    if rows and len(omitted) == len(rows):
        raise ValueError(f"{path}: {'; '.join(texts)}. No user remains; compare the ids with those of the interactions")
    for text in texts:
        log.warning("%s: %s; they get no prediction", path, text)
    return [(number, user) for number, (_, user) in enumerate(rows) if user in known]


def _user_examples(rows: Sequence[tuple[str, str]]) -> str:
    examples = ", ".join(f"{brief_repr(user)} in {place.rpartition(', ')[2]}" for place, user in rows[:_SHOWN])
    return examples + (", ..." if len(rows) > _SHOWN else "")


def _report_repeated(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    counts = Counter(user for _, user in rows)
    if repeated := [user for user, count in counts.items() if count > 1]:
        places = [place.rpartition(", ")[2] for place, user in rows if user == repeated[0]]
        both = " and ".join(places[:2])
        log.warning("%s: %d users have several rows (first: %r, %s); each row gets a separate prediction", path, len(repeated), repeated[0], both)


def _users_of_json(path: Path, text_format: TextFormat) -> Iterator[tuple[str, str]]:
    for _, place, row in text_format.json_rows(path):
        value = next((row[name] for name in USER_FIELDS if name in row), None) if isinstance(row, dict) else row
        yield place, id_text(value, f"{place}, field user_id")


def _users_of_lines(path: Path, kind: str, text_format: TextFormat) -> Iterator[tuple[str, str]]:
    if kind == ".txt":
        rows = ((number, [cell_text(line)]) for number, line in read_lines(path, sniff_encoding(path, text_format.encoding)))
    else:
        rows = ((number, cells) for number, cells in text_format.cells(path, USER_FIELDS))
    lines = [(f"{path}, line {number}", cells) for number, cells in rows]
    header = [cell.casefold() for cell in lines[0][1]] if lines else []
    column = next((header.index(name) for name in USER_FIELDS if name in header), None)
    for place, cells in lines if column is None else lines[1:]:
        if not (user := cells[column or 0] if len(cells) > (column or 0) else ""):
            raise ValueError(f"{place}, field user_id: the id is empty; give every row an id")
        yield place, user


def _report_unknown(path: Path, rows: Sequence[_Row], found: Sequence[Sequence[int | None]], lookup: ItemLookup) -> None:
    """Log the numbers of unknown items and of histories without a known item.

    Raises:
        ValueError: If no item is known.
    """
    unknown = [(name, row) for row, items in zip(rows, found, strict=True) for name, item in zip(row.names, items, strict=True) if item is None]
    if not unknown:
        return
    first: dict[str, tuple[Any, _Row]] = {}
    for name, row in unknown:
        first.setdefault(str(name), (name, row))
    message = f"{path}: omitted {len(unknown)} items ({len(first)} distinct) that are not in the catalogue: {_examples(first, lookup)}"
    empty = [row.place for row, items in zip(rows, found, strict=True) if items and all(item is None for item in items)]
    if len(empty) == sum(bool(items) for items in found):
        raise ValueError(f"{message}. No history has a known item; use the ids of the source or titles")
    log.warning("%s", message)
    if empty:
        log.warning("%s: %d of %d histories have no known item and get no prediction (first: %s)", path, len(empty), len(rows), empty[0])


def _examples(first: Mapping[str, tuple[Any, _Row]], lookup: ItemLookup) -> str:
    examples = [f"{row.place.rpartition(', ')[2]}: {_problem(name, row, lookup)}" for name, row in list(first.values())[:_SHOWN]]
    return "; ".join(examples) + ("; ..." if len(first) > _SHOWN else "")


def _problem(name: Any, row: _Row, lookup: ItemLookup) -> str:
    """Return the reason why a name is not an item, with a suggestion."""
    text = str(name)
    if isinstance(name, str) and row.kind in _OTHER_KINDS:
        column, (other, description) = _COLUMN_OF[row.kind], _OTHER_KINDS[row.kind]
        if lookup.find(name, row.place, other) is not None:
            return f"{text!r} is {description}; rename the column {column} to {_COLUMN_OF[other]}, or to history if it contains both"
    for mark in DELIMITERS:
        if mark in text and any(lookup.find(part.strip(), row.place, kind) is not None for part in text.split(mark) for kind in KINDS):
            return f"{text!r} contains several items; add a first line with names of columns and {mark!r} between them, e.g. user_id{mark}item_id"
    near = ", ".join(map(repr, lookup.nearest(text)))
    return f"{text!r} is neither a title nor an item id" + (f" (nearest titles: {near})" if near else "")


def _read_json(path: Path, lookup: ItemLookup, text_format: TextFormat) -> Iterator[_Row]:
    del lookup
    for _, place, row in text_format.json_rows(path):
        fields = row if isinstance(row, dict) else {"history": row}
        names = fields.get("history")
        if not isinstance(names, list):
            raise ValueError(f"{place}: expected a list of ids or titles, or an object with the list 'history', got {brief_repr(row)}")
        user = next((fields[name] for name in USER_FIELDS if fields.get(name) is not None), None)
        yield _Row(place, names, None, None if user is None else id_text(user, f"{place}, field user_id"))


def _read_csv(path: Path, lookup: ItemLookup, text_format: TextFormat) -> Iterator[_Row]:
    lines = [(f"{path}, line {number}", cells) for number, cells in text_format.cells(path, {*USER_FIELDS, *_COLUMNS}) if any(map(str.strip, cells))]
    if not lines:
        return
    place, cells = lines[0]
    has_header = any(cell.casefold() in {*USER_FIELDS, *_COLUMNS} and lookup.find(cell, place, "title") is None for cell in cells)
    yield from _rows_with_header(path, lines) if has_header else _rows_of_titles(lines, lookup)


def _rows_with_header(path: Path, lines: list[tuple[str, list[str]]]) -> Iterator[_Row]:
    (place, header), *lines = lines
    names = [cell.casefold() for cell in header]
    start = int(names[0] in USER_FIELDS)
    items = set(names[start:])
    if len(items) != 1 or not items <= set(_COLUMNS):
        raise ValueError(f"{place}: the header is {','.join(header)!r}; expected user_id (optional), then one of {', '.join(_COLUMNS)}")
    (column,) = items
    rows = [_Row(where, [cell for cell in cells[start:] if cell], _COLUMNS[column], cells[0] if start else None) for where, cells in lines]
    if start:
        _check_users(path, rows)
    yield from rows


def _check_users(path: Path, rows: Sequence[_Row]) -> None:
    if missing := next((row for row in rows if not row.user_id), None):
        raise ValueError(f"{missing.place}, field user_id: the id is empty; give every row an id, or remove the column")
    repeated = Counter(row.user_id for row in rows).most_common(1)
    if repeated and repeated[0][1] > 1 and all(len(row.names) == 1 for row in rows):
        raise ValueError(
            f"{path}: every line has one item, and user {repeated[0][0]!r} has {repeated[0][1]} lines. Each line is one history: write the items of "
            "a history on one line, oldest first, separated by commas"
        )


def _rows_of_titles(lines: list[tuple[str, list[str]]], lookup: ItemLookup) -> Iterator[_Row]:
    """Yield the rows of a file without a header. A cell with an id is an error, because it may also be the id of a user."""
    rows = [_Row(place, [cell for cell in cells if cell]) for place, cells in lines]
    for row in rows:
        found = (name for name in row.names if lookup.find(name, row.place) is not None and lookup.find(name, row.place, "title") is None)
        if (name := next(found, None)) is not None:
            raise ValueError(
                f"{row.place}: {name!r} is not a title, but the id of an item. Without a header, all cells are titles; for ids, add the first line "
                "item_id, or user_id,item_id if the first cell is the user"
            )
    leading = [lookup.find(row.names[0], row.place) for row in rows]
    following = [lookup.find(name, row.place) for row in rows for name in row.names[1:]]
    if all(item is None for item in leading) and any(item is not None for item in following):
        raise ValueError(f"{rows[0].place}: no line starts with a title; if the first cells are users, add the first line user_id,title")
    yield from rows


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json, ".json": _read_json}


def _unique(names: Iterator[str]) -> dict[str, int]:
    """Return the positions of the names that occur only once."""
    listed = list(names)
    counts = Counter(listed)
    return {name: position for position, name in enumerate(listed) if counts[name] == 1}


def _without_year(title: str) -> str:
    return title[:-7] if len(title) > 7 and title[-6] == "(" and title[-1] == ")" and title[-5:-1].isdigit() else title
