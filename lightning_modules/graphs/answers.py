"""Queries to a knowledge-graph embedding by label: scores of triples, best tails, heads and relations, relation patterns, export."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch import Tensor, nn

from malleable.datamodules.batch import WILDCARD, KnowledgeGraph, QueryBatch, Recommendations
from malleable.datamodules.files.atomic import atomic_write
from malleable.lightning_modules.functional.graphs.interaction import Interaction, Map, Vectors, score_all, score_pairs
from malleable.lightning_modules.functional.graphs.relation_patterns import Moments, composition, inverse, self_inverse
from malleable.lightning_modules.functional.precision import full, full_precision

Name = str | int

ROWS = 1 << 14  # number of table rows processed at once, which bounds memory


class Answer(NamedTuple):
    """An answer to a query.

    Attributes:
        label: Label of the entity or relation.
        id: Number of the entity or relation.
        score: Score of the triple; with the default loss an uncalibrated logit.
        uncertainty: Mean standard deviation of the entity; ``None`` for point embeddings and relations.
    """

    label: str
    id: int
    score: float
    uncertainty: float | None = None


class Pattern(NamedTuple):
    """A pattern among relations.

    Attributes:
        kind: ``symmetric`` (r), ``inverse`` (r, r') or ``composed`` (first relation, second relation, composition).
        relations: Labels of the relations.
        difference: Difference from the exact pattern, see :mod:`~malleable.lightning_modules.functional.graphs.relation_patterns`.
    """

    kind: str
    relations: tuple[str, ...]
    difference: float


class GraphAnswers(ABC):
    """Mixin that answers queries to a knowledge-graph embedding; entities and relations are given by label or number."""

    query_fields: ClassVar[tuple[str, ...]] = ("head", "relation", "tail")
    answer_fields: ClassVar[tuple[str, ...]] = ("answer", "score", "uncertainty")
    interaction: Interaction
    graph: KnowledgeGraph | None
    gamma: float | nn.Parameter
    _lookup_of: KnowledgeGraph | None = None
    _lookup: Sequence[dict[str, int]] = ()

    @property
    @abstractmethod
    def tables(self) -> tuple[nn.Embedding, nn.Embedding]:
        """Tables of entities and relations."""

    @abstractmethod
    def query(self, head: Tensor, relation: Tensor) -> Vectors:
        """Return the vectors and biases of queries ``(h, r, ?)``, given by ids ``(B,)``."""

    @abstractmethod
    def key(self, entity: Tensor | None = None) -> Vectors:
        """Return the vectors and biases of entities, given by ids ``(N,)``, or of all entities."""

    @full_precision
    @torch.no_grad()
    def score(self, triples: Sequence[tuple[Name, Name, Name]]) -> Tensor:
        """Score N triples ``(h, r, t)``; return ``(N,)``."""
        heads, relations, tails = (self._ids(column, place == 1) for place, column in enumerate(zip(*triples, strict=True)))
        return score_pairs(self.query(heads, relations), self.key(tails))

    def predict_tails(self, head: Name, relation: Name, k: int = 10, exclude: Sequence[tuple[Name, Name, Name]] = ()) -> list[Answer]:
        """Find the k best tails of ``(head, relation, ?)``.

        Args:
            head: Entity.
            relation: Relation.
            k: Number of answers.
            exclude: Known triples ``(h, r, t)``; their tails are not returned if head and relation are those of the query.
        """
        heads, relations = self._ids([head]), self._ids([relation], True)
        triples = [self._triple(triple) for triple in exclude]
        return self._best(heads, relations, k, [t for h, r, t in triples if h == heads.item() and r == relations.item()])

    def predict_heads(self, relation: Name, tail: Name, k: int = 10, exclude: Sequence[tuple[Name, Name, Name]] = ()) -> list[Answer]:
        """Find the k best heads of ``(?, relation, tail)``, as the query ``(tail, relation + R, ?)``.

        Args:
            relation: Relation.
            tail: Entity.
            k: Number of answers.
            exclude: Known triples ``(h, r, t)``; their heads are not returned if relation and tail are those of the query.
        """
        tails, relations = self._ids([tail]), self._ids([relation], True)
        triples = [self._triple(triple) for triple in exclude]
        known = [h for h, r, t in triples if t == tails.item() and r == relations.item()]
        return self._best(tails, relations + len(self._labels().relations), k, known)

    @torch.no_grad()
    def predict_relations(self, head: Name, tail: Name, k: int = 10) -> list[Answer]:
        """Find the k best relations of ``(head, ?, tail)``, without reciprocals.

        Args:
            head: Entity.
            tail: Entity.
            k: Number of answers.
        """
        labels = self._labels().relations
        best = self.score_relations(self._ids([head]), self._ids([tail]))[0].topk(min(k, len(labels)))
        return [Answer(labels[number], number, score) for score, number in zip(*(part.tolist() for part in best), strict=True)]

    @full_precision
    @torch.no_grad()
    def score_relations(self, head: Tensor, tail: Tensor) -> Tensor:
        """Score all relations, without reciprocals, for pairs of entities ``(B,)``; return ``(B, R)``."""
        relations = torch.arange(len(self._labels().relations), device=head.device)
        # One pair at a time, because each pair needs R query rows.
        found = [score_all(self.query(h.expand(len(relations)), relations), self.key(t[None]))[:, 0] for h, t in zip(head, tail, strict=True)]
        return torch.stack(found)

    @torch.no_grad()
    def describe(self, batch: QueryBatch, found: Recommendations) -> Iterator[tuple[Sequence[str], Sequence[tuple[str, float, float | None]]]]:
        """Return an iterator over the queries of a batch, with labels instead of ids.

        Args:
            batch: Queries.
            found: Answers of ``predict_step`` to these queries.

        Yields:
            A pair for each query: the labels ``(head, relation, tail)``, with ``?`` for the unknown one, and a list with
            ``(label, score, uncertainty)`` of each answer, best first.
        """
        labels = self._labels()
        tails = [-1] * len(batch) if batch.tail is None else batch.tail.tolist()
        columns = (part.tolist() for part in (batch.head, batch.relation, *found))
        for head, relation, ids, scores, tail in zip(*columns, tails, strict=True):
            real = [number for number in ids if number >= 0]
            if relation < 0:
                answers = [(labels.relations[number], score, None) for number, score in zip(real, scores, strict=False)]
                yield (labels.entities[head], WILDCARD, labels.entities[tail]), answers
                continue
            place, reciprocal = relation % len(labels.relations), relation >= len(labels.relations)
            query = labels.entities[head], labels.relations[place], WILDCARD
            named = [(answer.label, answer.score, answer.uncertainty) for answer in self._answers(real, scores)]
            yield query[::-1] if reciprocal else query, named

    @torch.no_grad()
    def uncertainty(self) -> Tensor:
        """Compute the mean standard deviation of each entity over its coordinates, ``(E,)``.

        Raises:
            ValueError: If entities are points.
        """
        found = []
        for rows in torch.split(self.tables[0].weight, ROWS):
            deviation = self.interaction.deviation(full(rows))
            if deviation is None:
                raise ValueError(
                    f"entities of {type(self.interaction).__name__} are points without uncertainty; use NFE with kind nfe1, nfe2, nfe3 or sigma"
                )
            found.append(deviation.mean(1))
        return torch.cat(found)

    @full_precision
    @torch.no_grad()
    def relation_patterns(self, k: int = 20, among: Sequence[Name] | None = None) -> list[Pattern]:
        """Find symmetric, inverse and composed relations.

        Args:
            k: Number of patterns of each kind to return, in order of increasing difference.
            among: Relations to compare; default: all. Time grows with the third power of their number.
        """
        chosen = self._ids(self._labels().relations if among is None else among, True)
        labels = [self._labels().relations[number] for number in chosen.tolist()]
        entity, relation = (full(table.weight) for table in self.tables)
        places = self.interaction.location(entity)
        places = self.interaction.deviation(entity) if places is None else places
        assert places is not None
        moments = Moments.of(places)
        flow = Map(*(part.to(moments.mean.dtype) for part in self.interaction.flow(relation[chosen])))
        one_sided = inverse(flow, moments)
        # Both compositions of an inverse pair must be the identity. Pairs (i, i) are symmetric relations.
        both = torch.maximum(one_sided, one_sided.T).masked_fill(torch.ones_like(one_sided, dtype=torch.bool).tril(), torch.inf)
        composed, third = composition(flow, moments)
        patterns = [Pattern("symmetric", (labels[i],), value) for (i,), value in _smallest(self_inverse(flow, moments), k)]
        patterns += [Pattern("inverse", (labels[i], labels[j]), value) for (i, j), value in _smallest(both, k)]
        patterns += [Pattern("composed", (labels[i], labels[j], labels[int(third[i, j])]), value) for (i, j), value in _smallest(composed, k)]
        return patterns

    def export(self, folder: str | Path) -> Path:
        """Write ``embeddings.safetensors`` (one tensor for each part: ``entity.mu``, ``relation.a``, ...) and ``labels.json``.

        Relations have 2R rows, reciprocals last. An existing folder is replaced atomically.
        """
        folder = Path(folder)
        if getattr(self, "global_rank", 0):
            return folder
        kinds = ("entity", self.tables[0], self.interaction.entity_parts), ("relation", self.tables[1], self.interaction.relation_parts)
        parts = {
            f"{kind}.{name}": part.detach().cpu().contiguous()
            for kind, table, names in kinds
            for name, part in zip(names, table.weight.chunk(len(names), 1), strict=True)
        }
        gamma = self.gamma.item() if isinstance(self.gamma, Tensor) else self.gamma
        settings = {"class": type(self).__name__, "interaction": repr(self.interaction), "gamma": str(gamma)}
        labels = {"entities": self._labels().entities, "relations": self._labels().relations}
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            save_file(parts, temporary / "embeddings.safetensors", metadata=settings)
            (temporary / "labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
        return folder

    def _labels(self) -> KnowledgeGraph:
        if self.graph is None:
            name = type(self).__name__
            raise MisconfigurationException(f"{name} has no labels yet: pass graph=... and call configure_model(), or load a checkpoint")
        return self.graph

    def _ids(self, names: Sequence[Name], relation: bool = False) -> Tensor:
        """Return the numbers of entities or relations, which are given by label or number.

        Raises:
            ValueError: If a name is not in the graph.
        """
        kind = "relation" if relation else "entity"
        labels = self._labels().relations if relation else self._labels().entities
        if self._lookup_of is not self.graph:
            self._lookup_of = self.graph
            self._lookup = [{label: number for number, label in enumerate(each)} for each in (self._labels().entities, self._labels().relations)]
        lookup = self._lookup[relation]
        ids = [lookup.get(name, -1) if isinstance(name, str) else name for name in names]
        for name, number in zip(names, ids, strict=True):
            if not 0 <= number < len(labels):
                near = get_close_matches(name, labels, n=3) if isinstance(name, str) else []
                hint = f"; did you mean {', '.join(map(repr, near))}?" if near else f"; numbers run from 0 to {len(labels) - 1}"
                raise ValueError(f"the graph has no {kind} {name!r}{hint}")
        return torch.tensor(ids, device=self.tables[0].weight.device)

    def _triple(self, triple: tuple[Name, Name, Name]) -> tuple[int, int, int]:
        head, relation, tail = (int(self._ids([name], place == 1)) for place, name in enumerate(triple))
        return head, relation, tail

    @torch.no_grad()
    def _best(self, head: Tensor, relation: Tensor, k: int, known: Sequence[int]) -> list[Answer]:
        scores = score_all(self.query(head, relation), self.key())[0]
        scores[list(known)] = -torch.inf
        best = scores.topk(min(k, len(scores) - len(set(known))))
        return self._answers(best.indices.tolist(), best.values.tolist())

    def _answers(self, entities: Sequence[int], scores: Sequence[float]) -> list[Answer]:
        """Return answers for entities; ``scores`` may have more entries than ``entities``."""
        rows = self.tables[0](torch.tensor(entities, dtype=torch.long, device=self.tables[0].weight.device))
        deviation = self.interaction.deviation(full(rows))
        spread = [None] * len(entities) if deviation is None else deviation.mean(1).tolist()
        labels = self._labels().entities
        return [Answer(labels[number], number, score, own) for number, score, own in zip(entities, scores, spread, strict=False)]


def _smallest(values: Tensor, k: int) -> list[tuple[tuple[int, ...], float]]:
    """Return the indices and values of the k smallest finite entries."""
    best = values.flatten().topk(min(k, values.numel()), largest=False)
    places = zip(*(part.tolist() for part in torch.unravel_index(best.indices, values.shape)), strict=True)
    return [(place, value) for place, value in zip(places, best.values.tolist(), strict=True) if value < torch.inf]
