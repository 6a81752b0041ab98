"""Cached reference log-probabilities and a pass over rows as a script, for one rank and for several.

    python reference_run.py FOLDER [ddp|zero3]

Leaves ``FOLDER/reference-*.safetensors``, and in ``FOLDER/rows.json`` what a pass over 11 rows returned on each rank.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from self_play_run import strategy_of
from tiny import TOKENS, batch_of, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer

from malleable.callbacks.reference import ReferenceCache
from malleable.callbacks.row_pass import apply_to_rows
from malleable.lightning_modules.recommendation.dpo import DPO


def pairs(count: int, step: int = 2) -> list[dict]:
    """The true title against the one ``step`` behind it."""
    return [row | {"answers": [row["answers"][0], TOKENS[(row["item_ids"][0] + step) % 8]]} for row in tiny_rows(count)]


def stored(path: Path | str) -> dict[str, torch.Tensor]:
    """Everything in the file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class Sweeping(ReferenceCache):
    """Also makes a pass over 11 rows, which cannot be divided evenly among ranks and batches."""

    found: torch.Tensor

    def on_train_start(self, trainer, pl_module):
        self.found = apply_to_rows(
            trainer, pl_module, tiny_rows(11), batch_of, 2, lambda batch: batch.sample_id[:, None] * torch.tensor([1, 10]), "test"
        )
        super().on_train_start(trainer, pl_module)


def main(folder: Path, strategy: str = "auto") -> None:
    """Run as the module's docstring says."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    callback = Sweeping(dirpath=str(folder))
    quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = quiet_trainer(folder / "run", devices=ranks, strategy=strategy_of(strategy), max_steps=1, callbacks=[callback], **quiet)
    trainer.fit(DPO(language_model=tiny_config()), TinyData(train=pairs(22), batch_size=4 // ranks, global_batch_size=4))
    found = [callback.found] if ranks == 1 else list(trainer.strategy.all_gather(callback.found))
    if trainer.is_global_zero:
        (folder / "rows.json").write_text(json.dumps([part.tolist() for part in found]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
