"""Data sets of the Hugging Face Hub and local folders that ``datasets`` reads. No code of a data set is run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

_SAVED = ("state.json", "dataset_dict.json")
"""Files of a folder that ``save_to_disk`` has written: of a data set, and of several splits."""


@dataclass(frozen=True)
class HubTable:
    """Table of a dataset.

    Attributes:
        path: Id on the Hugging Face Hub, or a local folder. The files are CSV, TSV, JSON lines, Parquet or Arrow. The folder may also be one that
            ``save_to_disk`` of ``datasets`` has written.
        config: Configuration of the dataset. Default: its only or default one.
        data_files: Files to read, relative to ``path``, e.g. ``ratings.parquet``. Default: those of the configuration.
        split: Split, e.g. ``train`` or ``train[:1000]``.
        revision: Branch, tag or commit on the hub. A commit makes runs repeatable.
    """

    path: str
    config: str | None = None
    data_files: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def name(self) -> str:
        """Last part of the path."""
        return Path(self.path).name

    def __str__(self) -> str:
        """Name the dataset in messages."""
        options = [f"{field.name} {value}" for field in fields(self)[1:] if (value := getattr(self, field.name)) is not None]
        return f"dataset {self.path} ({', '.join(options)})"


def open_table(table: HubTable, local_files_only: bool = False) -> Any:
    """Open a table as a memory-mapped ``datasets.Dataset``. Cells of CSV are strings.

    Args:
        table: The table.
        local_files_only: Use the local cache, without downloads.

    Raises:
        ValueError: If the dataset cannot be opened.
    """
    # pyarrow, datasets and the hub raise errors of many types for what a dataset contains.
    try:
        return _load(table, local_files_only)
    except Exception as error:
        raise ValueError(
            f"{table} cannot be opened ({_reason(error)}); give a folder or the id of a dataset on the hub, and its config, data_files, "
            "split and revision, if they are not the default ones"
        ) from error


def _load(table: HubTable, local_files_only: bool) -> Any:
    from datasets import DownloadConfig, Features, Value, load_dataset, load_dataset_builder
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    folder = Path(table.path).expanduser()
    if any((folder / name).is_file() for name in _SAVED):
        return _load_saved(table, folder)
    path = str(folder) if folder.is_dir() else table.path
    options: Any = {
        "name": table.config,
        "data_files": table.data_files,
        "revision": table.revision,
        "download_config": DownloadConfig(local_files_only=local_files_only),
    }
    builder = load_dataset_builder(path, **options)
    if not isinstance(builder, (Csv, Json, Parquet, Arrow)):
        raise ValueError("its files are not CSV, TSV, JSON lines, Parquet or Arrow")
    dataset = load_dataset(path, split=table.split, **options)
    if not isinstance(builder, Csv):
        return dataset
    # Columns of CSV are typed by their values, which would remove the leading zeros of ids and the title "NA".
    strings = Features(dict.fromkeys(dataset.column_names, Value("string")))
    return load_dataset(path, split=table.split, features=strings, keep_default_na=False, **options)


def _load_saved(table: HubTable, folder: Path) -> Any:
    """Open a folder that ``save_to_disk`` has written."""
    from datasets import Dataset, load_from_disk

    if (given := [name for name in ("config", "data_files", "revision") if getattr(table, name) is not None]) != []:
        raise ValueError(f"a folder of save_to_disk has no {given[0]}")
    dataset = load_from_disk(str(folder))
    if isinstance(dataset, Dataset):
        return dataset
    if table.split not in dataset:
        raise ValueError(f"it has the splits {', '.join(map(str, dataset))}, not {table.split}")
    return dataset[table.split]


def _reason(error: Exception) -> str:
    """Return the reason of an error of ``datasets``, which begins some messages with a general line, or has the reason as its cause."""
    _, general, reason = str(error).partition("An error occurred while generating the dataset")
    if general and not reason.strip() and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    text = " ".join((reason if general else str(error)).split())
    return text[:300] or type(error).__name__
