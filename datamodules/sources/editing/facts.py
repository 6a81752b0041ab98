"""Base class of sources that build edit requests and statements from a table of facts.

The requests are built as in CounterFact: the target is another object of the relation, paraphrases use other templates, and neighbours are subjects
with the same true object.
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
    """Relation between subjects and objects.

    Attributes:
        name: Name of the relation.
        templates: Templates of statements. Each contains ``{}`` once, for the subject, and ends before the object. The first one is the prompt of
            edit requests.
    """

    name: str
    templates: tuple[str, ...]


class Triple(NamedTuple):
    """Fact as a triple of relation, subject and object.

    Attributes:
        relation: Index of the relation.
        subject: Subject.
        object: True object.
    """

    relation: int
    subject: str
    object: str


@dataclass(frozen=True)
class FactTables:
    """Relations and facts. A subject occurs once in each relation.

    Attributes:
        relations: The relations.
        facts: The facts.
    """

    relations: list[Relation]
    facts: list[Triple]


class FactSource(EditSource):
    """Base class of sources of edit requests that read a table of facts.

    The prompt of a request is the first template of its relation. Its paraphrases use ``paraphrases`` other templates. Neighbours are facts that no
    request changes: facts with the same true object first, then facts with any other object except the target. Two kinds of facts are excluded: facts
    whose subject contains the object, or the reverse; and facts of relations with only one object.

    Args:
        path: File or folder of the facts. Default: the table in this package, if the source has one.
        relations: Names of the relations to use. Default: all.
        limit: Number of facts to edit, drawn at random. Default: all; then there are no neighbours.
        paraphrases: Maximum number of paraphrases of a request.
        neighbors: Maximum number of neighbours of a request.
        hold_out: Exclude one template of each fact, not the first one, from the statements, and use it as the paraphrase.
        generate: Add what measures of fluency and consistency need: beginnings of texts about the subject, and as references the statements of other
            subjects whose true object is the target.
        seed: Seed of all random choices.

    Raises:
        ValueError: If a value is out of range, a relation is unknown, or there is neither a path nor a table in this package.
    """

    packaged: ClassVar[Path | None] = None
    """Path of the table in this package."""

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
            raise ValueError(f"{type(self).__name__} needs path=..., the file or folder of its facts, because this package contains none")
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
        """Draw the facts to edit, and build requests with paraphrases and neighbours."""
        tables = self._select(self.tables())
        generator = random.Random(self.seed)
        order = list(range(len(tables.facts)))
        generator.shuffle(order)
        edited = order[: self.limit]
        chosen = set(edited)
        held_out = {number: self._held_out_template(tables, number) for number in order} if self.hold_out else {}
        statements = {number: _statements(tables, number, held_out.get(number)) for number in range(len(tables.facts))}
        builder = _RequestBuilder(tables, chosen, statements, self, held_out)
        requests = [builder.request(number) for number in edited]
        return EditTables(
            requests,
            [sentence for sentences in statements.values() for sentence in sentences],
            [sentence for number, sentences in statements.items() if number not in chosen for sentence in sentences],
        )

    def _select(self, tables: FactTables) -> FactTables:
        """Return the facts of the chosen relations that can be edited."""
        names = [relation.name for relation in tables.relations]
        chosen = self.relations if self.relations is not None else names
        if unknown := sorted(set(chosen) - set(names)):
            raise ValueError(f"{type(self).__name__} has no relation {', '.join(unknown)}; it has {', '.join(names)}")
        facts = [fact for fact in tables.facts if names[fact.relation] in chosen and not _is_trivial(fact)]
        objects = defaultdict(set)
        for fact in facts:
            objects[fact.relation].add(fact.object)
        facts = [fact for fact in facts if len(objects[fact.relation]) > 1]
        if not facts:
            raise ValueError(
                f"{type(self).__name__}: {self.path} has no fact of {', '.join(chosen)} that can be edited; a relation needs at least two objects"
            )
        if self.limit is not None and self.limit > len(facts):
            raise ValueError(f"limit={self.limit}, but {type(self).__name__} has only {len(facts)} facts of {', '.join(chosen)}; decrease limit")
        return FactTables(tables.relations, facts)

    def _held_out_template(self, tables: FactTables, number: int) -> int | None:
        """Draw the template that is held out as the paraphrase; ``None`` if there are fewer than three templates."""
        fact = tables.facts[number]
        count = len(tables.relations[fact.relation].templates)
        if count < 3:
            return None
        return 1 + random.Random(f"{self.seed} {fact.relation} {fact.subject}").randrange(count - 1)


class _RequestBuilder:
    """Builds requests from a table of facts.

    Attributes:
        objects: Objects of each relation, in order of first occurrence.
        unedited: Indices of the facts that no request changes, by relation.
        unedited_by_object: Indices of the facts that no request changes, by relation and object.
    """

    def __init__(
        self, tables: FactTables, edited: set[int], statements: dict[int, list[str]], source: FactSource, held_out: dict[int, int | None]
    ) -> None:
        self.tables, self.edited, self.statements, self.source, self.held_out = tables, edited, statements, source, held_out
        self.objects: dict[int, list[str]] = defaultdict(list)
        self.unedited: dict[int, list[int]] = defaultdict(list)
        self.unedited_by_object: dict[tuple[int, str], list[int]] = defaultdict(list)
        for number, fact in enumerate(tables.facts):
            if fact.object not in self.objects[fact.relation]:
                self.objects[fact.relation].append(fact.object)
            if number not in edited:
                self.unedited_by_object[fact.relation, fact.object].append(number)
                self.unedited[fact.relation].append(number)

    def request(self, number: int) -> EditRequest:
        """Build the request of a fact."""
        fact = self.tables.facts[number]
        relation = self.tables.relations[fact.relation]
        generator = random.Random(f"{self.source.seed} {relation.name} {fact.subject}")
        target = generator.choice([one for one in self.objects[fact.relation] if one != fact.object])
        held_out = self.held_out.get(number)
        templates = [relation.templates[held_out]] if held_out is not None else list(relation.templates[1:])
        generator.shuffle(templates)
        same_object = self._sample(generator, self.unedited_by_object[fact.relation, fact.object], self.source.neighbors)
        others = [one for one in self.unedited[fact.relation] if self.tables.facts[one].object not in (fact.object, target)]
        neighbors = same_object + self._sample(generator, others, self.source.neighbors - len(same_object))
        texts: dict[str, tuple[str, ...]] = {}
        if self.source.generate:
            with_target = [one for one in self.unedited_by_object[fact.relation, target] if one != number]
            references = [sentence for one in self._sample(generator, with_target, 5) for sentence in self.statements[one]]
            texts = {"generation_prompts": (_fill(relation.templates[0], fact.subject),), "references": tuple(references)}
        return EditRequest(
            request_id=f"{relation.name}/{fact.subject}",
            prompt=relation.templates[0],
            subject=fact.subject,
            target=target,
            true=fact.object,
            paraphrases=tuple(_fill(template, fact.subject) for template in templates[: self.source.paraphrases]),
            neighbors=tuple(self._probe(generator, one) for one in neighbors),
            **texts,
        )

    def _sample(self, generator: random.Random, numbers: Sequence[int], count: int) -> list[int]:
        return generator.sample(list(numbers), min(max(count, 0), len(numbers)))

    def _probe(self, generator: random.Random, number: int) -> Probe:
        fact = self.tables.facts[number]
        templates = self.tables.relations[fact.relation].templates
        stated = [template for place, template in enumerate(templates) if place != self.held_out.get(number)]
        return Probe(_fill(generator.choice(stated), fact.subject), fact.object)


def _fill(template: str, subject: str) -> str:
    return template.replace(PLACEHOLDER, subject)


def _statements(tables: FactTables, number: int, held_out: int | None) -> list[str]:
    """Return the statements of a fact in all templates except the one that is held out."""
    fact = tables.facts[number]
    templates = tables.relations[fact.relation].templates
    return [f"{_fill(template, fact.subject)} {fact.object}." for place, template in enumerate(templates) if place != held_out]


def _is_trivial(fact: Triple) -> bool:
    """Return whether the subject contains the object, or the reverse."""
    subject, object_ = fact.subject.casefold(), fact.object.casefold()
    return subject in object_ or object_ in subject
