"""Readers of tables given by users: rows of CSV and TSV with line numbers, and columns of Parquet."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from malleable.datamodules.files.text_files import cell_text, numbered_lines
from malleable.datamodules.files.user_files import check_file, first_line, reading

_QUOTE = '"'
_ROWS_A_BYTE = 1000
_FEW_ROWS = 10_000_000


def check_delimiter(delimiter: str | None) -> None:
    """Check the option ``delimiter`` of a source.

    Raises:
        ValueError: If it is not one character, or a character that cannot be a delimiter.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0 .'):
        raise ValueError(
            f"delimiter must be one character such as ',', ';', '|' or a tab ('\\t'), not a quote, a space, a dot or a line end, got {delimiter!r}"
        )


def read_cells(path: Path, delimiter: str, encoding: str | None = None, *, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a text table, without empty lines and without spaces and tabs around cells.

    Cells follow RFC 4180: quoted cells may contain delimiters, line feeds and doubled quotes. If the delimiter is a tab, each line is a row, and
    quotes around a cell are removed.

    Args:
        path: The file.
        delimiter: Delimiter between cells.
        encoding: Encoding of a file without a byte-order mark; default: UTF-8.
        quotes: Whether quotes delimit cells. If false, they are ordinary characters.

    Yields:
        Number of the first line of the row, from 1, and its cells.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not text, or a quote is misplaced.
    """
    if not quotes or delimiter == "\t":
        for number, line in numbered_lines(path, encoding):
            if line.strip():
                cells = map(cell_text, line.removesuffix("\n").removesuffix("\r").split(delimiter))
                yield number, [_unquoted(cell) for cell in cells] if quotes else list(cells)
        return
    yield from _Quoted(path, delimiter, encoding).rows()


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != _QUOTE or cell[-1] != _QUOTE or _QUOTE in inner.replace(_QUOTE * 2, ""):
        return cell
    return inner.replace(_QUOTE * 2, _QUOTE)


class _Quoted:
    """Reader of rows with quoted cells."""

    def __init__(self, path: Path, delimiter: str, encoding: str | None) -> None:
        self.path, self.delimiter = path, delimiter
        self.source = numbered_lines(path, encoding)
        self.number = 0
        self.pending: list[str] = []

    def lines(self) -> Iterator[str]:
        for number, line in self.source:
            self.number = number
            self.pending.append(line)
            yield line

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(self.lines(), delimiter=self.delimiter, skipinitialspace=True, strict=True)
        while True:
            self.pending.clear()
            first = self.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{self.path}, {self._place(first)}: {self._problem(error)}") from error
            if cells is None:
                return
            if len(self.pending) > 1:
                self._check_several(first, len(cells))
            cells = [cell_text(cell) for cell in cells]
            if len(cells) > 1 or any(cell.strip() for cell in cells):
                yield first, cells

    def _place(self, first: int) -> str:
        return f"line {first}" if self.number <= first else f"lines {first} to {self.number}"

    def _problem(self, error: csv.Error) -> str:
        text = str(error)
        if "unexpected end" in text:
            return "a quoted cell has no closing quote; remove the opening quote, or double it within a quoted cell"
        if "expected after" in text:
            problem = "a quoted cell has text after its closing quote; quote the whole cell, and double the quotes within it"
            other = next((found[1] for found in re.finditer(r'" *([,;\t|])', "".join(self.pending)) if found[1] != self.delimiter), None)
            return f"{problem}; or set the option `delimiter` to {other!r}, if cells are separated by it" if other else problem
        if "new-line character" in text:
            return "a cell contains a carriage return; end lines with a line feed, with or without a carriage return before it"
        return text

    def _check_several(self, first: int, width: int) -> None:
        """Raise an error if a cell of several lines probably results from a misplaced quote, i.e. contains a line that looks like a row."""
        key = self.pending[0].partition(self.delimiter)[0].strip()
        for line in self.pending[1:]:
            own = line.partition(self.delimiter)[0].strip()
            alike = own.isdigit() if key.isdigit() else bool(own) and len(own.split()) == 1
            if width > 1 and line.count(self.delimiter) == width - 1 and alike:
                raise ValueError(
                    f"{self.path}, {self._place(first)}: a quoted cell contains what looks like a row, {line.strip()[:80]!r}; remove the misplaced "
                    "quote, or write the cell without line feeds"
                )


def read_table(path: Path, delimiter: str, encoding: str | None = None) -> tuple[list[str], list[int], list[list[str]]]:
    """Read a text table whose first row names the columns.

    Returns:
        Names of the columns, line number of each row, and the cells of each column.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If there is no header, if two columns have the same name, if the delimiter seems to be another one, or if a row has another
            number of cells than the header.
    """
    rows = read_cells(path, delimiter, encoding)
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    if repeated := next((name for name in header if name and header.count(name) > 1), None):
        raise ValueError(f"{path}, line 1: two columns are named {repeated!r}; name them differently")
    if other := _other_delimiter(header, delimiter):
        raise ValueError(
            f"{path}, line 1: there is only one column, {header[0][:200]!r}; set the option `delimiter` of the source to {other!r} if it "
            "separates the columns, or rename the column"
        )
    numbers: list[int] = []
    columns: list[list[str]] = [[] for _ in header]
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells, but the first line names {len(header)} columns ({', '.join(header)[:200]}); "
                f"quote cells that contain {delimiter!r}, and name every column"
            )
        numbers.append(number)
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    return header, numbers, columns


def _other_delimiter(header: Sequence[str], delimiter: str) -> str | None:
    """Return another delimiter that occurs in the only column name of a header; ``None`` if the header has several names or no other delimiter."""
    if len(header) != 1:
        return None
    return next((other for other in (",", ";", "\t", "|") if other != delimiter and other in header[0]), None)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a Parquet file.

    Args:
        path: The file.
        columns: Columns to read; default: all.

    Returns:
        A ``pyarrow.Table``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a complete Parquet file, or if its header claims more rows than a file of its size can contain.
    """
    from pyarrow import parquet

    check_file(path)
    with reading(path, "a Parquet file"):
        try:
            with parquet.ParquetFile(path) as file:
                rows = file.metadata.num_rows
                if rows > max(_FEW_ROWS, _ROWS_A_BYTE * path.stat().st_size):
                    raise ValueError(f"{path} claims to have {rows} rows, more than a file of its size can contain; write it again")
                table = file.read(list(columns) if columns is not None else None)
                table.validate(full=True)
                return table
        except (KeyError, TypeError, NotImplementedError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} is damaged, or not a Parquet file ({first_line(error)}); write it again") from error


def column_values(column: Any, place: str) -> list[Any]:
    """Return the values of a Parquet column as Python objects.

    Args:
        column: A ``pyarrow`` array.
        place: File and column, for messages.

    Raises:
        ValueError: If Python cannot represent a value, e.g. a year after 9999.
    """
    with reading(place, "a Parquet file"):
        try:
            values: list[Any] = column.to_pylist()
        except (OverflowError, ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{place}: its values cannot be read ({first_line(error)}); store them as strings or integers") from error
    return values


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a complete Parquet file, or two columns have the same name.
    """
    from pyarrow import parquet

    check_file(path)
    with reading(path, "a Parquet file"):
        names: list[str] = parquet.read_schema(path).names
    if repeated := next((first for first, second in pairwise(sorted(names)) if first == second), None):
        raise ValueError(f"{path}: two columns are named {repeated!r}; name them differently")
    return names
