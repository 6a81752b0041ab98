"""Published collections of facts with templates, read from files; nothing is downloaded.

LRE (Hernandez et al. 2024, https://github.com/evandez/relations, MIT) and ParaRel (Elazar et al. 2021, https://github.com/yanaiela/pararel, MIT;
its facts come from LAMA, CC-BY-NC, which permits research only).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from malleable.datamodules.editing.requests import PLACEHOLDER
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import list_of, read_json, read_json_rows, text_of, texts_of
from malleable.datamodules.files.user_files import check_file
from malleable.datamodules.sources.editing.facts import FactSource, FactTables, Relation, Triple


class LRE(FactSource):
    """Factual relations of LRE: the folder ``data/factual`` of its repository, with one JSON file per relation, or one file with all relations."""

    def _files(self) -> list[Path]:
        found = sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path] if self.path.is_file() else []
        if not found:
            raise FileNotFoundError(f"no relations at {self.path}; give the folder data/factual of https://github.com/evandez/relations")
        return found

    def tables(self) -> FactTables:
        """Read the facts; if a subject has several objects, the first one is used."""
        relations: list[Relation] = []
        facts: list[Triple] = []
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
    def _relation(entry: Any, number: int) -> tuple[tuple[str, ...], list[Triple]]:
        text_of(entry, "name")
        zero_shot = texts_of(entry, "prompt_templates_zs") if "prompt_templates_zs" in entry else ()
        templates = tuple(dict.fromkeys(text.strip() for text in [*texts_of(entry, "prompt_templates"), *zero_shot]))
        if not templates or any(template.count(PLACEHOLDER) != 1 for template in templates):
            raise ValueError(f"field prompt_templates: each must contain {PLACEHOLDER} once, for the subject, got {brief_repr(templates, 200)}")
        samples = list_of(entry, "samples")
        return templates, _first_objects((number, text_of(sample, "subject").strip(), text_of(sample, "object").strip()) for sample in samples)


class ParaRel(FactSource):
    """Facts and patterns of ParaRel: a folder with ``facts.jsonl`` (``rel``, ``sub``, ``obj``) and ``patterns.json`` (patterns by relation).

    Patterns that do not end with the object are excluded.
    """

    def _files(self) -> list[Path]:
        found = [self.path / name for name in ("facts.jsonl", "patterns.json")]
        for path in found:
            check_file(path, "ParaRel needs facts.jsonl and patterns.json")
        return found

    def tables(self) -> FactTables:
        """Read the facts; if a subject has several objects, the first one is used."""
        facts_file, patterns_file = self._files()
        relations = []
        content = _json(patterns_file)
        for name in content:
            try:
                texts = [text_of(pattern, "pattern").strip().rstrip(".").strip() for pattern in list_of(content, name)]
            except ValueError as error:
                raise ValueError(f"{patterns_file}, relation {name!r}: {error}") from error
            prompts = [text.removesuffix("[Y]").strip() for text in texts if text.endswith("[Y]")]
            templates = dict.fromkeys(text.replace("[X]", PLACEHOLDER) for text in prompts if text.count("[X]") == 1 and "[Y]" not in text)
            if templates:
                relations.append(Relation(name, tuple(templates)))
        numbers = {relation.name: number for number, relation in enumerate(relations)}
        facts = []
        for _, place, entry in read_json_rows(facts_file):
            try:
                relation, subject, object_ = text_of(entry, "rel"), text_of(entry, "sub").strip(), text_of(entry, "obj").strip()
            except ValueError as error:
                raise ValueError(f"{place}: {error}; a fact must be an object with rel, sub and obj") from error
            if relation in numbers:
                facts.append((numbers[relation], subject, object_))
        return FactTables(relations, _first_objects(facts))


def _first_objects(facts: Iterable[tuple[int, str, str]]) -> list[Triple]:
    """Return the facts with the first object of each relation and subject."""
    found: dict[tuple[int, str], Triple] = {}
    for relation, subject, object_ in facts:
        found.setdefault((relation, subject), Triple(relation, subject, object_))
    return list(found.values())


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {brief_repr(content)}; give the file as its authors distribute it")
    return content
