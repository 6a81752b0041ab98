"""Your own triples: a folder with one file for each split, or one file that is split randomly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from malleable.datamodules.files.encoding import check_encoding
from malleable.datamodules.files.sniffing import find_mojibake
from malleable.datamodules.files.table_files import check_delimiter
from malleable.datamodules.graphs.triple_files import FIELDS, SUFFIXES, check_columns, read_ids, read_labels, read_names
from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables, Ints, number

log = logging.getLogger(__name__)

STEMS = {"train": ("train",), "val": ("valid", "val", "dev"), "test": ("test",)}
ID_NAMES = ("entity2id", "relation2id")


class Triples(GraphSource):
    """Triples in files ``.txt``, ``.tsv``, ``.csv`` (each also ``.gz``) or ``.parquet``.

    The format must be given, because similar files have different orders of columns:

    - ``labels``: ``train``, ``valid`` (or ``val``, ``dev``) and ``test`` with lines head, relation, tail, separated by tabs;
    - ``ids_hrt``: ``train2id``, ``valid2id`` and ``test2id`` with the ids of head, relation, tail on each line; ``entity2id`` and ``relation2id``
      with lines ``label<TAB>id``;
    - ``openke``: as ``ids_hrt``, but with lines head, **tail**, relation. The first line of each file is the number of the following lines.

    Args:
        path: Folder with these files; or one file of labels, which is split randomly.
        format: The format.
        columns: Order of the columns, if it differs from that of the format: a permutation of ``hrt``. It overrides a header.
        header: Whether the first line of each file of labels is a header. Columns are found by the names ``head``, ``relation`` and ``tail``, in any
            order; other columns are ignored.
        column_names: Names of the columns by field, e.g. ``{head: subject}``, for the fields ``head``, ``relation`` and ``tail`` whose column has
            another name.
        holdout: For one file, shares of its distinct triples for validation and test. All their entities and relations remain in training.
        seed: Seed of the random split.
        delimiter: Delimiter between cells of a text file of labels; default: a comma for ``.csv``, else a tab.
        encoding: Encoding of a text file of labels without a byte-order mark, e.g. ``cp1252`` or ``latin-1``; default: UTF-8.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If an argument is out of range, or a file is malformed; with file and line.
    """

    def __init__(
        self,
        path: str,
        format: Literal["labels", "ids_hrt", "openke"] = "labels",
        columns: str | None = None,
        header: bool = False,
        column_names: dict[str, str] | None = None,
        holdout: tuple[float, float] = (0.1, 0.1),
        seed: int = 0,
        encoding: str | None = None,
        delimiter: str | None = None,
    ) -> None:
        check_encoding(encoding)
        check_delimiter(delimiter)
        if format not in ("labels", "ids_hrt", "openke"):
            raise ValueError(f"format must be labels, ids_hrt or openke, got {format!r}")
        if unknown := sorted(set(column_names or {}) - set(FIELDS.values())):
            raise ValueError(f"column_names has the unknown field {unknown[0]!r}; the fields are {list(FIELDS.values())}")
        if min(holdout) < 0 or sum(holdout) >= 1:
            raise ValueError(f"holdout must be two shares >= 0 with a sum < 1, got {tuple(holdout)}")
        self.path = Path(path).expanduser()
        self.format = format
        self.columns = columns or ("htr" if format == "openke" else "hrt")
        self.label_columns = columns
        check_columns(self.columns)
        self.header = header
        self.column_names = column_names or {}
        self.holdout = (float(holdout[0]), float(holdout[1]))
        self.seed = seed
        self.encoding = encoding
        self.delimiter = delimiter

    def files(self) -> list[Path]:
        """Return the files of the splits, then the files of ids."""
        if self.path.is_file():
            if self.format != "labels":
                raise ValueError(f"{self.path} is one file, but format {self.format} needs a folder with {ID_NAMES[0]} and {ID_NAMES[1]}")
            return [self.path]
        return [*split_files(self.path, self._ending).values(), *self._id_files()]

    def settings(self) -> dict[str, object]:
        """Return the settings that affect the data."""
        read = {"format": self.format, "columns": self.columns, "header": self.header, "column_names": self.column_names}
        read |= {"encoding": self.encoding} if self.encoding else {}
        read |= {"delimiter": self.delimiter} if self.delimiter else {}
        read |= {"by_name": True} if self.header and self.label_columns is None else {}
        if self.path.is_file():
            return read | {"holdout": self.holdout, "seed": self.seed}
        return read | {"splits": list(split_files(self.path, self._ending))}

    def load(self) -> GraphTables:
        """Read all files."""
        self._check_encoding()
        options: Any = {"header": self.header, "names": self.column_names, "encoding": self.encoding, "delimiter": self.delimiter}
        if self.path.is_file():
            self.files()
            return hold_out(number({"train": read_labels(self.path, self.label_columns, **options)}), self.holdout, self.seed)
        files = split_files(self.path, self._ending)
        if self.format == "labels":
            return number({split: read_labels(path, self.label_columns, **options) for split, path in files.items()})
        counted = self.format == "openke"
        entities, relations = (read_names(path, counted=counted) for path in self._id_files())
        triples: dict[str, Ints] = {
            split: read_ids(path, len(entities), len(relations), self.columns, counted=counted) for split, path in files.items()
        }
        return GraphTables(entities, relations, triples)

    def _check_encoding(self) -> None:
        """Log a warning if files of labels are UTF-8, although another encoding is given."""
        for path in self.files() if self.encoding is not None else ():
            if path.suffix != ".parquet" and (problem := find_mojibake(path, self.encoding or "")):
                log.warning("%s", problem)

    @property
    def _ending(self) -> str:
        return "" if self.format == "labels" else "2id"

    def _id_files(self) -> list[Path]:
        return [] if self.format == "labels" else [_find(self.path, (name,)) for name in ID_NAMES]


def split_files(folder: Path, ending: str = "") -> dict[str, Path]:
    """Find the file of each split; validation and test are optional.

    Args:
        folder: Folder of the files.
        ending: Text after the name of the split in the name of a file, e.g. ``2id``.

    Raises:
        FileNotFoundError: If the folder or the training file does not exist.
    """
    found = {"train": _find(folder, STEMS["train"], ending)}
    for split in ("val", "test"):
        paths = [path for stem in STEMS[split] for path in _candidates(folder, stem + ending)]
        found |= {split: paths[0]} if paths else {}
    return found


def _candidates(folder: Path, stem: str) -> list[Path]:
    return [path for suffix in SUFFIXES if (path := folder / (stem + suffix)).is_file()]


def _find(folder: Path, stems: tuple[str, ...], ending: str = "") -> Path:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; give a folder with train, valid and test, or one file of triples")
    for stem in stems:
        if paths := _candidates(folder, stem + ending):
            return paths[0]
    raise FileNotFoundError(f"{folder} has no file {stems[0]}{ending}; expected {stems[0]}{ending} with one of the suffixes {', '.join(SUFFIXES)}")


def hold_out(tables: GraphTables, shares: tuple[float, float], seed: int) -> GraphTables:
    """Split training triples randomly, so that every entity and relation remains in training.

    Args:
        tables: Tables with training triples only.
        shares: Shares of the distinct triples for validation and test. They are smaller if an entity or relation would be missing in training.
        seed: Seed of the split.
    """
    triples = np.unique(tables.triples["train"], axis=0)
    entities = np.bincount(triples[:, [0, 2]].ravel(), minlength=len(tables.entities))
    relations = np.bincount(triples[:, 1], minlength=len(tables.relations))
    sizes = [round(share * len(triples)) for share in shares]
    taken: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(triples)).tolist():
        if len(taken) == sum(sizes):
            break
        head, relation, tail = triples[index]
        # A loop contains its entity twice.
        if min(entities[head], entities[tail]) > 1 + (head == tail) and relations[relation] > 1:
            taken.append(index)
            np.subtract.at(entities, [head, tail], 1)
            relations[relation] -= 1
    val = round(len(taken) * sizes[0] / max(1, sum(sizes)))
    rows: Mapping[str, list[int]] = {"val": taken[:val], "test": taken[val:]}
    return GraphTables(
        tables.entities,
        tables.relations,
        {"train": np.delete(triples, taken, axis=0), **{split: triples[np.sort(np.array(own, dtype=np.int64))] for split, own in rows.items()}},
    )
