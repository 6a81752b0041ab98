"""The user's own tables of interactions and items: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import parquet

from malleable.datamodules.sources.base import InteractionTables, Source, items_table
from malleable.datamodules.text_files import cell_text, id_text, read_json_rows

log = logging.getLogger(__name__)

INTERACTION_FIELDS = ("user_id", "item_id", "timestamp", "rating")
ITEM_FIELDS = ("item_id", "title", "genres")
OPTIONAL = {"rating", "genres"}


class Tables(Source):
    """Two files: interactions (``user_id, item_id, timestamp[, rating]``) and items (``item_id, title[, genres]``).

    Kinds by file name: ``.csv``, ``.tsv``, ``.jsonl`` (each also ``.gz``) and ``.parquet``. Further columns are left alone. Times are
    seconds or ISO 8601; genres are lists, or text with ``|`` between them. Terms and licence are the user's own.

    Ids are text and stay as they are: ``007``, ``pkg-1.0`` and ``pkg-1`` are three ids. Blanks around a cell of CSV or TSV are no part of an id.
    Numbers of JSON lines and Parquet become their decimal digits; see :func:`~malleable.datamodules.text_files.id_text`.

    Args:
        interactions: File of interactions.
        items: File of items.
        interaction_columns: The file's column for each of our fields that is called otherwise, e.g. ``{user_id: uid}``.
        item_columns: The same for items.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a column is missing, or a value cannot be read; with file, line and field.
    """

    def __init__(
        self,
        interactions: str,
        items: str,
        interaction_columns: dict[str, str] | None = None,
        item_columns: dict[str, str] | None = None,
    ) -> None:
        self.interactions = Path(interactions).expanduser()
        self.items = Path(items).expanduser()
        self.interaction_columns = interaction_columns or {}
        self.item_columns = item_columns or {}
        _check_fields("interaction_columns", self.interaction_columns, INTERACTION_FIELDS)
        _check_fields("item_columns", self.item_columns, ITEM_FIELDS)

    def files(self) -> list[Path]:
        """Return the two files."""
        for path in (self.interactions, self.items):
            if not path.is_file():
                raise FileNotFoundError(f"no file at {path}; give the path of a .csv, .tsv, .jsonl or .parquet file")
        return [self.interactions, self.items]

    def settings(self) -> dict[str, object]:
        """Return the column maps."""
        return {"interactions": self.interaction_columns, "items": self.item_columns}

    def load(self) -> InteractionTables:
        """Read both tables."""
        self.files()
        events = _select(self.interactions, INTERACTION_FIELDS, self.interaction_columns, "interaction_columns")
        events["user_id"] = _identifiers(self.interactions, events, "user_id")
        events["item_id"] = _identifiers(self.interactions, events, "item_id")
        events["timestamp"] = _seconds(self.interactions, events["timestamp"])
        if "rating" in events:
            events["rating"] = _numbers(self.interactions, events["rating"])
        items = self._load_items()
        self._check_numbers(set(events["item_id"]), set(items["item_id"]))
        return InteractionTables(events.reset_index(drop=True), items)

    def _check_numbers(self, events: set[str], items: set[str]) -> None:
        """Refuse ids that one table writes as 1.0 and the other as 1: a program has stored a column of integers with a gap as decimal fractions."""
        for path, ids, others in ((self.interactions, events, items), (self.items, items, events)):
            if ids and all(key.endswith(".0") for key in ids) and (found := next((key for key in sorted(ids - others) if key[:-2] in others), None)):
                raise ValueError(
                    f"{path} has the item_id {found!r} where the other table has {found[:-2]!r}: write both alike; all ids of {path.name} end in .0, "
                    "as where a column of integers was stored as floating-point numbers (in pandas, .astype('Int64') before writing prevents it)"
                )

    def _load_items(self) -> pd.DataFrame:
        items = _select(self.items, ITEM_FIELDS, self.item_columns, "item_columns")
        items["item_id"] = _identifiers(self.items, items, "item_id")
        titles = _text(items["title"])
        if (untitled := titles.str.strip() == "").any():
            first = int(untitled.to_numpy().argmax())
            log.warning(
                "%s: %d items have no title (first: %s, item_id %s); they and their interactions are dropped",
                self.items, untitled.sum(), _where(self.items, items, first), items["item_id"].iloc[first],
            )  # fmt: skip
        items["title"] = titles
        if repeated := int(items.duplicated("item_id").sum()):
            log.warning("%s: %d lines repeat an item_id; the first of each stays", self.items, repeated)
            items = items.drop_duplicates("item_id")
        genres = [_genres(value) for value in items["genres"]] if "genres" in items else [()] * len(items)
        return items_table(list(items["item_id"]), list(items["title"]), genres)


def _check_fields(name: str, columns: Mapping[str, str], fields: tuple[str, ...]) -> None:
    if unknown := sorted(set(columns) - set(fields)):
        raise ValueError(f"{name} names the unknown field {unknown[0]!r}; the fields are {list(fields)}")


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read(path: Path) -> pd.DataFrame:
    """Read a table whose index is the number of each line or row."""
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        # As text: an id keeps its leading zeros, and a film called "NA" its name.
        table = pd.read_csv(path, sep="," if kind == ".csv" else "\t", dtype=str, keep_default_na=False)
        return table.set_axis(range(2, len(table) + 2))  # the first line is the header
    if kind == ".jsonl":
        return _read_jsonl(path)
    if kind == ".parquet":
        # Integers beside a gap stay integers: as floating-point numbers, large ids would be rounded.
        table = parquet.read_table(path).to_pandas(integer_object_nulls=True)
        return table.set_axis(range(1, len(table) + 1))
    raise ValueError(f"{path}: unknown kind of file; give .csv, .tsv, .jsonl (each may end in .gz) or .parquet")


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = list(read_json_rows(path))
    if wrong := next((row for row in rows if not isinstance(row.value, dict)), None):
        raise ValueError(f"{wrong.place}: expected an object with a field for each column, got {wrong.value!r:.80}")
    return pd.DataFrame([row.value for row in rows], index=[row.number for row in rows], dtype=object)


def _select(path: Path, fields: tuple[str, ...], columns: Mapping[str, str], argument: str) -> pd.DataFrame:
    table = _read(path)
    selected = {}
    for field in fields:
        name = columns.get(field, field)
        if name in table:
            selected[field] = table[name]
        elif field not in OPTIONAL or field in columns:
            raise ValueError(
                f"{path}: no column {name!r} for {field}, only {list(table.columns)}; name the right one with {argument}: {{{field}: ...}}"
            )
    return pd.DataFrame(selected)


def _where(path: Path, table: pd.DataFrame | pd.Series, position: int) -> str:
    """Return the line of a text file, or the row of another one."""
    return f"{'row' if _kind(path) == '.parquet' else 'line'} {table.index[position]}"


def _text(column: pd.Series) -> pd.Series:
    return column.map(lambda value: "" if _missing(value) else str(value)).astype(object)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value) or value is pd.NaT


def _identifiers(path: Path, table: pd.DataFrame, field: str) -> pd.Series:
    column = table[field]
    if pd.api.types.is_integer_dtype(column) and not column.isna().any():
        return column.astype(str).astype(object)
    if _kind(path) in (".csv", ".tsv"):
        column = column.map(cell_text)
    bits = np.finfo(getattr(column.dtype, "numpy_dtype", column.dtype)).nmant if pd.api.types.is_float_dtype(column) else 52
    ids = [
        value if type(value) is str and value.strip() else id_text(value, f"{path}, {_where(path, column, position)}, field {field}", bits)
        for position, value in enumerate(column.astype(object).where(column.notna(), None))
    ]
    return pd.Series(ids, index=column.index, dtype=object)


def _numbers(path: Path, column: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    if (wrong := numbers.isna().to_numpy()).any():
        first = int(wrong.argmax())
        where = f"{path}, {_where(path, column, first)}"
        raise ValueError(f"{where}, field rating: cannot read {column.iloc[first]!r}; give a number, or leave the column out")
    return numbers.astype(float)


def _seconds(path: Path, column: pd.Series) -> pd.Series:
    if pd.api.types.is_datetime64_any_dtype(column):
        numbers = pd.Series(float("nan"), index=column.index)
    else:
        numbers = pd.to_numeric(column, errors="coerce").astype(float)
    if (rest := numbers.isna()).any():
        times = pd.to_datetime(column[rest], utc=True, format="ISO8601", errors="coerce")
        numbers[rest] = (times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    if (wrong := numbers.isna().to_numpy()).any():
        first = int(wrong.argmax())
        where = f"{path}, {_where(path, column, first)}"
        raise ValueError(f"{where}, field timestamp: cannot read {column.iloc[first]!r}; give unix seconds or ISO 8601 (2024-05-01T12:00:00)")
    return numbers


def _genres(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split("|") if part.strip())
    return () if _missing(value) else tuple(str(part) for part in value)
