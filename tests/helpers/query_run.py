"""One epoch over the toy graph as a script of its own, on one device or several ranks.

    python query_run.py FOLDER

Reads the files in ``FOLDER/graph``. Leaves the weights after the epoch and the ids that were evaluated in
``FOLDER/ranks<N>/<rank>/<queries a pass>_<grouped>.json``.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from tiny_data import quiet_trainer
from torch import Tensor, nn

from malleable.datamodules.batch import QueryBatch
from malleable.datamodules.graphs.datamodule import KnowledgeGraphDataModule
from malleable.datamodules.sources.graphs.triples import Triples
from malleable.lightning_modules.base import BaseModule, LossOutput


class Additive(BaseModule):
    """Scores ``head + relation + tail`` numbers: small, and order-sensitive enough to tell batches apart."""

    def __init__(self, num_entities: int, num_relations: int, optimizer: OptimizerCallable | None = None) -> None:
        super().__init__(optimizer or (lambda groups: torch.optim.SGD(groups, lr=0.3)))
        self.sizes = num_entities, num_relations
        self.entities: nn.Embedding | None = None
        self.evaluated: list[int] = []

    def configure_model(self) -> None:
        if self.entities is None:
            torch.manual_seed(5)
            self.entities = nn.Embedding(self.sizes[0], 4)
            self.relations = nn.Embedding(self.sizes[1], 4)

    def scores(self, batch: QueryBatch) -> Tensor:
        return (self.entities(batch.head) * self.relations(batch.relation)) @ self.entities.weight.T

    def compute_loss(self, batch: QueryBatch) -> LossOutput:
        """The mean over the triples of the step of the softmax loss; rows that fill up count for nothing."""
        real = (batch.sample_id >= 0)[batch.target_row]
        losses = -self.scores(batch).log_softmax(1)[batch.target_row, batch.target]
        count = real.sum() if batch.num_step_tokens is None else batch.num_step_tokens
        return LossOutput((losses * real).sum() / count, {}, int(real.sum()))

    def evaluate(self, batch: QueryBatch, metrics) -> None:
        self.evaluated += batch.sample_id[batch.sample_id >= 0].tolist()


def run(folder: Path, ranks: int, batch_size: int, grouped: bool) -> None:
    """Fit one epoch in steps of 8 queries, then test."""
    source, cache = Triples(str(folder / "graph")), str(folder / "cache")
    data = KnowledgeGraphDataModule(source, group_queries=grouped, cache_dir=cache, batch_size=batch_size, global_batch_size=8)
    data.prepare_data()
    data.setup("test")
    module = Additive(data.num_entities, data.num_relations)
    strategy = "ddp" if ranks > 1 else "auto"
    trainer: Trainer = quiet_trainer(folder, devices=ranks, strategy=strategy, max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    weights = {name: value.tolist() for name, value in module.state_dict().items()}
    content = {"weights": weights, "evaluated": module.evaluated, "steps": trainer.global_step}
    out = folder / f"ranks{ranks}" / str(trainer.global_rank)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{batch_size}_{int(grouped)}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in (4, 2):
        for together in (False, True):
            run(Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1")), size, together)
