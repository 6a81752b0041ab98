"""Preference data of the Hugging Face Hub, or of local folders that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malleable.datamodules.files.table_files import column_values
from malleable.datamodules.sources.hub_datasets import HubTable, open_table
from malleable.datamodules.sources.preference.base import PreferenceSource, PreferenceTables
from malleable.datamodules.sources.preference.records import Record, RecordReader, check_columns


class HubPreferences(PreferenceSource):
    """Dataset with the fields of :class:`~malleable.datamodules.sources.preference.files.PreferenceFile`, e.g. UltraFeedback.

    Datasets are downloaded to the cache of ``datasets``. No code of a dataset is run: only CSV, JSON, Parquet and Arrow files are read. The user is
    responsible for terms and licence.

    Args:
        path: Id on the Hugging Face Hub, or a local folder; also a folder that ``save_to_disk`` of ``datasets`` has written.
        train: Split of the training rows, e.g. ``train_prefs`` or ``train[:1000]``.
        val: Split of the validation rows. Default: some prompts of ``train``, see :class:`~malleable.datamodules.preference.split.PreferenceSplit`.
        test: Split of the test rows. Default: as for ``val``.
        columns: Names of the columns by field, for columns that are not named like their field, e.g. ``{prompt: question, chosen: good}``.
        config: Configuration of the dataset. Default: its only or default one.
        revision: Branch, tag or commit on the hub. A commit makes runs repeatable.
        local_files_only: Use the local cache, without downloads; the environment variable ``HF_HUB_OFFLINE`` has the same effect.

    Raises:
        ValueError: If the dataset cannot be opened, or if a row has a wrong shape; with dataset, row and field.
    """

    def __init__(
        self,
        path: str,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        columns: dict[str, str] | None = None,
        config: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        splits = {"train": train, "val": val, "test": test}
        self.tables = {name: HubTable(path, config, split=split, revision=revision) for name, split in splits.items() if split is not None}
        self.columns = check_columns(columns)
        self.local_files_only = local_files_only
        self._opened: dict[HubTable, Any] = {}

    def files(self) -> list[Path]:
        """Return the Arrow files in the cache of ``datasets``, and download them if needed."""
        return [Path(file["filename"]) for table in self.tables.values() for file in self._open(table).cache_files]

    def settings(self) -> dict[str, object]:
        """Return the settings of reading."""
        return {"splits": {name: table.split for name, table in self.tables.items()}, "columns": self.columns}

    def load(self) -> PreferenceTables:
        """Read the splits."""
        reader = RecordReader(self.columns)
        rows = {name: reader.read(self._records(table, reader.names), str(table)) for name, table in self.tables.items()}
        return PreferenceTables(rows, reader.dropped)

    def _records(self, table: HubTable, wanted: list[str]) -> Iterator[Record]:
        dataset = self._open(table)
        known: list[str] = dataset.column_names
        arrow = dataset.with_format("arrow")[:].select([name for name in known if name in wanted])
        columns = {name: column_values(arrow[name], f"{table}, column {name}") for name in arrow.column_names}
        for number in range(len(dataset)):
            fields = {name: values[number] for name, values in columns.items()}
            yield Record(f"{table}, row {number + 1}", fields or dict.fromkeys(known))

    def _open(self, table: HubTable) -> Any:
        """Open a dataset once."""
        if table not in self._opened:
            self._opened[table] = open_table(table, self.local_files_only)
        return self._opened[table]
