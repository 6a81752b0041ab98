"""One training step of a model whose weights are sharded by ZeRO-3, as a script of its own.

    python pass_forms_run.py MODEL FOLDER

Leaves ``FOLDER/forms-<rank>.json``: the forms of the model's passes, and how many of them were measured before and after the weights were sharded.
"""

import json
import os
import sys
from pathlib import Path

from lightning.pytorch import Callback
from reference_run import pairs
from self_play_run import strategy_of
from tiny_data import TinyData, quiet_trainer

from malleable.callbacks.reference import ReferenceCache
from malleable.lightning_modules.functional.language import pass_forms
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.recommendation.dpo import DPO


class Record(Callback):
    """Write what was measured."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, 0

    def on_train_start(self, trainer, pl_module):
        self.before = len(pass_forms._BY_CONFIGURATION)
        assert all(hasattr(parameter, "ds_id") for parameter in pl_module.model.parameters())

    def on_train_end(self, trainer, pl_module):
        found = {
            "forms": pass_forms.pass_forms(pl_module.model).describe(),
            "before": self.before,
            "after": len(pass_forms._BY_CONFIGURATION) - self.before,
        }
        (self.folder / f"forms-{trainer.global_rank}.json").write_text(json.dumps(found))


def main(model: str, folder: Path) -> None:
    """Run as the module's docstring says."""
    ranks = int(os.environ["WORLD_SIZE"])
    quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = quiet_trainer(
        folder / "run",
        devices=ranks,
        strategy=strategy_of("zero3"),
        max_steps=1,
        callbacks=[Record(folder), ReferenceCache(dirpath=str(folder))],
        **quiet,
    )
    data = TinyData(train=pairs(4), batch_size=2, global_batch_size=2 * ranks)
    trainer.fit(DPO(language_model=LanguageModelConfig(name=model)), data)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
