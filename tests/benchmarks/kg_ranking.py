"""Measure filtered ranking of a test split against PyKEEN (TransE, DistMult, ComplEx) and against the loop of the paper's code (NFE).

    OMP_NUM_THREADS=1 python tests/benchmarks/kg_ranking.py [--data codex_s] [--path FOLDER] [--triples N] [--json RESULT.json]

Both directions are ranked.

PyKEEN: `RankBasedEvaluator.evaluate` with mean rank, mean reciprocal rank and hits at 1, 3 and 10, on a model with inverse triples that has our
weights. The weights are multiples of 1/8, so every score is exact in any order of summation, and there are ties. The benchmark checks that the ranks
of every query are identical under all three policies for ties. The time is that of the realistic policy, which PyKEEN uses.

Loop of the paper's code: scores are computed with one matrix product for each term of the formula and copied to NumPy. For each query, the scores of
known answers are set to -1e8, and the rank is the number of entities whose score is at least that of the answer. The benchmark checks that the loop
gives our ranks from our scores, and from its own scores in double precision. In single precision the scores of both sides are rounded differently,
and an untrained model has many nearly equal scores.

Our side is `Trainer.test`. The preparation of the filter is timed only for PyKEEN, which collects the known answers in each call. Our data module
indexes them when the data is opened, and the loop reads them from a dictionary. The comparison with the loop has no target ratio: for NFE-1,
both sides need the same number of multiplications (in one matrix product or two), which take most of the time. The last line is the smallest ratio of
the cases that have a target ratio.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import torch
from graph_sides import (
    FLOWS,
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
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from pykeen.evaluation import RankBasedEvaluator
from pykeen.triples import CoreTriplesFactory
from torch import Tensor

from malleable import KnowledgeGraphDataModule, PhasedLoader
from malleable.datamodules.graphs.queries import QueryRows
from malleable.datamodules.sources.graphs.base import Ints
from malleable.lightning_modules.functional.graphs.interaction import score_all
from malleable.lightning_modules.graphs.knowledge_graph import KnowledgeGraphModule
from malleable.lightning_modules.metrics.link_prediction import QueryEntities, filtered_ranks
from malleable.lightning_modules.metrics.ranking import Ties

BARS: dict[str, dict[str, float]] = {"pykeen": {"codex_s": 3.0, "wn18rr": 3.0}, "loop": {}}
POLICIES: tuple[Ties, ...] = ("optimistic", "realistic", "pessimistic")


class Ours:
    """Our side: `Trainer.test`, as a user would write it."""

    def __init__(self, name: str, data: KnowledgeGraphDataModule, queries: Ints, options: Namespace) -> None:
        self.module = our_model(name, data, options.dimension).eval()
        self.module.ranking.ties = "realistic" if name in POINTS else "pessimistic"
        self.rows = QueryRows(queries, np.arange(len(queries)), data.answers)
        self.batch = options.batch
        self.options = options

    def loader(self) -> PhasedLoader[Any]:
        """Return a loader of the queries in their order."""
        return PhasedLoader(self.rows, self.batch, shuffle=False, drop_last=False)

    def __call__(self) -> list[float]:
        """Run the test, and return its seconds as the only element of a list."""
        start = now(self.options.device)
        off: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        (self.figures,) = Trainer(**trainer_settings(self.options), **off).test(self.module, self.loader(), verbose=False)
        seconds = now(self.options.device) - start
        self.module.cpu()
        return [seconds]

    @torch.no_grad()
    def ranks(self, ties: Ties) -> Tensor:
        """Return the ranks of the true tails of all queries, ``(Q,)``."""
        return torch.cat([filtered_ranks(self.scores(batch), *self.tails(batch), ties) for batch in self.loader()])

    def scores(self, batch: Any) -> Tensor:
        """Return the scores of all entities, ``(B, E)``."""
        return score_all(self.module.query(batch.head, batch.relation), self.module.key())

    def tails(self, batch: Any) -> tuple[QueryEntities, QueryEntities]:
        """Return the true tails and the known tails of a batch."""
        return QueryEntities(batch.target, batch.target_row), QueryEntities(batch.known, batch.known_row)


class PyKEEN:
    """The side of PyKEEN: `RankBasedEvaluator.evaluate` on a model with our weights."""

    def __init__(self, name: str, data: KnowledgeGraphDataModule, queries: Ints, options: Namespace, module: KnowledgeGraphModule) -> None:
        datasets = data.train_dataset, data.val_dataset, data.test_dataset
        self.filters = [torch.from_numpy(dataset.queries[::2].astype(np.int64)) for dataset in datasets]
        self.triples = torch.from_numpy(queries[::2].astype(np.int64))
        relations = data.num_relations // 2
        factory = CoreTriplesFactory(self.filters[0], num_entities=data.num_entities, num_relations=relations, create_inverse_triples=True)
        self.model = their_model(name, factory, options.dimension).eval()
        # In PyKEEN, the inverse of a relation follows the relation. In our table, all reciprocal relations follow all relations.
        give_weights(module, self.model, torch.arange(data.num_relations).reshape(2, relations).T.flatten())
        self.batch = options.batch
        self.device = options.device

    def evaluated(self) -> tuple[Any, RankBasedEvaluator]:
        """Evaluate, and return the result and the evaluator, which contains the ranks."""
        hits: list[Any] = [{}, {}, *({"k": k} for k in (1, 3, 10))]
        names = ["mr", "mrr", *["hits@k"] * 3]
        evaluator = RankBasedEvaluator(metrics=names, metrics_kwargs=hits, add_defaults=False, clear_on_finalize=False)
        result = evaluator.evaluate(
            self.model,
            self.triples,
            batch_size=self.batch,
            use_tqdm=False,
            additional_filter_triples=self.filters,
            device=torch.device(self.device),
        )
        return result, evaluator

    def __call__(self) -> list[float]:
        """Evaluate; return seconds."""
        start = now(self.device)
        self.evaluated()
        return [now(self.device) - start]

    def check(self, ours: Ours) -> str:
        """Check that ranks and mean reciprocal ranks of both sides are equal.

        Raises:
            SystemExit: If they differ.
        """
        result, evaluator = self.evaluated()
        for ties in POLICIES:
            theirs = torch.stack([torch.from_numpy(np.concatenate(evaluator.ranks[side, ties])) for side in ("tail", "head")], 1).flatten()
            if different := int((ours.ranks(ties) != theirs).sum()):
                raise SystemExit(f"{different} of {len(theirs)} ranks differ from those of PyKEEN under the policy {ties}")
        ours()
        own, mrr = ours.figures["test_mrr"], result.get_metric("both.realistic.inverse_harmonic_mean_rank")
        if abs(own - mrr) > 1e-6:
            raise SystemExit(f"the mean reciprocal ranks differ: ours is {own}, that of PyKEEN is {mrr}")
        return "all equal under three policies"


class Loop:
    """The evaluation of the paper's code, with the scores of ``tests/helpers/literal_kg.py``."""

    def __init__(self, name: str, data: KnowledgeGraphDataModule, queries: Ints, options: Namespace, module: KnowledgeGraphModule) -> None:
        self.kind = FLOWS[name][1]
        self.tables = [table.weight.detach() for table in module.tables]
        self.queries = queries
        self.batch = options.batch
        self.device = options.device
        place = data.answers.find(queries[:, 0], queries[:, 1])
        self.known = [data.answers.tails.take(place[row : row + 1])[0] for row in range(len(queries))]

    def __call__(self) -> list[float]:
        """Evaluate; return seconds."""
        start = now(self.device)
        ranks = self.ranks()
        self.figures = {"mr": ranks.mean(), "mrr": (1 / ranks).mean(), **{f"hits_{k}": (ranks <= k).mean() for k in (1, 3, 10)}}
        return [now(self.device) - start]

    @torch.no_grad()
    def ranks(self) -> NDArray[np.float64]:
        """Return the ranks of all queries, computed from the scores of the loop."""
        entity, relation = (table.to(self.device) for table in self.tables)
        ranks: list[int] = []
        for start in range(0, len(self.queries), self.batch):
            head, kind, _ = torch.from_numpy(self.queries[start : start + self.batch].astype(np.int64)).to(self.device).T
            ranks += self.ranks_of(literal_kg.products(self.kind, entity[head], relation[kind], entity), start)
        return np.array(ranks, dtype=np.float64)

    def ranks_of(self, scores: Tensor, start: int) -> list[int]:
        """Return the ranks of a batch of queries, one at a time, from its scores ``(B, E)``. The first query of the batch has the index ``start``."""
        ranks = []
        for number, row in enumerate(scores.cpu().numpy(), start):
            own = row[self.queries[number, 2]]
            row[self.known[number]] = -1e8
            ranks.append(int((row >= own).sum()) + 1)
        return ranks

    @torch.no_grad()
    def check(self, ours: Ours) -> str:
        """Check that the loop gives our ranks from our scores, and from its own scores in double precision.

        Raises:
            SystemExit: If they differ.
        """
        same = [rank for number, batch in enumerate(ours.loader()) for rank in self.ranks_of(ours.scores(batch), number * self.batch)]
        different = int((ours.ranks("pessimistic").numpy() != same).sum())
        single, self.tables = self.tables, [table.double() for table in self.tables]
        ours.module.double()
        own = int((ours.ranks("pessimistic").numpy() != self.ranks()).sum())
        self.tables = single
        ours.module.float()
        if different or own:
            raise SystemExit(
                f"{different} of {len(same)} ranks from our scores differ, and {own} ranks from the loop's own scores in double precision"
            )
        return "all equal"


def main() -> None:
    """Measure the given models."""
    parser = parser_of(__doc__, "kg_ranking")
    parser.add_argument("--triples", type=int, help="number of test triples, drawn at random; default: all")
    options = parser.parse_args()
    begin(options)
    data = opened(options, group_queries=False)
    pairs = data.test_dataset.queries.reshape(-1, 2, 3)
    queries = pairs[np.random.default_rng(0).permutation(len(pairs))[: options.triples]].reshape(-1, 3)
    cases = []
    for name in options.models:
        ours = Ours(name, data, queries, options)
        if name in POINTS:
            for table in ours.module.tables:
                torch.nn.init.uniform_(table.weight, -8, 8).data.round_().div_(8)
        kind = "pykeen" if name in POINTS else "loop"
        peer = (PyKEEN if name in POINTS else Loop)(name, data, queries, options, ours.module)
        equality = peer.check(ours)
        notes = {"queries": f"{len(queries):,}", "entities": f"{data.num_entities:,}", "ranks": equality}
        cases.append(Case(name, kind, BARS[kind].get(options.data), ours, peer, notes))
    measure(cases, options)


if __name__ == "__main__":
    main()
