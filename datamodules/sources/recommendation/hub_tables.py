"""Tables of interactions and items from the Hugging Face Hub, or from local folders that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from malleable.datamodules.sources.hub_datasets import HubTable, open_table
from malleable.datamodules.sources.recommendation.tables import TableSource, arrow_frame


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
            self._opened[table] = open_table(table, self.local_files_only)
        return self._opened[table]
