"""Readers of files with triples and ids; errors contain file, line and field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.files.table_files import column_names, column_values, read_cells, read_parquet
from malleable.datamodules.files.text_files import cell_text, file_kind, id_text, numbered_lines

FIELDS = {"h": "head", "r": "relation", "t": "tail"}
SUFFIXES = (".txt", ".tsv", ".csv", ".txt.gz", ".tsv.gz", ".csv.gz", ".parquet")
_SIGNIFICAND_BITS = {"float": 23, "halffloat": 10}
HEADERS = (("head", "relation", "tail"), ("h", "r", "t"), ("subject", "predicate", "object"), ("source", "relation", "target"))
_DELIMITERS = {".csv": ","}


def check_columns(columns: str) -> None:
    """Check the option ``columns``.

    Raises:
        ValueError: If it is not a permutation of the letters h, r, t.
    """
    if sorted(columns) != ["h", "r", "t"]:
        raise ValueError(f"columns must be a permutation of the letters h (head), r (relation) and t (tail), e.g. hrt or htr, got {columns!r}")


def header_order(header: Sequence[str], names: Mapping[str, str] | None = None) -> list[int] | None:
    """Return the positions of head, relation and tail in a header; ``None`` if it does not contain all three.

    Args:
        header: Names of the columns, in any order and with other columns.
        names: Names of the columns of ``head``, ``relation`` or ``tail`` that differ from :data:`HEADERS`; case is ignored.
    """
    known = [name.casefold() for name in header]
    for form in HEADERS:
        wanted = [(names or {}).get(field, name).casefold() for field, name in zip(FIELDS.values(), form, strict=True)]
        if set(wanted) <= set(known):
            return [known.index(name) for name in wanted]
    return None


def read_labels(
    path: Path,
    columns: str | None = None,
    *,
    header: bool = False,
    names: Mapping[str, str] | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Read labelled triples lazily.

    Args:
        path: Lines of three columns separated by tabs, CSV, or Parquet with three columns. Labels may contain spaces; spaces and tabs around a label
            are removed, see :func:`~malleable.datamodules.files.text_files.cell_text`.
        columns: Order of the columns. Default: that of the header, else head, relation, tail.
        header: Whether the first line of a text file is a header. Columns are found by the names of :data:`HEADERS`, in any order; other columns are
            ignored. A header of three other names is skipped.
        names: Names of the columns of ``head``, ``relation`` or ``tail`` that differ from :data:`HEADERS`.
        encoding: Encoding of a text file without a byte-order mark; default: UTF-8.
        delimiter: Delimiter between cells of a text file; default: a comma for ``.csv``, else a tab.

    Yields:
        Head, relation, tail.

    Raises:
        ValueError: If a line has another number of columns, if a cell is empty, or if the file has no triples; with file and line.
    """
    by_name, columns = columns is None, columns or "hrt"
    check_columns(columns)
    order = [columns.index(letter) for letter in "hrt"]
    place = None
    options: Any = {"header": header, "names": names, "encoding": encoding, "delimiter": delimiter, "by_name": by_name}
    for place, row in _rows(path, [FIELDS[letter] for letter in columns], **options):  # noqa: B007  (detects an empty file)
        yield row[order[0]], row[order[1]], row[order[2]]
    if place is None:
        raise ValueError(f"{path} contains no triple; expected lines {_shape(columns)}")


def read_ids(path: Path, entities: int, relations: int, columns: str = "hrt", *, counted: bool = False) -> NDArray[np.int64]:
    """Read triples of ids.

    Args:
        path: File of integers as in :func:`read_labels`; text may have spaces instead of tabs.
        entities: Number of entities.
        relations: Number of relations.
        columns: Order of the columns.
        counted: Whether the first line is the number of triples (OpenKE).

    Returns:
        ``(N, 3)`` int64 of head, relation, tail.

    Raises:
        ValueError: If a line has another number of columns, or an id is unknown; with file and line.
    """
    check_columns(columns)
    sizes = [relations if letter == "r" else entities for letter in columns]
    rows: list[list[int]] = []
    for place, row in _rows(path, [FIELDS[letter] for letter in columns], counted=counted, spaces=True):
        rows.append([_id(cell, size, f"{place}, field {FIELDS[letter]}") for cell, size, letter in zip(row, sizes, columns, strict=True)])
    if not rows:
        raise ValueError(f"{path} contains no triple; expected lines {_shape(columns)} of ids")
    return np.array(rows, dtype=np.int64)[:, [columns.index(letter) for letter in "hrt"]]


def read_names(path: Path, *, counted: bool = False) -> list[str]:
    """Read the labels of all ids.

    Args:
        path: Lines ``label<TAB>id`` in any order; ids must be consecutive from 0.
        counted: Whether the first line is the number of labels (OpenKE).

    Returns:
        Labels by id.

    Raises:
        ValueError: If a label or an id occurs twice, if an id is missing, or if a line has another format; with file and line.
    """
    labels: dict[str, str] = {}
    by_id: dict[int, str] = {}
    for place, (label, cell) in _rows(path, ["label", "id"], counted=counted, spaces=True):
        key = _id(cell, None, f"{place}, field id")
        if label in labels:
            raise ValueError(f"{place}: the label {label!r} is already in {labels[label]}; give every label one id")
        if key in by_id:
            raise ValueError(f"{place}: {by_id[key]!r} already has the id {key}; give every id one label")
        labels[label] = place.rpartition(", ")[2]
        by_id[key] = label
    if not by_id:
        raise ValueError(f"{path} contains no label; expected lines label<TAB>id")
    missing = next((key for key in range(len(by_id)) if key not in by_id), None)
    if missing is not None:
        raise ValueError(f"{path}: {len(by_id)} labels, but id {missing} is missing (the largest is {max(by_id)}); ids must be consecutive from 0")
    return [by_id[key] for key in range(len(by_id))]


def _shape(columns: str) -> str:
    return "<TAB>".join(FIELDS[letter] for letter in columns)


def _id(cell: str, size: int | None, where: str) -> int:
    key = int(cell) if cell.isascii() and cell.isdigit() and len(cell) < 19 else -1
    if key < 0 or (size is not None and key >= size):
        allowed = "an integer >= 0" if size is None else f"one of the {size} ids 0 to {size - 1}"
        raise ValueError(f"{where}: {cell!r} is not valid, expected {allowed}")
    return key


def _rows(
    path: Path,
    fields: Sequence[str],
    *,
    header: bool = False,
    counted: bool = False,
    spaces: bool = False,
    names: Mapping[str, str] | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    by_name: bool = False,
) -> Iterator[tuple[str, list[str]]]:
    """Yield the place of each row, for messages, and its cells."""
    kind = file_kind(path)
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, fields, names or {})
    elif header or delimiter or kind in _DELIMITERS:
        cells = _cell_rows(path, delimiter or _DELIMITERS.get(kind, "\t"), encoding)
        rows = _headed_rows(cells, fields, names, by_name) if header else _bare_rows(cells, fields)
    else:
        rows = _text_rows(path, fields, counted, spaces, encoding)
    for place, row in rows:
        if not all(row):
            raise ValueError(f"{place}, field {fields[row.index('')]}: the cell is empty; every row needs {', '.join(fields)}")
        yield place, row


def _cell_rows(path: Path, delimiter: str, encoding: str | None) -> Iterator[tuple[str, list[str]]]:
    for number, row in read_cells(path, delimiter, encoding, quotes=delimiter != "\t"):
        yield f"{path}, line {number}", row


def _bare_rows(rows: Iterator[tuple[str, list[str]]], fields: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for place, (where, row) in enumerate(rows):
        _check_width(where, row, len(fields), fields)
        if not place:
            _refuse_header(where, row)
        yield where, row


def _headed_rows(
    rows: Iterator[tuple[str, list[str]]], fields: Sequence[str], names: Mapping[str, str] | None, by_name: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of the fields, whose columns are found by the names of the header if ``by_name``."""
    where, header = next(rows, ("", []))
    order = header_order(header, names) if by_name else None
    if order is None and header and (len(header) != len(fields) or names):
        raise ValueError(f"{where}: the columns are {header}, expected {', '.join(fields)}; set their names with column_names: {{head: ...}}")
    for where, row in rows:
        _check_width(where, row, len(header), header)
        yield where, row if order is None else [row[column] for column in order]


def _check_width(where: str, row: Sequence[str], width: int, fields: Sequence[str]) -> None:
    if len(row) != width:
        raise ValueError(f"{where}: {len(row)} cells, expected {width}: {','.join(fields)}; quote labels that contain the delimiter")


def _refuse_header(where: str, row: Sequence[str]) -> None:
    if header_order(row) is not None:
        raise ValueError(f"{where} looks like a header ({', '.join(row)}); set header: true, or remove the line")


def _text_rows(path: Path, fields: Sequence[str], counted: bool, spaces: bool, encoding: str | None) -> Iterator[tuple[str, list[str]]]:
    width, count, expected = len(fields), 0, None
    for number, line in numbered_lines(path, encoding):
        if not line.strip():
            continue
        row = [cell_text(cell) for cell in line.removesuffix("\n").removesuffix("\r").split("\t")]
        if counted and expected is None:
            expected = _id(line.strip(), None, f"{path}, line {number}, which must be the number of the following lines")
            continue
        if spaces and len(row) == 1:
            row = line.rsplit(maxsplit=width - 1)
        if len(row) != width:
            raise ValueError(f"{path}, line {number}: {_columns(row, line)}, expected {width}: {'<TAB>'.join(fields)}{_hint(row, number, spaces)}")
        if number == 1:
            _refuse_header(f"{path}, line 1", row)
        count += 1
        yield f"{path}, line {number}", row
    if expected is not None and count != expected:
        raise ValueError(f"{path}: {count} lines follow the first one, which states {expected}; give the complete file, or choose another format")


def _columns(row: Sequence[str], line: str) -> str:
    return f"{len(row)} column{'s' * (len(row) > 1)} in {line.strip()[:80]!r}"


def _hint(row: Sequence[str], number: int, spaces: bool) -> str:
    if spaces and number == 1 and len(row) == 1 and row[0].isdigit():
        return "; files of format openke have a first line with the number of lines"
    return " (tabs between them, not spaces)" if len(row) == 1 and not spaces else ""


def _parquet_rows(path: Path, fields: Sequence[str], names: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    column_names(path)  # raises an error for duplicate names
    table = read_parquet(path)
    wanted = [names.get(field, field) for field in fields]
    if not set(wanted) <= set(table.column_names):
        if names or len(table.column_names) != len(fields):
            raise ValueError(f"{path}: columns {table.column_names}, expected {wanted}; set their names with column_names: {{head: ...}}")
        wanted = table.column_names
    bits = [_SIGNIFICAND_BITS.get(str(table.schema.field(name).type), 52) for name in wanted]
    number = 0
    for batch in table.select(wanted).to_batches():
        columns = [column_values(column, f"{path}, column {name}") for column, name in zip(batch.columns, wanted, strict=True)]
        for row in zip(*columns, strict=True):
            number += 1
            place = f"{path}, row {number}"
            yield (
                place,
                [
                    "" if cell is None or cell == "" else id_text(cell, f"{place}, field {field}", size)
                    for cell, field, size in zip(row, fields, bits, strict=True)
                ],
            )
