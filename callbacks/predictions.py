"""Writing of predictions to CSV, JSON lines and Parquet files."""

from __future__ import annotations

import csv
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from malleable.datamodules.batch import Batch, Catalog, Recommendations
from malleable.datamodules.files.atomic import atomic_write, recover, temporary_folder
from malleable.datamodules.files.escape import for_csv

Descriptions = Iterator[tuple[Sequence[Any], Sequence[Sequence[Any]]]]
Format = Literal["csv", "jsonl", "parquet"]
CHUNK = 4096
"""Number of rows of a row group in Parquet."""


@runtime_checkable
class DescribesPredictions(Protocol):
    """Protocol for modules that convert their predictions to named fields.

    A query is the input of a row, e.g. head and relation. An answer is one prediction for it, e.g. an entity with its score.

    Attributes:
        query_fields: Names of the fields of a query.
        answer_fields: Names of the fields of an answer.
    """

    query_fields: Sequence[str]
    answer_fields: Sequence[str]

    def describe(self, batch: Any, found: Any) -> Descriptions:
        """Convert the predictions of a batch.

        Args:
            batch: The batch.
            found: Output of ``predict_step`` for the batch.

        Returns:
            Iterator over the rows. Each element is a pair: the values of ``query_fields``, and a list with the values of ``answer_fields`` of each
            answer, best first.
        """


class ItemDescriber:
    """Convert :class:`~malleable.datamodules.batch.Recommendations` to named fields.

    Args:
        catalog: Catalogue of the items. Its ids are written, or its titles if it has no ids.
        users: User of each row by ``sample_id``; ``None`` omits users.
    """

    answer_fields: Sequence[str] = ("item_id", "title", "score")

    def __init__(self, catalog: Catalog, users: Mapping[int, str] | None = None) -> None:
        self.keys = catalog.keys or catalog.titles
        self.titles = catalog.titles
        self.users = users
        self.query_fields: Sequence[str] = () if users is None else ("user_id",)

    def describe(self, batch: Batch, found: Recommendations) -> Descriptions:
        """Yield, for each row, its user (nothing if users are omitted) and the id, title and score of its items, without padding."""
        for sample_id, items, scores in zip(batch.sample_id.tolist(), *(part.tolist() for part in found), strict=True):
            query = () if self.users is None else (self.users.get(sample_id, ""),)
            yield query, [(self.keys[item], self.titles[item], score) for item, score in zip(items, scores, strict=True) if item >= 0]


class ColumnDescriber:
    """Convert predictions that are named columns, e.g. ``{"label": [...], "score": tensor}``, with one value for each row."""

    query_fields: Sequence[str] = ()

    def __init__(self, names: Sequence[str]) -> None:
        self.answer_fields = names

    def describe(self, batch: Batch, found: Mapping[str, Any]) -> Descriptions:
        """Return an empty query and one answer for each row."""
        columns = [value.tolist() if hasattr(value, "tolist") else list(value) for value in found.values()]
        return (((), [values]) for values in zip(*columns, strict=True))


class PredictionWriter(Callback):
    """Write predictions to files, sorted by ``sample_id``. The result does not depend on the number of devices.

    ``predictions.csv`` and ``predictions.parquet`` have one line for each answer. ``predictions.jsonl`` has one line for each row, with the answers
    in the field ``items``.

    The fields of recommendations are ``sample_id, user_id, rank, item_id, title, score``. ``sample_id`` is the number of the row in the file of
    histories, from 0. ``user_id`` exists only if this file has users. ``item_id`` is the id of the source: the first id if items with the same title
    were merged, or the title if the source has no ids. Modules that implement :class:`DescribesPredictions` define their own fields, e.g. for
    knowledge graphs ``sample_id, head, relation, tail, rank, answer, score, uncertainty``. ``predict_step`` can also return named columns.

    During prediction, each device writes its rows to a file in a temporary folder, which must be on a file system that all devices share. The files
    are merged at the end. Memory use does not depend on the number of rows. The next prediction removes temporary folders of killed processes.

    In CSV, titles that a spreadsheet would interpret as formulas start with an apostrophe.

    Args:
        dirpath: Folder of the files; default: the run folder.
        formats: File formats: ``csv``, ``jsonl``, ``parquet``.

    Raises:
        ValueError: If a format is unknown.
    """

    def __init__(self, dirpath: str | None = None, formats: Sequence[Format] = ("csv", "jsonl")) -> None:
        if unknown := sorted(set(formats) - {"csv", "jsonl", "parquet"}):
            raise ValueError(f"formats must be among csv, jsonl and parquet, got {unknown}")
        if not formats:
            raise ValueError("formats is empty; give csv, jsonl or parquet, or remove PredictionWriter")
        self.dirpath = dirpath
        self.formats = tuple(formats)
        self.folder: Path | None = None
        self._description: Any = None
        self._part: TextIO | None = None
        self._parts: Path | None = None
        self._exit_stack = ExitStack()
        self._last = -1
        self._ascending = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder, which is the same on all ranks."""
        self.folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the state, create the temporary folder, and choose the conversion of predictions to named fields."""
        self._discard()
        assert self.folder is not None
        if trainer.is_global_zero:
            recover(self.folder / "predictions")
            self._parts = self._exit_stack.enter_context(temporary_folder(self.folder / "predictions"))
        self._parts = Path(trainer.strategy.broadcast(str(self._parts)))
        self._last, self._ascending = -1, True
        data = getattr(trainer, "datamodule", None)
        catalog = self._catalog(getattr(pl_module, "catalog", None), getattr(data, "catalog", None))
        if isinstance(pl_module, DescribesPredictions) and not (catalog is not None and hasattr(pl_module, "recommend")):
            self._description = pl_module
        else:
            self._description = None if catalog is None else ItemDescriber(catalog, getattr(data, "predicted_users", None))

    @staticmethod
    def _catalog(own: Catalog | None, other: Catalog | None) -> Catalog | None:
        """Return the catalogue of the module; that of the data module if the module has none, or if only the latter has ids for equal titles."""
        if own is None or (not own.keys and other is not None and other.titles == own.titles):
            return other
        return own

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the rows of the batch, without repeated rows."""
        if isinstance(batch, Batch) and isinstance(outputs, Mapping):
            self._description = ColumnDescriber(list(outputs))
        elif not isinstance(batch, Batch) or not (isinstance(outputs, Recommendations) or isinstance(pl_module, DescribesPredictions)):
            raise MisconfigurationException(
                f"PredictionWriter expects Recommendations or named columns for a Batch, but {type(pl_module).__name__}.predict_step returned "
                f"{type(outputs).__name__} for {type(batch).__name__}; remove PredictionWriter"
            )
        if self._description is None:
            raise MisconfigurationException(
                f"PredictionWriter needs a catalogue, but neither {type(pl_module).__name__} nor the data module has one; "
                "set the attribute `catalog` of one of them, or remove PredictionWriter"
            )
        if self._part is None:
            self._part = self._open(trainer.global_rank)
        for sample_id, (query, answers) in zip(batch.sample_id.tolist(), self._description.describe(batch, outputs), strict=True):
            if sample_id >= 0:
                self._ascending, self._last = self._ascending and sample_id >= self._last, sample_id
                self._part.write(json.dumps([sample_id, list(query), [list(map(_rounded, answer)) for answer in answers]]) + "\n")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the files of all ranks on rank zero."""
        path = self._part_path(trainer.global_rank)
        if self._part is None:
            self._part = self._open(trainer.global_rank)
        self._close()
        if not self._ascending:
            rows = sorted(path.read_text(encoding="utf-8").splitlines(), key=_sample_id)
            path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        trainer.strategy.barrier("predictions of each device")
        fields = trainer.strategy.broadcast(self._fields())
        if trainer.is_global_zero:
            self._merge(trainer.world_size, fields)
        trainer.strategy.barrier("predictions")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the temporary files of the devices."""
        self._discard()

    def _fields(self) -> tuple[list[str], list[str]]:
        if self._description is None:
            return [], []
        return list(self._description.query_fields), list(self._description.answer_fields)

    def _part_path(self, rank: int) -> Path:
        assert self._parts is not None
        return self._parts / f"{rank}.jsonl"

    def _open(self, rank: int) -> TextIO:
        path = self._part_path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")

    def _close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    def _discard(self) -> None:
        self._close()
        self._exit_stack.close()

    def _merge(self, ranks: int, fields: tuple[list[str], list[str]]) -> None:
        assert self.folder is not None
        paths = [self._part_path(rank) for rank in range(ranks)]
        if missing := [path for path in paths if not path.is_file()]:
            raise MisconfigurationException(
                f"{missing[0]} does not exist on this machine: all devices must write to one folder on a shared file system; set `dirpath` of "
                "PredictionWriter to such a folder"
            )
        with ExitStack() as stack:
            parts = [stack.enter_context(path.open(encoding="utf-8")) for path in paths]
            number = self.write(heapq.merge(*parts, key=_sample_id), *fields)
        self._discard()
        first = self.folder / f"predictions.{self.formats[0]}"
        rank_zero_info(f"wrote predictions for {number} rows to {first}")

    def write(self, lines: Iterable[str], query_fields: Sequence[str], answer_fields: Sequence[str]) -> int:
        """Write the files of all formats, each of them atomically.

        Args:
            lines: Rows in JSON in their final order: ``[sample_id, query, answers]``.
            query_fields: Names of the fields of a query.
            answer_fields: Names of the fields of an answer.

        Returns:
            The number of rows.
        """
        assert self.folder is not None
        number = 0
        with ExitStack() as stack:
            makers: dict[str, Callable[..., Any]] = {"csv": _CsvFile, "jsonl": _JsonLinesFile, "parquet": _ParquetFile}
            paths = {kind: stack.enter_context(atomic_write(self.folder / f"predictions.{kind}")) for kind in self.formats}
            files = [stack.enter_context(makers[kind](path, query_fields, answer_fields)) for kind, path in paths.items()]
            for number, line in enumerate(lines, 1):  # noqa: B007
                row = json.loads(line)
                for file in files:
                    file.add(*row)
        return number


class _File:
    """Base class of prediction files that are written row by row."""

    def __init__(self, path: Path, query_fields: Sequence[str], answer_fields: Sequence[str]) -> None:
        self.path = path
        self.query_fields = query_fields
        self.answer_fields = answer_fields

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""

    def lines(self, sample_id: int, query: list[Any], answers: list[list[Any]]) -> Iterator[dict[str, Any]]:
        """Yield a line for each answer."""
        for rank, answer in enumerate(answers, 1):
            yield {
                "sample_id": sample_id,
                **dict(zip(self.query_fields, query, strict=True)),
                "rank": rank,
                **dict(zip(self.answer_fields, answer, strict=True)),
            }


class _CsvFile(_File):
    def __enter__(self) -> _CsvFile:
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerow(("sample_id", *self.query_fields, "rank", *self.answer_fields))
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, sample_id: int, query: list[Any], answers: list[list[Any]]) -> None:
        # Ids are not escaped, because users join them with other tables.
        for line in self.lines(sample_id, query, answers):
            self.writer.writerow([for_csv(value) if name == "title" else value for name, value in line.items()])


class _JsonLinesFile(_File):
    def __enter__(self) -> _JsonLinesFile:
        self.file = self.path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, sample_id: int, query: list[Any], answers: list[list[Any]]) -> None:
        items = [{"rank": rank} | dict(zip(self.answer_fields, answer, strict=True)) for rank, answer in enumerate(answers, 1)]
        row = {"sample_id": sample_id} | dict(zip(self.query_fields, query, strict=True)) | {"items": items}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")


class _ParquetFile(_File):
    def __enter__(self) -> _ParquetFile:
        self.chunk: list[dict[str, Any]] = []
        self.writer: pq.ParquetWriter | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self.writer is not None:
            self.writer.close()

    def add(self, sample_id: int, query: list[Any], answers: list[list[Any]]) -> None:
        self.chunk += self.lines(sample_id, query, answers)
        if len(self.chunk) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self.writer is None:
            names = ("sample_id", *self.query_fields, "rank", *self.answer_fields)
            self.writer = pq.ParquetWriter(self.path, pa.schema([(name, self._type(name)) for name in names]))
        texts = [field.name for field in self.writer.schema if pa.types.is_string(field.type)]
        lines = [line | {name: None if line[name] is None else str(line[name]) for name in texts} for line in self.chunk]
        self.writer.write_table(pa.Table.from_pylist(lines, self.writer.schema))
        self.chunk = []

    def _type(self, name: str) -> pa.DataType:
        """Return the type of a column, from its first value; string if it has no values."""
        value = next((line[name] for line in self.chunk if line[name] is not None), None)
        if name in ("sample_id", "rank"):
            return pa.int64()
        return pa.bool_() if isinstance(value, bool) else pa.float64() if isinstance(value, (int, float)) else pa.string()


def _sample_id(line: str) -> int:
    return int(line[1 : line.index(",")])


def _rounded(part: Any) -> Any:
    return round(part, 6) if isinstance(part, float) else part
