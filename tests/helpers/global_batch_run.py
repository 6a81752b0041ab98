"""Supervised tuning in steps of eight rows as a script of its own: on one device, accumulated, and on several ranks.

    python global_batch_run.py FOLDER

Tunes a model from scratch and adapters of ``FOLDER/base``. Leaves ``FOLDER/ranks<N>/<model>_<batches of a step>.safetensors`` and, of a test
on a loader that Lightning shards itself, ``FOLDER/ranks<N>/test.json``.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import batch_of, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from torch.utils.data import DataLoader

from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sft import SFT

# Batch sizes of one device.
SIZES = {1: {"full": (8, 2), "lora": (4,)}, 2: {"full": (2,), "lora": (2,)}}


def main(root: Path) -> None:
    """Run as the module's docstring says."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    folder = root / f"ranks{ranks}"
    configs = {
        "full": tiny_config(),
        "lora": LanguageModelConfig(name=str(root / "base"), lora=LoRA(r=2, alpha=4, dropout=0.0), gradient_checkpointing=True),
    }
    settings = {"max_epochs": 1, "enable_checkpointing": False, "logger": False, "strategy": "ddp" if ranks > 1 else "auto", "devices": ranks}
    for name, sizes in SIZES[ranks].items():
        for size in sizes:
            torch.manual_seed(0)
            tuning = Tuning(warmup_steps=0, decay="constant")
            module = SFT(language_model=configs[name], tuning=tuning, ks=(1, 3), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
            trainer = quiet_trainer(folder, **settings)
            trainer.fit(module, TinyData(batch_size=size, global_batch_size=8))
            assert trainer.global_step == 6
            if trainer.is_global_zero:
                weights = {key: value.detach().clone() for key, value in module.model.named_parameters() if value.requires_grad}
                save_file(weights, folder / f"{name}_{8 // size // ranks}.safetensors")
    # The second of two ranks gets as its last batch one repeated row and no other.
    (figures,) = trainer.test(module, DataLoader(tiny_rows(5), batch_size=2, collate_fn=batch_of), verbose=False)
    if trainer.is_global_zero:
        (folder / "test.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
