"""Training, test and prediction of sequence models as a script of its own, on one device or several ranks.

    python sequence_run.py FOLDER

Leaves the weights in ``FOLDER/ranks<N>/<kind>.safetensors``, the figures of a test in ``<kind>.json``, and predictions in ``<kind>/predictions.csv``.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from safetensors.torch import save_file
from tiny_data import quiet_trainer
from toy_sequences import ToySequences, packed_row, training_rows

from malleable import GBCE, EncoderSettings, PredictionWriter, SequentialRecommender, Uniform, VectorWriter


def main(root: Path) -> None:
    """Run as the module's docstring says."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    folder = root / f"ranks{ranks}"
    rows = [packed_row(training_rows(48)[start : start + 2]) for start in range(0, 48, 2)]
    for kind in ("sasrec", "bert4rec", "hstu", "gru4rec"):
        seed_everything(0)
        options = {"loss": GBCE(), "negatives": Uniform(4)} if kind == "sasrec" else {}
        encoder = EncoderSettings(kind, dim=8, num_layers=1, max_length=12, dropout=0.0, mask_rate=0.4)
        module = SequentialRecommender(encoder, ks=(1, 3), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), **options)
        data = ToySequences(train=rows, batch_size=4 // ranks, global_batch_size=4)
        data.row_tokens = lambda: [len(row["items"]) - 2 for row in rows]
        callbacks = [PredictionWriter(str(folder / kind), formats=("csv",)), VectorWriter(str(folder / kind))]
        settings = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, "strategy": "ddp" if ranks > 1 else "auto", "devices": ranks}
        trainer = quiet_trainer(folder, callbacks=callbacks, **settings)
        trainer.fit(module, data)
        assert trainer.global_step == 12
        (figures,) = trainer.test(module, data, verbose=False)
        trainer.predict(module, data, return_predictions=False)
        if trainer.is_global_zero:
            save_file({key: value.detach().clone() for key, value in module.named_parameters()}, folder / f"{kind}.safetensors")
            (folder / f"{kind}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
