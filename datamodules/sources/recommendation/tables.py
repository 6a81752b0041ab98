"""Your own tables of interactions and items, in CSV, TSV, JSON lines or Parquet files."""

from __future__ import annotations

import codecs
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from malleable.datamodules.files.encoding import check_encoding
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.sniffing import describe_delimiter, encoding_name, find_mojibake, sniff_delimiter, sniff_encoding
from malleable.datamodules.files.table_files import check_delimiter, column_names, read_parquet, read_table
from malleable.datamodules.files.text_files import file_kind, read_json_rows
from malleable.datamodules.files.user_files import check_file, first_line
from malleable.datamodules.sources.recommendation.base import InteractionTables, Source, items_table
from malleable.datamodules.sources.recommendation.columns import Place, place_of, to_genres, to_identifiers, to_ratings, to_seconds, to_titles

log = logging.getLogger(__name__)

INTERACTION_FIELDS = ("user_id", "item_id", "timestamp", "rating", "split", "behavior")
ITEM_FIELDS = ("item_id", "title", "genres")
OPTIONAL = {"rating", "split", "behavior", "genres"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class TableSource(Source):
    """Base class of sources with two tables: interactions and items. A subclass reads a table in :meth:`read`.

    Args:
        interaction_columns: Names of the columns by field, for columns that are not named like their field, e.g. ``{user_id: uid}``.
        item_columns: As ``interaction_columns``, for items.
        genre_delimiter: Delimiter between the genres in a string.

    Raises:
        ValueError: If a field is unknown, or the delimiter is empty.
    """

    interactions: Any
    items: Any

    def __init__(self, interaction_columns: dict[str, str] | None, item_columns: dict[str, str] | None, genre_delimiter: str) -> None:
        if not genre_delimiter:
            raise ValueError("genre_delimiter must not be empty; if each string is one genre, give a character that does not occur in genres")
        self.interaction_columns = interaction_columns or {}
        self.item_columns = item_columns or {}
        self.genre_delimiter = genre_delimiter
        _check_fields("interaction_columns", self.interaction_columns, INTERACTION_FIELDS)
        _check_fields("item_columns", self.item_columns, ITEM_FIELDS)

    @abstractmethod
    def read(self, place: Any, wanted: Iterable[str]) -> pd.DataFrame:
        """Read a table.

        Args:
            place: :attr:`interactions` or :attr:`items`.
            wanted: Columns that are needed; others may be omitted.

        Returns:
            Table whose index contains the number of each line or row, named ``line`` or ``row``. ``attrs["names"]`` contains the names of all
            columns, if some were omitted. ``attrs["notes"]`` may contain notes about the format of the file, for the summary of the data.
        """

    def settings(self) -> dict[str, object]:
        """Return the settings of reading."""
        genres = {"genre_delimiter": self.genre_delimiter} if self.genre_delimiter != "|" else {}
        return {"interactions": self.interaction_columns, "items": self.item_columns, **genres}

    def load(self) -> InteractionTables:
        """Read both tables."""
        self.files()
        events = self._select(self.interactions, INTERACTION_FIELDS, self.interaction_columns, "interaction_columns")
        events["user_id"] = to_identifiers(self.interactions, events, "user_id")
        events["item_id"] = to_identifiers(self.interactions, events, "item_id")
        events["timestamp"] = to_seconds(self.interactions, events["timestamp"])
        if "rating" in events:
            events["rating"] = to_ratings(self.interactions, events["rating"])
        items, notes = self._load_items()
        self._check_numbers(set(events["item_id"]), set(items["item_id"]))
        notes = (*events.attrs["notes"], *notes)
        return InteractionTables(events.reset_index(drop=True), items, notes, f"{self.interactions} and {self.items}")

    def _check_numbers(self, events: set[str], items: set[str]) -> None:
        """Raise an error if ids are 1.0 in one table and 1 in the other one, because a program has stored integers as floating-point numbers."""
        for path, ids, others in ((self.interactions, events, items), (self.items, items, events)):
            if ids and all(key.endswith(".0") for key in ids) and (found := next((key for key in sorted(ids - others) if key[:-2] in others), None)):
                raise ValueError(
                    f"{path} has the item_id {found!r}, but the other table has {found[:-2]!r}; use one form in both. All ids of {path.name} end in "
                    ".0, probably because integers were stored as floating-point numbers (in pandas, use .astype('Int64') before writing)"
                )

    def _load_items(self) -> tuple[pd.DataFrame, tuple[str, ...]]:
        """Return the items, and notes about the format of the file and about omitted rows."""
        items = self._select(self.items, ITEM_FIELDS, self.item_columns, "item_columns")
        notes = list(items.attrs["notes"])
        items["item_id"] = to_identifiers(self.items, items, "item_id")
        titles = to_titles(self.items, items["title"])
        if (untitled := titles.str.strip() == "").any():
            first = int(untitled.to_numpy().argmax())
            log.warning(
                "%s: %d items have no title (first: %s, item_id %s); they and their interactions are dropped",
                self.items, untitled.sum(), place_of(items, first), items["item_id"].iloc[first],
            )  # fmt: skip
        items["title"] = titles
        if repeated := int(items.duplicated("item_id").sum()):
            example = items["item_id"][items.duplicated("item_id")].iloc[0]
            notes.append(f"{repeated:,} rows of {self.items.name} repeat an item_id (e.g. {example}), the first row of each is used")
            log.warning("%s: %d lines repeat an item_id; the first line of each is used", self.items, repeated)
            if conflict := _conflict(self.items, items):
                notes.append(conflict)
                log.warning("%s", conflict)
            items = items.drop_duplicates("item_id")
        genres = to_genres(self.items, items["genres"], self.genre_delimiter) if "genres" in items else [()] * len(items)
        return items_table(list(items["item_id"]), list(items["title"]), genres), tuple(notes)

    def _select(self, path: Place, fields: tuple[str, ...], columns: Mapping[str, str], argument: str) -> pd.DataFrame:
        """Read a table, and return the columns of the fields, named by field."""
        table = self.read(path, [columns.get(field, field) for field in fields])
        selected = {}
        for field in fields:
            name = columns.get(field, field)
            if name in table:
                selected[field] = table[name]
            elif field not in OPTIONAL or field in columns:
                names = table.attrs.get("names", list(table.columns))
                raise ValueError(f"{path}: no column {name!r} for {field}, only {names}; set its name with {argument}: {{{field}: ...}}")
        frame = pd.DataFrame(selected)
        frame.attrs["notes"] = tuple(table.attrs.get("notes", ()))
        return frame


class Tables(TableSource):
    """Two files: interactions (``user_id, item_id, timestamp[, rating][, split][, behavior]``) and items (``item_id, title[, genres]``).

    Formats are ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` (each also ``.gz``) and ``.parquet``. Other columns are ignored. Times are seconds or ISO
    8601. Genres are lists, or strings with a delimiter. A rating may also be a label, 0 or 1. ``split`` is ``train``, ``val`` or ``test``; it is used
    if ``kind`` of :class:`~malleable.datamodules.recommendation.splits.Split` is ``given``. ``behavior`` is the type of the interaction, e.g. view or
    purchase, which sequence models read. The user is responsible for terms and licence.

    The first line of CSV and TSV contains the names of the columns, and all rows have the same number of cells. In CSV, cells that contain a
    delimiter, a quote or a line break are quoted, and quotes in them are doubled. Delimiter and encoding are detected, see
    :mod:`malleable.datamodules.files.sniffing`; the summary of the data states those that differ from the defaults of the format.

    Ids are strings and are not changed: ``007``, ``pkg-1.0`` and ``pkg-1`` are three ids. Blanks around a cell of CSV or TSV are removed. Numbers in
    JSON lines and Parquet are converted to decimal digits; see :func:`~malleable.datamodules.files.text_files.id_text`.

    Args:
        interactions: File of interactions.
        items: File of items.
        interaction_columns: Names of the columns by field, for columns that are not named like their field, e.g. ``{user_id: uid}``.
        item_columns: As ``interaction_columns``, for items.
        delimiter: Delimiter between cells of text files. Default: detected in the first line of each file: comma, semicolon, tab or vertical bar.
        encoding: Encoding of text files without a byte-order mark, e.g. ``cp1252`` or ``latin-1``. Default: UTF-8, or cp1252 if a file is not UTF-8.
        genre_delimiter: Delimiter between the genres in a string, e.g. ``", "`` or ``;``.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a column is missing, if a value cannot be read, or if delimiter or encoding are ambiguous; with file, line and field.
    """

    def __init__(
        self,
        interactions: str,
        items: str,
        interaction_columns: dict[str, str] | None = None,
        item_columns: dict[str, str] | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        genre_delimiter: str = "|",
    ) -> None:
        super().__init__(interaction_columns, item_columns, genre_delimiter)
        check_delimiter(delimiter)
        check_encoding(encoding)
        self.interactions = Path(interactions).expanduser()
        self.items = Path(items).expanduser()
        self.delimiter = delimiter
        self.encoding = encoding

    def files(self) -> list[Path]:
        """Return the two files."""
        for path in (self.interactions, self.items):
            check_file(path, "give the path of a .csv, .tsv, .jsonl or .parquet file")
        return [self.interactions, self.items]

    def settings(self) -> dict[str, object]:
        """Return the settings of reading."""
        options = {"delimiter": self.delimiter, "encoding": self.encoding}
        return super().settings() | {name: value for name, value in options.items() if value}

    def text_format(self) -> tuple[str | None, str | None]:
        """Return delimiter and encoding of the interactions, given or detected, as the format of the user's other files; ``None`` for defaults."""
        path, columns = self.interactions, self.interaction_columns
        if file_kind(path) not in _DELIMITERS or not path.is_file():
            return self.delimiter, self.encoding
        encoding = self.encoding or sniff_encoding(path)
        delimiter = self._delimiter(path, [columns.get(field, field) for field in INTERACTION_FIELDS], encoding)
        return None if self.delimiter is None and delimiter == _DELIMITERS[file_kind(path)] else delimiter, encoding

    def read(self, place: Path, wanted: Iterable[str]) -> pd.DataFrame:
        """Read a file."""
        kind = file_kind(place)
        if kind == ".parquet":
            return _read_parquet(place, wanted)
        if kind not in (*_DELIMITERS, ".jsonl", ".json"):
            raise ValueError(f"{place}: unknown format; give .csv, .tsv, .jsonl, .json (each may end in .gz) or .parquet")
        encoding = self.encoding or sniff_encoding(place)
        delimiter = self._delimiter(place, wanted, encoding) if kind in _DELIMITERS else None
        if delimiter is None:
            frame = _read_json(place, encoding)
        else:
            # Cells are read as strings, because an id may have leading zeros, and a title may be "NA".
            names, lines, columns = read_table(place, delimiter, encoding)
            frame = pd.DataFrame(dict(zip(names, columns, strict=True)), index=pd.Index(lines, name="line"), dtype=object)
        frame.attrs["notes"] = self._format_notes(place, delimiter, encoding)
        return frame

    def _delimiter(self, path: Path, wanted: Iterable[str], encoding: str | None) -> str:
        default, names = _DELIMITERS[file_kind(path)], {name.casefold() for name in wanted}
        return self.delimiter or sniff_delimiter(path, names, None, encoding, default=default, has_header=True)

    def _format_notes(self, path: Path, delimiter: str | None, encoding: str | None) -> tuple[str, ...]:
        """Return notes about a detected format that is not the default one, and about a given encoding that seems to be wrong."""
        detected = []
        if delimiter is not None and self.delimiter is None and delimiter != _DELIMITERS[file_kind(path)]:
            detected.append(f"delimiter {describe_delimiter(delimiter)}")
        if (used := encoding_name(path, encoding)) != codecs.lookup(self.encoding or "utf-8").name.upper().removesuffix("-SIG"):
            detected.append(f"encoding {used}")
        notes = [f"{path.name} has {', '.join(detected)} (detected)"] if detected else []
        if self.encoding is not None and (problem := find_mojibake(path, self.encoding)):
            log.warning("%s", problem)
            notes.append(problem)
        return tuple(notes)


def _conflict(path: Place, items: pd.DataFrame) -> str:
    """Return a message with the number of ids that have several titles; empty if there are none."""
    titles = items["title"].str.strip()
    first = titles.groupby(items["item_id"]).transform("first")
    other = items[(titles != first).to_numpy()]
    if other.empty:
        return ""
    place = other.index[0]
    key = other["item_id"].loc[place]
    start = int((items["item_id"] == key).to_numpy().argmax())
    positions = (start, items.index.get_loc(place))
    one, two = (f"{brief_repr(items['title'].iloc[position], 60)} in {place_of(items, position)}" for position in positions)
    return f"{other['item_id'].nunique():,} item_ids of {path.name} have several titles (e.g. {key}: {one} and {two}), the first title is used"


def _check_fields(name: str, columns: Mapping[str, str], fields: tuple[str, ...]) -> None:
    if unknown := sorted(set(columns) - set(fields)):
        raise ValueError(f"{name} has the unknown field {unknown[0]!r}; the fields are {list(fields)}")


def _read_json(path: Path, encoding: str | None) -> pd.DataFrame:
    rows = list(read_json_rows(path, encoding))
    if wrong := next((row for row in rows if not isinstance(row.value, dict)), None):
        raise ValueError(f"{wrong.place}: expected an object with a field for each column, got {brief_repr(wrong.value)}")
    return pd.DataFrame([row.value for row in rows], index=pd.Index([row.number for row in rows], name="line"), dtype=object)


def _read_parquet(path: Path, wanted: Iterable[str]) -> pd.DataFrame:
    names = column_names(path)
    columns = [name for name in wanted if name in names]
    return arrow_frame(path, read_parquet(path, columns), names)


def arrow_frame(place: Place, table: Any, names: list[str]) -> pd.DataFrame:
    """Convert columns of Arrow to a table of :meth:`TableSource.read`.

    Args:
        place: File or dataset, for messages.
        table: ``pyarrow.Table`` of the columns that are needed.
        names: Names of all columns.

    Raises:
        ValueError: If pandas cannot represent a value.
    """
    try:
        # Columns with missing values must not be converted to floating-point numbers, because large integer ids would be rounded.
        frame = table.to_pandas(integer_object_nulls=True, ignore_metadata=True)
    except (ValueError, TypeError, NotImplementedError, OverflowError) as error:
        raise ValueError(
            f"{place}: a column of {table.column_names} cannot be read ({first_line(error)}); store ids as text, times as numbers"
        ) from error
    frame.attrs["names"] = names
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1, name="row"))
