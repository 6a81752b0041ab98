"""Readers of triples, queries and labels of graphs."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from malleable.datamodules.batch import KnowledgeGraph
from readers.registry import reader

TRIPLES = [("a b", "r", "c"), ("c", "s", "d"), ("d", "r", "a b"), ("c", "r", "c")] * 2
GRAPH = KnowledgeGraph(("a b", "c", "d"), ("r", "s"), (1, 1, 1), (1, 1))


def triples(name: str, file: str, **options: Any) -> None:
    @reader(f"triples {name}", file)
    class _:
        def make(folder):
            if file.endswith(".parquet"):
                pq.write_table(pa.table(dict(zip(("head", "relation", "tail"), zip(*TRIPLES, strict=True), strict=True))), folder / file)
                return
            between = "," if ".csv" in file else "\t"
            data = "".join(between.join(row) + "\n" for row in TRIPLES).encode()
            (folder / file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)

        def read(folder):
            from malleable.datamodules.sources.graphs.triples import Triples

            return Triples(str(folder / file), **options).load()


for ending in ("txt", "csv", "parquet", "txt.gz"):
    triples(ending, f"train.{ending}")


@reader("triples of ids", "train2id.txt", "entity2id.txt", "relation2id.txt")
class _Ids:
    def make(folder):
        (folder / "train2id.txt").write_text("3\n0 1 0\n1 2 1\n2 0 0\n")
        (folder / "entity2id.txt").write_text("3\na\t0\nb\t1\nc\t2\n")
        (folder / "relation2id.txt").write_text("2\nr\t0\ns\t1\n")

    def read(folder):
        from malleable.datamodules.sources.graphs.triples import Triples

        return Triples(str(folder), format="openke").load()


def labels(name: str, file: str, text: str) -> None:
    @reader(f"{name} {file}", file)
    class _:
        def make(folder):
            (folder / file).write_text(text)

        def read(folder):
            from malleable.datamodules.graphs import labels as graph_labels

            return getattr(graph_labels, f"read_{name}")(folder / file, GRAPH)


labels("queries", "q.tsv", "head\trelation\ttail\na b\tr\t?\n?\ts\td\nc\t?\td\n")
labels("queries", "q.csv", "a b,r,?\n?,s,d\nc,?,d\n")
labels("types", "t.tsv", "a b\tx\nc\ty\nother\tz\n")
labels("types", "t.json", json.dumps({"a b": ["x", "y"], "c": "z"}))
labels("descriptions", "d.json", json.dumps({"a b": "a text", "other": "z"}))
