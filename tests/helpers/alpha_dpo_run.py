"""alpha-DPO in steps of eight pairs as a script of its own: on one device, accumulated, and on several ranks.

    python alpha_dpo_run.py FOLDER [ddp|zero2|zero3]

Leaves ``FOLDER/<ranks>x<rows of a batch>/result.safetensors`` with trained weights and statistics of the margins, and ``logged.json`` with the
values of each step.
"""

import csv
import json
import os
import sys
from pathlib import Path

import torch
from reference_run import pairs
from safetensors.torch import save_file
from self_play_run import strategy_of
from tiny import tiny_catalog, tiny_config
from tiny_data import TinyData, quiet_trainer

from malleable.callbacks.reference import ReferenceCache
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.adaptive_margin import AdaptiveMargin
from malleable.lightning_modules.recommendation.alpha_dpo import AlphaDPO

# Rows of a batch on one device, by number of ranks.
SIZES = {1: (8, 4, 2), 2: (4, 2)}
STATE = ("statistics.average", "statistics.updates")


def make_module() -> AlphaDPO:
    """A small model whose first weights are always the same."""
    torch.manual_seed(0)
    loss = AdaptiveMargin(beta=2.5, gamma_beta_ratio=0.6, alpha=0.2)
    module = AlphaDPO(tiny_config(), tiny_catalog(), loss=loss, tuning=Tuning(warmup_steps=0, decay="constant"))
    module.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.05)
    return module


def run(folder: Path, size: int, strategy: str = "auto", **changes) -> AlphaDPO:
    """Train for two epochs of six steps."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    folder = folder / f"{ranks}x{size}"
    module = make_module()
    settings = {"max_epochs": 2, "enable_checkpointing": False, "limit_val_batches": 0, "strategy": strategy_of(strategy), "devices": ranks}
    trainer = quiet_trainer(folder, callbacks=[ReferenceCache(reuse=False)], **settings | changes)
    trainer.fit(module, TinyData(train=pairs(48), batch_size=size, global_batch_size=8))
    if strategy == "auto" and trainer.is_global_zero:
        weights = {key: value.detach().clone() for key, value in module.model.named_parameters()}
        save_file(weights | {name: module.loss.state_dict()[name].clone() for name in STATE}, folder / "result.safetensors")
    elif trainer.is_global_zero:
        save_file({name: module.loss.state_dict()[name].clone() for name in STATE}, folder / "result.safetensors")
    if trainer.is_global_zero:
        with (folder / "run/metrics.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items() if value and key.startswith("train_")} for row in csv.DictReader(file)]
        (folder / "logged.json").write_text(json.dumps([row for row in rows if "train_loss" in row]))
    return module


def main(folder: Path, strategy: str = "auto") -> None:
    """Run as the module's docstring says."""
    for size in SIZES[int(os.environ.get("WORLD_SIZE", "1"))]:
        run(folder, size, strategy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
