"""Conversion of the columns of users' tables to ids, times, ratings, titles and genres. Errors contain file, line and field."""

from __future__ import annotations

import numbers
import sys
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import pandas as pd

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import id_text


class Place(Protocol):
    """File or dataset of a table; its string names it in messages."""

    @property
    def name(self) -> str:
        """Short name."""


def place_of(table: pd.DataFrame | pd.Series, position: int) -> str:
    """Return the number of a line or row with its name, e.g. ``line 2``."""
    return f"{table.index.name} {table.index[position]}"


def _place(path: Place, column: pd.Series, position: int, field: str) -> str:
    return f"{path}, {place_of(column, position)}, field {field}"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value) or value is pd.NaT or value is pd.NA


def to_titles(path: Place, column: pd.Series) -> pd.Series:
    """Convert a column to titles; missing ones are empty.

    Raises:
        ValueError: If a value is neither a string nor a number.
    """
    titles = []
    for position, value in enumerate(column):
        if isinstance(value, bool) or not (_missing(value) or isinstance(value, (str, numbers.Real))):
            raise ValueError(f"{_place(path, column, position, 'title')}: a title must be a string, got {brief_repr(value)}")
        titles.append("" if _missing(value) else str(value))
    return pd.Series(titles, index=column.index, dtype=object)


def to_identifiers(path: Place, table: pd.DataFrame, field: str) -> pd.Series:
    """Convert a column to ids, see :func:`~malleable.datamodules.files.text_files.id_text`.

    Raises:
        ValueError: If an id is missing, or if a number is not an exact integer.
    """
    column = table[field]
    if pd.api.types.is_integer_dtype(column) and not column.isna().any():
        return column.astype(str).astype(object)
    bits = np.finfo(getattr(column.dtype, "numpy_dtype", column.dtype)).nmant if pd.api.types.is_float_dtype(column) else 52
    values = column.astype(object).where(np.array([not _missing(value) for value in column], dtype=bool), None)
    # Equal ids share one text in memory.
    ids = [
        sys.intern(value) if type(value) is str and value.strip() else id_text(value, _place(path, column, position, field), bits)
        for position, value in enumerate(values)
    ]
    return pd.Series(ids, index=column.index, dtype=object)


def _as_numbers(column: pd.Series) -> pd.Series:
    """Convert a column to numbers; other values, including booleans and lists of JSON, are converted to NaN."""
    if column.dtype == object:
        column = column.map(_number_or_text)
    return pd.to_numeric(column, errors="coerce").astype(float)


def _number_or_text(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _check_finite(path: Place, column: pd.Series, values: pd.Series, field: str, advice: str) -> None:
    if (wrong := ~np.isfinite(values.to_numpy(float))).any():
        first = int(wrong.argmax())
        raise ValueError(f"{_place(path, column, first, field)}: cannot read {brief_repr(column.iloc[first])}; {advice}")


def to_ratings(path: Place, column: pd.Series) -> pd.Series:
    """Convert a column to ratings: finite numbers, or ``nan`` for empty cells, empty strings and null.

    Raises:
        ValueError: If another value is not a finite number.
    """
    numeric = pd.api.types.is_numeric_dtype(column)
    empty = column.isna() if numeric else column.map(lambda value: _missing(value) or (isinstance(value, str) and not value.strip())).astype(bool)
    values = _as_numbers(column)
    _check_finite(path, column, values.mask(empty, 0.0), "rating", "give a finite number, or leave the rating empty")
    return values.mask(empty)


def to_seconds(path: Place, column: pd.Series) -> pd.Series:
    """Convert a column of unix times, ISO 8601 dates or Arrow timestamps to seconds.

    Raises:
        ValueError: If a value is none of these.
    """
    values = pd.Series(float("nan"), index=column.index) if pd.api.types.is_datetime64_any_dtype(column) else _as_numbers(column)
    if (rest := values.isna()).any():
        dates = column[rest] if column.dtype != object else column[rest].map(lambda value: None if isinstance(value, (bool, list, dict)) else value)
        with suppress(ValueError, OverflowError, TypeError):  # dates out of range
            times = pd.to_datetime(dates, utc=True, format="ISO8601", errors="coerce")
            values[rest] = (times - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    _check_finite(path, column, values, "timestamp", "give unix seconds or ISO 8601 (2024-05-01T12:00:00)")
    return values


def to_genres(path: Place, column: pd.Series, delimiter: str) -> list[tuple[str, ...]]:
    """Convert a column to tuples of genres; strings are split at the delimiter.

    Raises:
        ValueError: If a value is neither a list of strings nor a string.
    """
    genres = []
    for position, value in enumerate(column):
        if isinstance(value, str):
            own = tuple(part.strip() for part in value.split(delimiter) if part.strip())
        elif isinstance(value, (list, tuple, np.ndarray)) and all(isinstance(part, (str, numbers.Real)) for part in value):
            own = tuple(str(part) for part in value)
        elif _missing(value):
            own = ()
        else:
            raise ValueError(f"{_place(path, column, position, 'genres')}: genres must be a list of strings, or a string, got {brief_repr(value)}")
        genres.append(own)
    return genres
