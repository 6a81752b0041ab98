"""Collections of facts with templates, read from files; nothing is fetched.

LRE (Hernandez et al. 2024, https://github.com/evandez/relations, MIT) and ParaRel (Elazar et al. 2021, https://github.com/yanaiela/pararel, MIT;
its facts descend from LAMA, CC-BY-NC: research only).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from malleable.datamodules.editing.requests import PLACEHOLDER
from malleable.datamodules.files.text_files import list_of, read_json, read_json_rows, text_of, texts_of
from malleable.datamodules.files.user_files import check_file
from malleable.datamodules.sources.editing.facts import Fact, FactSource, FactTables, Relation


class LRE(FactSource):
    """LRE's factual relations: ``data/factual`` of its repository, a JSON file a relation, or one file of them all."""

    def _files(self) -> list[Path]:
        found = sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path] if self.path.is_file() else []
        if not found:
            raise FileNotFoundError(f"no relations at {self.path}; give the folder data/factual of https://github.com/evandez/relations")
        return found

    def tables(self) -> FactTables:
        """Read the facts; of several objects of a subject the first counts."""
        relations: list[Relation] = []
        facts: list[Fact] = []
        for path in self._files():
            content = _json(path)
            for number, entry in enumerate([content] if "samples" in content else content.values(), start=1):
                try:
                    templates, own = self._relation(entry, len(relations))
                except ValueError as error:
                    raise ValueError(f"{path}, relation {number}: {error}") from error
                facts += own
                relations.append(Relation(text_of(entry, "name"), templates))
        return FactTables(relations, facts)

    @staticmethod
    def _relation(entry: Any, number: int) -> tuple[tuple[str, ...], list[Fact]]:
        text_of(entry, "name")
        zero_shot = texts_of(entry, "prompt_templates_zs") if "prompt_templates_zs" in entry else ()
        templates = tuple(dict.fromkeys(text.strip() for text in [*texts_of(entry, "prompt_templates"), *zero_shot]))
        if not templates or any(template.count(PLACEHOLDER) != 1 for template in templates):
            raise ValueError(f"field prompt_templates: each holds {PLACEHOLDER} once, for the subject, got {templates!r:.200}")
        samples = list_of(entry, "samples")
        return templates, _first((number, text_of(sample, "subject").strip(), text_of(sample, "object").strip()) for sample in samples)


class ParaRel(FactSource):
    """ParaRel's facts and patterns: a folder with ``facts.jsonl`` (``rel``, ``sub``, ``obj``) and ``patterns.json`` (patterns by relation).

    Patterns that do not end in the object are left out.
    """

    def _files(self) -> list[Path]:
        found = [self.path / name for name in ("facts.jsonl", "patterns.json")]
        for path in found:
            check_file(path, "ParaRel needs facts.jsonl and patterns.json")
        return found

    def tables(self) -> FactTables:
        """Read the facts; of several objects of a subject the first counts."""
        facts_file, patterns_file = self._files()
        relations = []
        content = _json(patterns_file)
        for name in content:
            try:
                texts = [text_of(pattern, "pattern").strip().rstrip(".").strip() for pattern in list_of(content, name)]
            except ValueError as error:
                raise ValueError(f"{patterns_file}, relation {name!r}: {error}") from error
            asking = [text.removesuffix("[Y]").strip() for text in texts if text.endswith("[Y]")]
            templates = dict.fromkeys(text.replace("[X]", PLACEHOLDER) for text in asking if text.count("[X]") == 1 and "[Y]" not in text)
            if templates:
                relations.append(Relation(name, tuple(templates)))
        numbers = {relation.name: number for number, relation in enumerate(relations)}
        facts = []
        for _, place, entry in read_json_rows(facts_file):
            try:
                relation, subject, known = text_of(entry, "rel"), text_of(entry, "sub").strip(), text_of(entry, "obj").strip()
            except ValueError as error:
                raise ValueError(f"{place}: {error}; a fact is an object of rel, sub and obj") from error
            if relation in numbers:
                facts.append((numbers[relation], subject, known))
        return FactTables(relations, _first(facts))


def _first(facts: Iterable[tuple[int, str, str]]) -> list[Fact]:
    found: dict[tuple[int, str], Fact] = {}
    for relation, subject, known in facts:
        found.setdefault((relation, subject), Fact(relation, subject, known))
    return list(found.values())


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content
