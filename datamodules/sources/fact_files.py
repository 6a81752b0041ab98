"""Collections of facts with templates, read from files; nothing is fetched.

LRE (Hernandez et al. 2024, https://github.com/evandez/relations, MIT) and ParaRel (Elazar et al. 2021, https://github.com/yanaiela/pararel, MIT;
its facts descend from LAMA, CC-BY-NC: research only).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from malleable.datamodules.sources.facts import Fact, FactSource, FactTables, Relation
from malleable.datamodules.text_files import read_json, read_json_rows


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
            for entry in [content] if "samples" in content else content.values():
                if missing := {"name", "prompt_templates", "samples"} - entry.keys():
                    raise ValueError(f"{path}: a relation has no {', '.join(sorted(missing))}")
                templates = dict.fromkeys(text.strip() for text in [*entry["prompt_templates"], *entry.get("prompt_templates_zs", ())])
                facts += _first((len(relations), sample["subject"].strip(), sample["object"].strip()) for sample in entry["samples"])
                relations.append(Relation(entry["name"], tuple(templates)))
        return FactTables(relations, facts)


class ParaRel(FactSource):
    """ParaRel's facts and patterns: a folder with ``facts.jsonl`` (``rel``, ``sub``, ``obj``) and ``patterns.json`` (patterns by relation).

    Patterns that do not end in the object are left out.
    """

    def _files(self) -> list[Path]:
        found = [self.path / name for name in ("facts.jsonl", "patterns.json")]
        if missing := [str(path) for path in found if not path.is_file()]:
            raise FileNotFoundError(f"ParaRel needs {' and '.join(missing)}")
        return found

    def tables(self) -> FactTables:
        """Read the facts; of several objects of a subject the first counts."""
        facts_file, patterns_file = self._files()
        relations = []
        for name, patterns in _json(patterns_file).items():
            texts = [pattern["pattern"].strip().rstrip(".").strip() for pattern in patterns]
            asking = [text.removesuffix("[Y]").strip() for text in texts if text.endswith("[Y]")]
            templates = dict.fromkeys(text.replace("[X]", "{}") for text in asking if text.count("[X]") == 1 and "[Y]" not in text)
            if templates:
                relations.append(Relation(name, tuple(templates)))
        numbers = {relation.name: number for number, relation in enumerate(relations)}
        facts = []
        for _, place, entry in read_json_rows(facts_file):
            try:
                relation, subject, known = entry["rel"], entry["sub"].strip(), entry["obj"].strip()
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{place}: a fact is an object of rel, sub and obj ({error})") from error
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
