"""Tables of interactions and items from the Hugging Face Hub, or from local folders that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from malleable.datamodules.sources.recommendation.tables import TableSource, arrow_frame


@dataclass(frozen=True)
class HubTable:
    """Table of a dataset.

    Attributes:
        path: Id on the Hugging Face Hub, or a local folder. The files are CSV, TSV, JSON lines, Parquet or Arrow.
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


class HubTables(TableSource):
    """Two tables that ``datasets.load_dataset`` reads: interactions and items, with the columns of :class:`Tables`.

    Datasets are downloaded to the cache of ``datasets``. No code of a dataset is run: only CSV, JSON, Parquet and Arrow files are read. Cells of CSV
    are strings, so that ids keep leading zeros. The user is responsible for terms and licence.

    Args:
        interactions: Dataset of interactions (``user_id, item_id, timestamp[, rating][, split]``): a table, or only its path.
        items: Dataset of items (``item_id, title[, genres]``).
        interaction_columns: Names of the columns by field, for columns that are not named like their field, e.g. ``{user_id: uid}``.
        item_columns: As ``interaction_columns``, for items.
        genre_delimiter: Delimiter between the genres in a string, e.g. ``", "`` or ``;``.
        local_files_only: Use the local cache, without downloads; the environment variable ``HF_HUB_OFFLINE`` has the same effect.

    Raises:
        ValueError: If a dataset cannot be opened, a column is missing, or a value cannot be read; with dataset, row and field.
    """

    def __init__(
        self,
        interactions: HubTable | str,
        items: HubTable | str,
        interaction_columns: dict[str, str] | None = None,
        item_columns: dict[str, str] | None = None,
        genre_delimiter: str = "|",
        local_files_only: bool = False,
    ) -> None:
        super().__init__(interaction_columns, item_columns, genre_delimiter)
        self.interactions = HubTable(interactions) if isinstance(interactions, str) else interactions
        self.items = HubTable(items) if isinstance(items, str) else items
        self.local_files_only = local_files_only
        self._opened: dict[HubTable, Any] = {}

    def files(self) -> list[Path]:
        """Return the Arrow files of both tables in the cache of ``datasets``, and download them if needed."""
        return [Path(file["filename"]) for table in (self.interactions, self.items) for file in self._open(table).cache_files]

    def settings(self) -> dict[str, object]:
        """Return the settings of reading."""
        return {**super().settings(), "splits": [self.interactions.split, self.items.split]}

    def read(self, place: HubTable, wanted: Iterable[str]) -> pd.DataFrame:
        """Read a dataset."""
        dataset = self._open(place)
        names: list[str] = dataset.column_names
        columns = [name for name in wanted if name in names]
        return arrow_frame(place, dataset.with_format("arrow")[:].select(columns), names)

    def _open(self, table: HubTable) -> Any:
        """Open a dataset once."""
        if table not in self._opened:
            # pyarrow, datasets and the hub raise errors of many types for what a dataset contains.
            try:
                self._opened[table] = self._load(table)
            except Exception as error:
                raise ValueError(
                    f"{table} cannot be opened ({_reason(error)}); give a folder or the id of a dataset on the hub, and its config, data_files, "
                    "split and revision, if they are not the default ones"
                ) from error
        return self._opened[table]

    def _load(self, table: HubTable) -> Any:
        from datasets import DownloadConfig, Features, Value, load_dataset, load_dataset_builder
        from datasets.packaged_modules.arrow.arrow import Arrow
        from datasets.packaged_modules.csv.csv import Csv
        from datasets.packaged_modules.json.json import Json
        from datasets.packaged_modules.parquet.parquet import Parquet

        path = str(Path(table.path).expanduser()) if Path(table.path).expanduser().is_dir() else table.path
        options: Any = {
            "name": table.config,
            "data_files": table.data_files,
            "revision": table.revision,
            "download_config": DownloadConfig(local_files_only=self.local_files_only),
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


def _reason(error: Exception) -> str:
    """Return the reason of an error of ``datasets``, which begins some messages with a general line, or has the reason as its cause."""
    _, general, reason = str(error).partition("An error occurred while generating the dataset")
    if general and not reason.strip() and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    text = " ".join((reason if general else str(error)).split())
    return text[:300] or type(error).__name__
