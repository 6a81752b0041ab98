"""Tables of facts, made into requests to edit them and sentences that tell them.

A table of facts becomes requests as CounterFact was made: another object of the relation is the new answer, other templates are the paraphrases,
and subjects with the same true object are the neighbours.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest, Probe
from malleable.datamodules.sources.editing.base import EditSource, EditTables


class Relation(NamedTuple):
    """Facts of one kind.

    Attributes:
        name: Of the relation.
        templates: Templates of the statements: each holds ``{}`` for the subject and ends where the object follows. The first asks what is edited.
    """

    name: str
    templates: tuple[str, ...]


class Fact(NamedTuple):
    """A subject and what is true of it.

    Attributes:
        relation: Number of the relation.
        subject: What the fact is about.
        object: What is true.
    """

    relation: int
    subject: str
    object: str


@dataclass(frozen=True)
class FactTables:
    """Facts, each subject of a relation once.

    Attributes:
        relations: The relations.
        facts: The facts.
    """

    relations: list[Relation]
    facts: list[Fact]


class FactSource(EditSource):
    """A table of facts, made into requests.

    A fact is asked in its relation's first template and in ``paraphrases`` others. Facts whose object can be read off the subject, or the other
    way round, are left out, and so are relations with fewer than two objects. A question to a neighbour is about a fact that no request changes,
    of the same true object if there are enough, else of another one than the new answer.

    Args:
        path: File or folder of the facts; default: the one that lies in this package, where there is one.
        relations: Names of those to take; default: all.
        limit: Edit so many facts, drawn at random; default: all, which leaves nothing for neighbours.
        paraphrases: Other templates that ask for an edited fact.
        neighbors: Questions about other subjects, at most.
        hold_out: Leave one template of each fact, not the first, out of the sentences that tell it, and ask for it as the paraphrase.
        generate: Beginnings for texts about the subject, with sentences that the new answer should make them resemble.
        seed: Seed of everything drawn.

    Raises:
        ValueError: If a value is out of range or a relation unknown, or there is no path and none in this package.
    """

    packaged: ClassVar[Path | None] = None
    """Where the facts lie in this package."""

    def __init__(
        self,
        path: str | None = None,
        relations: list[str] | None = None,
        limit: int | None = None,
        paraphrases: int = 2,
        neighbors: int = 5,
        hold_out: bool = False,
        generate: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("limit", limit, 1), ("paraphrases", paraphrases, 0), ("neighbors", neighbors, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        located = self.packaged if path is None else Path(path).expanduser()
        if located is None:
            raise ValueError(f"{type(self).__name__} needs path=..., the file or folder of its facts: none lies in this package")
        self.path = located
        self.relations = relations
        self.limit = limit
        self.paraphrases = paraphrases
        self.neighbors = neighbors
        self.hold_out = hold_out
        self.generate = generate
        self.seed = seed

    @abstractmethod
    def tables(self) -> FactTables:
        """Read the facts."""

    def load(self) -> EditTables:
        """Draw the facts to edit, and make requests with paraphrases and neighbours."""
        tables = self._chosen(self.tables())
        drawing = random.Random(self.seed)
        order = list(range(len(tables.facts)))
        drawing.shuffle(order)
        edited = order[: self.limit]
        chosen = set(edited)
        held_out = {number: self._held_out_template(tables, number) for number in order} if self.hold_out else {}
        statements = {number: _sentences(tables, number, held_out.get(number)) for number in range(len(tables.facts))}
        builder = _RequestBuilder(tables, chosen, statements, self, held_out)
        requests = [builder.request(number) for number in edited]
        return EditTables(
            requests,
            [sentence for sentences in statements.values() for sentence in sentences],
            [sentence for number, sentences in statements.items() if number not in chosen for sentence in sentences],
        )

    def _chosen(self, tables: FactTables) -> FactTables:
        names = [relation.name for relation in tables.relations]
        wanted = self.relations if self.relations is not None else names
        if unknown := sorted(set(wanted) - set(names)):
            raise ValueError(f"{type(self).__name__} has no relation {', '.join(unknown)}; it has {', '.join(names)}")
        facts = [fact for fact in tables.facts if names[fact.relation] in wanted and not _given_away(fact)]
        objects = defaultdict(set)
        for fact in facts:
            objects[fact.relation].add(fact.object)
        facts = [fact for fact in facts if len(objects[fact.relation]) > 1]
        if not facts:
            raise ValueError(f"{type(self).__name__}: no facts of {', '.join(wanted)} are left of {self.path}; each relation needs two objects")
        if self.limit is not None and self.limit > len(facts):
            raise ValueError(f"limit={self.limit}, but {type(self).__name__} has only {len(facts)} facts of {', '.join(wanted)}")
        return FactTables(tables.relations, facts)

    def _held_out_template(self, tables: FactTables, number: int) -> int | None:
        """Choose the template that is held out as the paraphrase; ``None`` with fewer than three templates."""
        fact = tables.facts[number]
        count = len(tables.relations[fact.relation].templates)
        if count < 3:
            return None
        return 1 + random.Random(f"{self.seed} {fact.relation} {fact.subject}").randrange(count - 1)


class _RequestBuilder:
    """Builds requests from a table of facts."""

    def __init__(
        self, tables: FactTables, edited: set[int], statements: dict[int, list[str]], source: FactSource, held_out: dict[int, int | None]
    ) -> None:
        self.tables, self.edited, self.statements, self.source, self.held_out = tables, edited, statements, source, held_out
        self.objects: dict[int, list[str]] = defaultdict(list)
        self.alike: dict[tuple[int, str], list[int]] = defaultdict(list)
        self.related: dict[int, list[int]] = defaultdict(list)
        for number, fact in enumerate(tables.facts):
            if fact.object not in self.objects[fact.relation]:
                self.objects[fact.relation].append(fact.object)
            if number not in edited:
                self.alike[fact.relation, fact.object].append(number)
                self.related[fact.relation].append(number)

    def request(self, number: int) -> EditRequest:
        """Make the request of a fact."""
        fact = self.tables.facts[number]
        relation = self.tables.relations[fact.relation]
        drawing = random.Random(f"{self.source.seed} {relation.name} {fact.subject}")
        target = drawing.choice([one for one in self.objects[fact.relation] if one != fact.object])
        held = self.held_out.get(number)
        others = [relation.templates[held]] if held is not None else list(relation.templates[1:])
        drawing.shuffle(others)
        alike = self._some(drawing, self.alike[fact.relation, fact.object], self.source.neighbors)
        rest = [one for one in self.related[fact.relation] if self.tables.facts[one].object not in (fact.object, target)]
        neighbors = alike + self._some(drawing, rest, self.source.neighbors - len(alike))
        texts: dict[str, tuple[str, ...]] = {}
        if self.source.generate:
            about = [one for one in self.alike[fact.relation, target] if one != number]
            references = [sentence for one in self._some(drawing, about, 5) for sentence in self.statements[one]]
            texts = {"generation_prompts": (_put(relation.templates[0], fact.subject),), "references": tuple(references)}
        return EditRequest(
            request_id=f"{relation.name}/{fact.subject}",
            prompt=relation.templates[0],
            subject=fact.subject,
            target=target,
            true=fact.object,
            paraphrases=tuple(_put(template, fact.subject) for template in others[: self.source.paraphrases]),
            neighbors=tuple(self._probe(drawing, one) for one in neighbors),
            **texts,
        )

    def _some(self, drawing: random.Random, numbers: Sequence[int], count: int) -> list[int]:
        return drawing.sample(list(numbers), min(max(count, 0), len(numbers)))

    def _probe(self, drawing: random.Random, number: int) -> Probe:
        fact = self.tables.facts[number]
        templates = self.tables.relations[fact.relation].templates
        shown = [template for place, template in enumerate(templates) if place != self.held_out.get(number)]
        return Probe(_put(drawing.choice(shown), fact.subject), fact.object)


def _put(template: str, subject: str) -> str:
    return template.replace(PLACEHOLDER, subject)


def _sentences(tables: FactTables, number: int, held_out: int | None) -> list[str]:
    fact = tables.facts[number]
    templates = tables.relations[fact.relation].templates
    return [f"{_put(template, fact.subject)} {fact.object}." for place, template in enumerate(templates) if place != held_out]


def _given_away(fact: Fact) -> bool:
    subject, known = fact.subject.casefold(), fact.object.casefold()
    return subject in known or known in subject
