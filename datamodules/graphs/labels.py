"""Readers of files with labels of entities: queries, types, descriptions."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from malleable.datamodules.batch import WILDCARD, KnowledgeGraph
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.sniffing import sniff_encoding
from malleable.datamodules.files.table_files import read_cells
from malleable.datamodules.files.text_files import file_kind, read_json
from malleable.datamodules.graphs.triple_files import header_order
from malleable.datamodules.sources.graphs.base import Ints

log = logging.getLogger(__name__)

FORM = f"head<TAB>relation<TAB>tail with {WILDCARD} for the unknown one (.csv: commas instead of tabs; a final {WILDCARD} is optional)"


def read_queries(path: Path, graph: KnowledgeGraph, delimiter: str | None = None) -> Ints:
    """Read queries by label.

    Args:
        path: File with one query on each line, also ``.gz``.
            ``head<TAB>relation<TAB>?`` and ``head<TAB>relation`` are queries for tails, ``?<TAB>relation<TAB>tail`` for heads, and
            ``head<TAB>?<TAB>tail`` for relations. A first line with the names ``head``, ``relation`` and ``tail``, in any order and
            possibly with other columns, is a header.
        graph: Labels of entities and relations.
        delimiter: Delimiter between cells; default: a comma for ``.csv``, else a tab.

    Returns:
        ``(Q, 3)`` int64: head, relation, -1; or head, -1, tail. A query ``(?, r, t)`` is returned as ``(t, reciprocal of r, -1)``.

    Raises:
        ValueError: If a line is not a query, or a label is unknown. The message contains file, line and similar labels.
    """
    entities = {label: key for key, label in enumerate(graph.entities)}
    relations = {label: key for key, label in enumerate(graph.relations)}
    fields = {"head": entities, "relation": relations, "tail": entities}
    queries = []
    order: list[int] | None = None
    for place, (number, cells) in enumerate(_lines(path, delimiter)):
        if not place and (order := header_order(cells)) is not None:
            continue
        where = f"{path}, line {number}"
        if order is not None and len(cells) > max(order):
            cells = [cells[column] for column in order]
        query = [*cells, WILDCARD] if len(cells) == 2 else cells
        if len(query) != 3 or query.count(WILDCARD) != 1:
            raise ValueError(f"{where}: {cells} is not a query, expected {FORM}")
        columns = zip(query, fields.items(), strict=True)
        head, relation, tail = (-1 if label == WILDCARD else _find(label, known, f"{where}, field {field}") for label, (field, known) in columns)
        queries.append((tail, relation + len(relations), -1) if head < 0 else (head, relation, tail))
    if not queries:
        raise ValueError(f"{path} contains no query; expected lines of {FORM}")
    return np.array(queries, dtype=np.int64)


def read_types(path: Path, graph: KnowledgeGraph) -> tuple[tuple[str, ...], ...]:
    """Read the types of entities.

    Args:
        path: Lines ``entity<TAB>type``, one for each type of an entity (also ``.gz``); or ``.json``, an object that maps entities to lists of types.
        graph: Labels of entities.

    Returns:
        Types of each entity, empty if none is known.

    Raises:
        ValueError: If a line has another format, or if the file contains no entity of the graph.
    """
    types: list[list[str]] = [[] for _ in graph.entities]
    for key, kind in _pairs(path, graph, "type"):
        types[key].append(kind)
    return tuple(tuple(dict.fromkeys(own)) for own in types)


def read_descriptions(path: Path, graph: KnowledgeGraph) -> tuple[str, ...]:
    """Read descriptions of entities.

    Args:
        path: Lines ``entity<TAB>text`` (also ``.gz``); or ``.json``, an object that maps entities to texts.
        graph: Labels of entities.

    Returns:
        Description of each entity, empty if none is known.

    Raises:
        ValueError: If a line has another format, if an entity has two descriptions, or if the file contains no entity of the graph.
    """
    texts = [""] * graph.num_entities
    for key, text in _pairs(path, graph, "description"):
        if texts[key]:
            raise ValueError(f"{path}: {graph.entities[key]!r} has two descriptions; remove one")
        texts[key] = text
    return tuple(texts)


def _pairs(path: Path, graph: KnowledgeGraph, what: str) -> Iterator[tuple[int, str]]:
    """Yield the index of the entity and the text of each pair. Skip entities that are not in the graph, and log their number."""
    entities = {label: key for key, label in enumerate(graph.entities)}
    found, others = set(), set()
    for label, text in _json_pairs(path, what) if file_kind(path) == ".json" else _text_pairs(path, what):
        key = entities.get(label)
        if key is None:
            others.add(label)
        else:
            found.add(key)
            yield key, text
    if not found:
        raise ValueError(
            f"{path} contains no entity of the graph (e.g. {graph.entities[0]!r}), but {len(others)} other labels: {', '.join(sorted(others)[:3])}; "
            "use the labels of the graph"
        )
    log.info("%s: read a %s for %d of %d entities; skipped %d labels that are not in the graph", path, what, len(found), len(entities), len(others))


def _text_pairs(path: Path, what: str) -> Iterator[tuple[str, str]]:
    for number, cells in _lines(path):
        if len(cells) != 2 or not all(cells):
            raise ValueError(f"{path}, line {number}: {'<TAB>'.join(cells)[:80]!r}, expected entity<TAB>{what}")
        yield cells[0], cells[1]


def _json_pairs(path: Path, what: str) -> Iterator[tuple[str, str]]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object that maps each entity to its {what}, got {brief_repr(content)}")
    for label, value in content.items():
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, entity {label!r}: {str(value)[:80]} is not a {what}; expected a string or a list of strings")
        yield from ((label, text) for text in texts)


def _lines(path: Path, delimiter: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each line that is not empty."""
    delimiter = delimiter or ("," if file_kind(path) == ".csv" else "\t")
    return read_cells(path, delimiter, sniff_encoding(path), quotes=delimiter != "\t")


def _find(label: str, known: dict[str, int], where: str) -> int:
    if label in known:
        return known[label]
    near: Sequence[str] = difflib.get_close_matches(label, list(known), n=3, cutoff=0.5)
    advice = f"did you mean {', '.join(map(repr, near))}?" if near else "use a label of the graph"
    raise ValueError(f"{where}: {label!r} is not in the graph; {advice}")
