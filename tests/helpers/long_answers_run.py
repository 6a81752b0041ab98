"""One training step of DPO with a chunked language-model head, as a script for one rank and for several.

    python long_answers_run.py FOLDER [auto|zero3|fsdp2] [checkpointing] [plain]

Leaves ``FOLDER/weights.safetensors``. With ``plain``, all logits are computed at once.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from reference_run import pairs
from safetensors.torch import save_file
from self_play_run import strategy_of
from tiny import tiny_config
from tiny_data import TinyData, quiet_trainer

from malleable.callbacks.reference import ReferenceCache
from malleable.lightning_modules.fsdp import FSDP2Strategy
from malleable.lightning_modules.functional.language import chunked_head, logps
from malleable.lightning_modules.language.export import gathered_state
from malleable.lightning_modules.recommendation.dpo import DPO


def main(folder: Path, strategy: str, *options: str) -> None:
    """Run as the module's docstring says."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    chunks = []
    if "plain" not in options:
        chunked_head.LIMIT, chunked_head.CHUNK = 0, 3 * 16  # three positions of a vocabulary of 16
        plain = logps.head_logps
        logps.head_logps = lambda *arguments: chunks.append(1) or plain(*arguments)
    trainer = quiet_trainer(
        folder / "run",
        devices=ranks,
        strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy_of(strategy),
        max_steps=1,
        callbacks=[ReferenceCache(dirpath=str(folder))],
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    config = tiny_config()
    config.gradient_checkpointing = "checkpointing" in options
    rows = pairs(4)
    # The rank with this row has more chunks than the other.
    rows[0]["answers"] = [[*[4] * 20, 1], [*[5] * 25, 1]]
    module = DPO(config, optimizer=partial(torch.optim.SGD, lr=1.0))
    trainer.fit(module, TinyData(train=rows, batch_size=4 // ranks, global_batch_size=4))
    assert bool(chunks) == ("plain" not in options)
    state = gathered_state(module.model, trainable_only=True)
    if trainer.is_global_zero:
        save_file({name: value.clone().contiguous() for name, value in state.items()}, folder / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
