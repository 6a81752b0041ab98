"""Tables that a user gives: rows of CSV and TSV with the number of their line, and columns of Parquet."""

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
    """Check an option.

    Raises:
        ValueError: If it is not one character that may stand between cells.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0 .'):
        raise ValueError(f"delimiter must be one character such as ',', ';', '|' or a tab ('\\t'), got {delimiter!r}")


def read_cells(path: Path, delimiter: str, encoding: str | None = None, *, quotes: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table of text, without blank lines and without the blanks around cells.

    Between commas and the like, cells follow RFC 4180: one in quotes may hold delimiters, line feeds and doubled quotes. Between tabs, a row is a
    line; a cell in quotes, as programs write one that has quotes itself, loses them.

    Args:
        path: The file.
        delimiter: What stands between cells.
        encoding: Of a file without a byte-order mark; default: UTF-8.
        quotes: False takes quotes as characters like others.

    Yields:
        Number of the row's first line, from 1, and its cells.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no text, or a quote is misplaced; with file and line.
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
    """Rows whose cells may stand in quotes."""

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
            return "a quote opens a cell and nothing closes it; remove it, or double it within a cell in quotes"
        if "expected after" in text:
            problem = "a cell in quotes goes on behind its closing quote; put the whole cell in quotes, and double the quotes within it"
            other = next((found[1] for found in re.finditer(r'" *([,;\t|])', "".join(self.pending)) if found[1] != self.delimiter), None)
            return f"{problem}; or set the option `delimiter` to {other!r}, if that stands between the cells" if other else problem
        if "new-line character" in text:
            return "a carriage return within a cell; end lines in a line feed, with or without a carriage return before it"
        return text

    def _check_several(self, first: int, width: int) -> None:
        """Refuse a cell of several lines that looks as if a stray quote had swallowed rows."""
        key = self.pending[0].partition(self.delimiter)[0].strip()
        for line in self.pending[1:]:
            own = line.partition(self.delimiter)[0].strip()
            alike = own.isdigit() if key.isdigit() else bool(own) and len(own.split()) == 1
            if width > 1 and line.count(self.delimiter) == width - 1 and alike:
                raise ValueError(
                    f"{self.path}, {self._place(first)}: a quote opens a cell that holds what looks like a row, {line.strip()[:80]!r}; remove the "
                    "stray quote, or write the cell without line feeds"
                )


def read_table(path: Path, delimiter: str, encoding: str | None = None) -> tuple[list[str], list[int], list[list[str]]]:
    """Read a table of text whose first row names the columns.

    Returns:
        The names, the line of each row, and the cells of each column.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no header, a column is named twice, or a row has another number of cells than the header; with file and line.
    """
    rows = read_cells(path, delimiter, encoding)
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    if repeated := next((name for name in header if name and header.count(name) > 1), None):
        raise ValueError(f"{path}, line 1: two columns are named {repeated!r}; name them differently")
    numbers: list[int] = []
    columns: list[list[str]] = [[] for _ in header]
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells, but the first line names {len(header)} columns ({', '.join(header)[:200]}); "
                f"a cell with {delimiter!r} in it stands in quotes, and every column has a name"
            )
        numbers.append(number)
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    return header, numbers, columns


def other_delimiter(header: Sequence[str], delimiter: str) -> str | None:
    """Return the delimiter that the only name of a header suggests, ``None`` where it suggests none."""
    if len(header) != 1:
        return None
    return next((other for other in (",", ";", "\t", "|") if other != delimiter and other in header[0]), None)


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a Parquet file.

    Args:
        path: The file.
        columns: Those to read; default: all.

    Returns:
        A ``pyarrow.Table``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no whole Parquet file, or says that it has more rows than a file of its size holds.
    """
    from pyarrow import parquet

    check_file(path)
    with reading(path, "Parquet file"):
        try:
            with parquet.ParquetFile(path) as file:
                rows = file.metadata.num_rows
                if rows > max(_FEW_ROWS, _ROWS_A_BYTE * path.stat().st_size):
                    raise ValueError(f"{path} says that it has {rows} rows, more than a file of its size holds; write it again")
                table = file.read(list(columns) if columns is not None else None)
                table.validate(full=True)
                return table
        except (KeyError, TypeError, NotImplementedError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} is damaged, or no Parquet file ({first_line(error)}); write it again") from error


def column_values(column: Any, place: str) -> list[Any]:
    """Return the values of a column of Parquet as Python objects.

    Args:
        column: A ``pyarrow`` array.
        place: File and column, for messages.

    Raises:
        ValueError: If Python has no such value, e.g. for years beyond 9999.
    """
    with reading(place, "Parquet file"):
        try:
            values: list[Any] = column.to_pylist()
        except (OverflowError, ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{place}: its values cannot be read ({first_line(error)}); store texts, or ids as integers") from error
    return values


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no whole Parquet file.
    """
    from pyarrow import parquet

    check_file(path)
    with reading(path, "Parquet file"):
        names: list[str] = parquet.read_schema(path).names
    if repeated := next((first for first, second in pairwise(sorted(names)) if first == second), None):
        raise ValueError(f"{path}: two columns are named {repeated!r}; name them differently")
    return names
