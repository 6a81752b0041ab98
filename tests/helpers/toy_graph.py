"""A family of twelve in files: graphs of milliseconds."""

from pathlib import Path
from typing import Any

from malleable.datamodules.graphs.datamodule import KnowledgeGraphDataModule
from malleable.datamodules.sources.graphs.triples import Triples

NAMES = tuple(f"person {number}" for number in range(12))
RELATIONS = ("knows", "next to", "older than")


def toy_triples() -> dict[str, list[tuple[str, str, str]]]:
    """Triples by file; ``newcomer`` is only in the test."""
    everyone = range(len(NAMES))
    near = [(NAMES[k], "next to", NAMES[(k + 1) % 12]) for k in everyone]
    older = [(NAMES[k], "older than", NAMES[j]) for k in everyone for j in range(k + 1, 12) if (k * j) % 3 == 1]
    knows = [(NAMES[k], "knows", NAMES[(3 * k + 2) % 12]) for k in everyone]
    rows = [*near, *older, *knows, (NAMES[0], "knows", NAMES[7])]
    valid, test = rows[3::9], rows[7::9]
    train = [row for row in rows if row not in valid + test]
    return {"train": train, "valid": valid, "test": [*test, ("newcomer", "knows", NAMES[0])]}


def write_toy_graph(folder: Path) -> Path:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in toy_triples().items():
        (folder / f"{split}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder


def toy_graph(folder: Path, **changes: Any) -> KnowledgeGraphDataModule:
    """The family as a data module, not set up yet."""
    return KnowledgeGraphDataModule(Triples(str(write_toy_graph(folder))), **{"batch_size": 8, **changes})
