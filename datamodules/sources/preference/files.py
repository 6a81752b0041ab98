"""Your own files of preference data, in JSON lines, JSON, CSV, TSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from malleable.datamodules.files.encoding import check_encoding
from malleable.datamodules.files.sniffing import sniff_delimiter, sniff_encoding
from malleable.datamodules.files.table_files import check_delimiter, column_names, column_values, read_parquet, read_table
from malleable.datamodules.files.text_files import file_kind, read_json_rows
from malleable.datamodules.files.user_files import check_file
from malleable.datamodules.sources.preference.base import PreferenceSource, PreferenceTables
from malleable.datamodules.sources.preference.records import FIELDS, Record, RecordReader, check_columns

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = ".jsonl, .json, .csv, .tsv (each may end in .gz) or .parquet"


def read_records(path: Path, names: Iterable[str] = FIELDS, delimiter: str | None = None, encoding: str | None = None) -> Iterator[Record]:
    """Yield the rows of a table. Values of CSV and TSV are strings, without blanks around cells.

    Args:
        path: A file in one of the formats :data:`KINDS`.
        names: Columns that are needed; others may be omitted.
        delimiter: Delimiter of CSV and TSV. Default: detected.
        encoding: Encoding of text files. Default: detected.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the format is unknown, or if the file is damaged.
    """
    kind, names = file_kind(path), list(names)
    if kind == ".parquet":
        known = column_names(path)
        table = read_parquet(path, [name for name in known if name in names])
        columns = {name: column_values(table[name], f"{path}, column {name}") for name in table.column_names}
        for number in range(table.num_rows):
            fields = {name: values[number] for name, values in columns.items()}
            # The names of all columns, for messages.
            yield Record(f"{path}, row {number + 1}", fields or dict.fromkeys(known))
        return
    if kind not in (*_DELIMITERS, ".jsonl", ".json"):
        raise ValueError(f"{path}: unknown format; give {KINDS}")
    check_file(path)
    encoding = encoding or sniff_encoding(path)
    if kind in _DELIMITERS:
        known_names = {name.casefold() for name in names}
        delimiter = delimiter or sniff_delimiter(path, known_names, None, encoding, default=_DELIMITERS[kind], has_header=True)
        header, lines, cells = read_table(path, delimiter, encoding)
        for number, *row in zip(lines, *cells, strict=True):
            yield Record(f"{path}, line {number}", dict(zip(header, row, strict=True)))
        return
    for _, place, value in read_json_rows(path, encoding):
        yield Record(place, value)


class PreferenceFile(PreferenceSource):
    """Files with prompts, and chosen and rejected answers; or with unpaired answers and labels.

    Formats are ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` (each also ``.gz``) and ``.parquet``. The fields are ``prompt``, ``chosen`` and
    ``rejected``, or ``prompt``, ``completion`` and ``label``, and optionally ``smoothing``;
    :class:`~malleable.datamodules.sources.preference.records.RecordReader` describes all shapes. Other columns are ignored. CSV and TSV hold strings
    only, without the blanks around cells; conversations and several rejected answers need JSON lines or Parquet. The user is responsible for terms
    and licence.

    Args:
        train: File of the training rows.
        val: File of the validation rows. Default: some prompts of ``train``, see
            :class:`~malleable.datamodules.preference.split.PreferenceSplit`.
        test: File of the test rows. Default: as for ``val``.
        columns: Names of the columns by field, for columns that are not named like their field, e.g. ``{prompt: question, chosen: good}``.
        delimiter: Delimiter between cells of CSV and TSV. Default: detected in the first line of each file.
        encoding: Encoding of text files without a byte-order mark. Default: UTF-8, or cp1252 if a file is not UTF-8.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a row has a wrong shape; with file, line and field.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        columns: dict[str, str] | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
    ) -> None:
        check_delimiter(delimiter)
        check_encoding(encoding)
        given = {"train": train, "val": val, "test": test}
        self.paths = {split: Path(path).expanduser() for split, path in given.items() if path is not None}
        self.columns = check_columns(columns)
        self.delimiter = delimiter
        self.encoding = encoding

    def files(self) -> list[Path]:
        """Return the files."""
        for path in self.paths.values():
            check_file(path, f"give a file that ends in {KINDS}")
        return list(self.paths.values())

    def settings(self) -> dict[str, object]:
        """Return the settings of reading."""
        return {"splits": list(self.paths), "columns": self.columns, "delimiter": self.delimiter, "encoding": self.encoding}

    def load(self) -> PreferenceTables:
        """Read the files."""
        self.files()
        reader = RecordReader(self.columns)
        rows = {split: reader.read(read_records(path, reader.names, self.delimiter, self.encoding), str(path)) for split, path in self.paths.items()}
        return PreferenceTables(rows, reader.dropped)
