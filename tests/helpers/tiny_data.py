"""The toy rows as a data module, and a quiet Trainer."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tiny import batch_of, tiny_catalog, tiny_rows

from malleable.datamodules.base import BaseDataModule


class TinyData(BaseDataModule):
    """Rows in which the next film follows from the last one, split three ways."""

    def __init__(self, train: Any = None, **changes: Any) -> None:
        super().__init__(**{"batch_size": 4, **changes})
        self.catalog = tiny_catalog()
        self._train = train

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.train_dataset = self._train or tiny_rows(48)
        self.val_dataset, self.test_dataset, self.predict_dataset = tiny_rows(6), tiny_rows(13), tiny_rows(5)

    def collate(self, rows):
        return batch_of(rows)

    def row_tokens(self):
        return [len(row["answers"][0]) for row in self.train_dataset]


def quiet_trainer(folder: Path, **changes: Any) -> Trainer:
    """A CPU Trainer that writes under ``folder`` and shows nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, name="", version="run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return Trainer(**(settings | changes))
