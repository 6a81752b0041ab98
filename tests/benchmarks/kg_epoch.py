"""Measure training epochs on a knowledge graph against PyKEEN (TransE, DistMult, ComplEx) and against the loop of the paper's code (NFE).

    OMP_NUM_THREADS=1 python tests/benchmarks/kg_epoch.py [--data codex_s] [--path FOLDER] [--queries N] [--json RESULT.json]

With ``--queries``, the training rows are a random selection of distinct queries ``(h, r)``, including reciprocal ones, with all their tails. Grouping
then reduces the number of rows by the same factor as on the whole graph.

PyKEEN: `LCWATrainingLoop`, which also groups queries. Both sides train on the same rows with binary cross-entropy over all tails of a query, Adam, no
regulariser and no constraint. Our loss is a sum over entities, PyKEEN's is a mean. The benchmark first checks that losses and gradients are equal.

Loop of the paper's code: one row per triple, one matrix product for each term of the formula, a dense mask of signs, and Adam. Our side groups the
rows and takes fewer steps; the sum of the losses of an epoch is the same. The benchmark first checks that scores and losses are equal.

The time of an epoch is measured from the end of the previous epoch to its own end. The first epoch of each run is excluded. The last line is the
smallest ratio of the cases that have a target ratio.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from graph_sides import (
    FLOWS,
    LR,
    POINTS,
    Case,
    begin,
    give_weights,
    literal_kg,
    measure,
    now,
    opened,
    our_model,
    parser_of,
    their_model,
    trainer_settings,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from pykeen.training import LCWATrainingLoop, TrainingCallback
from pykeen.triples import CoreTriplesFactory
from torch import Tensor

from malleable import KnowledgeGraphDataModule, PhasedLoader
from malleable.datamodules.graphs.queries import GroupedQueries, QueryRows
from malleable.datamodules.sources.graphs.base import Ints
from malleable.lightning_modules.losses.embedding import EmbeddingLoss, KvsAll

BARS = {"pykeen": {"codex_s": 3.0, "wn18rr": 3.0}, "loop": {"codex_s": 2.0, "fb15k237": 3.0}}


class EpochTimer(Callback, TrainingCallback):
    """Record the times at which epochs end, in the Trainer of Lightning and in the loop of PyKEEN.

    Args:
        device: Device that must finish before a time is read.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self.ends.append(now(self.device))

    def post_epoch(self, epoch: int, epoch_loss: float, **_: Any) -> None:
        """Note the time."""
        self.ends.append(now(self.device))

    def seconds(self) -> list[float]:
        """Return the seconds of each epoch except the first."""
        return np.diff(self.ends).tolist()


def chosen_queries(data: KnowledgeGraphDataModule, count: int | None) -> Ints:
    """Draw distinct queries at random, all if ``count`` is ``None``; return the triples with these queries, ``(T, 3)``."""
    dataset: GroupedQueries = data.train_dataset
    order = np.random.default_rng(0).permutation(len(dataset))[:count]
    tails, row = dataset.targets.take(order)
    head, relation = np.divmod(dataset.keys[order], data.num_relations)
    return np.column_stack([head[row], relation[row], tails])


class Ours:
    """Our side: `Trainer.fit`, as a user would write it."""

    def __init__(self, name: str, data: KnowledgeGraphDataModule, queries: Ints, options: Namespace, loss: EmbeddingLoss | None) -> None:
        ids = np.arange(len(queries))
        alone = options.per_triple and name in FLOWS
        self.rows = QueryRows(queries, ids) if alone else GroupedQueries(queries, ids, data.num_relations)
        self.options = options
        self.make = lambda: our_model(name, data, options.dimension, loss)

    def __call__(self) -> list[float]:
        """Train; return seconds an epoch."""
        timer = EpochTimer(self.options.device)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                max_epochs=1 + self.options.epochs,
                **trainer_settings(self.options),
                callbacks=[timer],
                logger=CSVLogger(folder),
                log_every_n_steps=10,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(self.make(), PhasedLoader(self.rows, self.options.batch, drop_last=False, row_tokens=self.rows.row_tokens()))
        return timer.seconds()


class PyKEEN:
    """The side of PyKEEN: `LCWATrainingLoop.train`. The relations of the data already include the reciprocal ones."""

    def __init__(self, name: str, data: KnowledgeGraphDataModule, queries: Ints, options: Namespace) -> None:
        triples = torch.from_numpy(queries.astype(np.int64))
        self.factory = CoreTriplesFactory(triples, num_entities=data.num_entities, num_relations=data.num_relations)
        self.options = options
        self.make = lambda: their_model(name, self.factory, options.dimension)

    def __call__(self) -> list[float]:
        """Train; return seconds an epoch."""
        model, timer = self.make().to(self.options.device), EpochTimer(self.options.device)
        optimizer = torch.optim.Adam(model.get_grad_params(), lr=LR)
        loop = LCWATrainingLoop(model=model, triples_factory=self.factory, optimizer=optimizer, automatic_memory_optimization=False)
        settings: Any = {"batch_size": self.options.batch, "num_workers": 0, "pin_memory": False, "use_tqdm": False, "callbacks": timer}
        loop.train(self.factory, num_epochs=1 + self.options.epochs, **settings)
        return timer.seconds()

    def check(self, ours: Ours) -> None:
        """Compare loss and gradients of one batch under the same weights.

        Raises:
            SystemExit: If they differ.
        """
        module, model = ours.make(), self.make()
        give_weights(module, model, torch.arange(len(module.tables[1].weight)))
        batch = ours.rows.make_batch(torch.arange(32))
        labels = torch.zeros(32, len(module.tables[0].weight))
        labels[batch.target_row, batch.target] = 1
        module.compute_loss(batch).loss.backward()
        predictions = model.score_t(torch.stack([batch.head, batch.relation], 1))
        loss = model.loss.process_lcwa_scores(predictions=predictions, labels=labels) * labels.shape[1]
        loss.backward()
        own, theirs = module.tables[0].weight.grad, model.entity_representations[0]._embeddings.weight.grad
        if module.interaction.complex_parts:
            own = torch.stack(own.chunk(2, 1), -1).flatten(1)
        close(module.compute_loss(batch).loss, loss, "loss")
        close(own, theirs, "gradients")


class Loop:
    """The training loop of the paper's code, with the scores of ``tests/helpers/literal_kg.py``."""

    def __init__(self, name: str, data: KnowledgeGraphDataModule, queries: Ints, options: Namespace) -> None:
        self.kind = FLOWS[name][1]
        self.queries = queries
        self.options = options
        self.make = lambda: our_model(name, data, options.dimension)

    def __call__(self) -> list[float]:
        """Train; return seconds an epoch."""
        device = self.options.device
        tables = [torch.nn.Parameter(table.weight.detach().to(device)) for table in self.make().tables]
        optimizer = torch.optim.Adam(tables, lr=LR)
        rng, ends = np.random.default_rng(0), []
        for _ in range(1 + self.options.epochs):
            order = rng.permutation(len(self.queries))
            for start in range(0, len(order), self.options.batch):
                optimizer.zero_grad()
                loss = self.loss(tables, torch.from_numpy(self.queries[order[start : start + self.options.batch]]).to(device))
                loss.backward()
                optimizer.step()
                loss.item()
            ends.append(now(device))
        return np.diff(ends).tolist()

    def loss(self, tables: list[torch.nn.Parameter], triples: Tensor) -> Tensor:
        """Compute the loss of a batch of triples, ``(B, 3)``."""
        entity, relation = tables
        head, kind, target = triples.long().T
        return literal_kg.masked_loss(1.0 + literal_kg.products(self.kind, entity[head], relation[kind], entity), target)

    def check(self, ours: Ours) -> None:
        """Compare loss and gradients of some queries under the same weights.

        Raises:
            SystemExit: If they differ.
        """
        module = ours.make()
        batch = ours.rows.make_batch(torch.arange(32))
        output = module.compute_loss(batch)
        output.loss.backward()
        tables = [torch.nn.Parameter(table.weight.detach()) for table in module.tables]
        loss = self.loss(tables, torch.stack([batch.head[batch.target_row], batch.relation[batch.target_row], batch.target], 1))
        loss.backward()
        close(output.loss, loss, "loss")
        close(module.tables[0].weight.grad, tables[0].grad, "gradients")


def close(ours: Tensor | None, theirs: Tensor | None, what: str) -> None:
    """Check that two tensors are equal up to rounding.

    Raises:
        SystemExit: If they differ.
    """
    assert ours is not None
    assert theirs is not None
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if error > 1e-4:
        raise SystemExit(f"the two sides are not equal: the relative difference of the {what} is {error:.1e}, at most 1e-4 is allowed")


def main() -> None:
    """Measure the given models."""
    parser = parser_of(__doc__, "kg_epoch")
    parser.add_argument("--queries", type=int, help="number of distinct training queries, drawn at random with all their tails; default: all")
    parser.add_argument("--epochs", type=int, default=1, help="number of measured epochs in each repetition")
    parser.add_argument("--per_triple", action="store_true", help="NFE: our side also uses one row for each triple; without a target ratio")
    options = parser.parse_args()
    begin(options)
    data = opened(options, group_queries=True)
    queries = chosen_queries(data, options.queries)
    cases = []
    for name in options.models:
        peer = PyKEEN(name, data, queries, options) if name in POINTS else Loop(name, data, queries, options)
        kind = "pykeen" if name in POINTS else "loop"
        ours = Ours(name, data, queries, options, KvsAll() if name in POINTS else None)
        peer.check(ours)
        bar = None if options.per_triple and name in FLOWS else BARS[kind].get(options.data)
        notes = {"rows": f"{len(ours.rows):,}", "tails": f"{len(queries):,}", "entities": f"{data.num_entities:,}"}
        cases.append(Case(name, kind, bar, ours, peer, notes))
    measure(cases, options)


if __name__ == "__main__":
    main()
