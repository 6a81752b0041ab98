"""Names in the user's files are found, or named with their line and the nearest labels."""

import gzip
import json

import pytest

from malleable.datamodules.batch import KnowledgeGraph
from malleable.datamodules.graphs.labels import read_descriptions, read_queries, read_types

GRAPH = KnowledgeGraph(("Berlin", "Germany", "Spree, the"), ("capital of", "flows through"))


def test_queries_of_both_directions(tmp_path):
    (tmp_path / "q.txt").write_text("Berlin\tcapital of\r\n?\tflows through\tBerlin\n\nSpree, the\tflows through\t?\n")
    assert read_queries(tmp_path / "q.txt", GRAPH).tolist() == [[0, 0, -1], [0, 3, -1], [2, 1, -1]]


def test_queries_for_relations(tmp_path):
    (tmp_path / "q.tsv").write_text("Berlin\t?\tGermany\nBerlin\tcapital of\n")
    assert read_queries(tmp_path / "q.tsv", GRAPH).tolist() == [[0, -1, 1], [0, 0, -1]]


def test_a_header_of_queries_with_another_order_of_columns(tmp_path):
    (tmp_path / "q.csv").write_text("asked by;tail;relation;head\nx;?;flows through;Berlin\ny;Germany;capital of;?\n")
    assert read_queries(tmp_path / "q.csv", GRAPH, ";").tolist() == [[0, 1, -1], [1, 2, -1]]


@pytest.mark.parametrize("name", ["q.csv", "q.csv.gz"])
def test_queries_of_csv_with_a_header(tmp_path, name):
    text = b'Head,relation,tail\n"Spree, the",flows through,?\n?, capital of, Germany\nBerlin,?,Germany\n'
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert read_queries(tmp_path / name, GRAPH).tolist() == [[2, 1, -1], [1, 2, -1], [0, -1, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Berlin\tcapital of\nBerlim\tcapital of\n", r"q.txt, line 2, field head: 'Berlim' is not in the graph; did you mean 'Berlin'"),
        ("?\tcapital\tGermany\n", r"line 1, field relation: 'capital' is not in the graph; did you mean 'capital of'"),
        ("?\tcapital of\txyz\n", r"line 1, field tail: 'xyz' is not in the graph; use a label of the graph$"),
        ("Berlin\n", r"line 1: \['Berlin'\] is not a query, expected head<TAB>relation<TAB>tail with \? for the unknown one"),
        ("Berlin\tcapital of\t?\nhead\trelation\ttail\n", r"line 2: \['head', 'relation', 'tail'\] is not a query"),
        ("Berlin\t?\t\n", r"line 1, field tail: '' is not in the graph; use a label of the graph$"),
        ("Berlin\tcapital of\tGermany\n", r"is not a query"),
        ("?\tcapital of\n", r"is not a query"),
        ("?\tcapital of\t?\n", r"is not a query"),
        ("Berlin\t?\n", r"is not a query"),
        ("a\tb\tc\td\n", r"is not a query"),
        ("\n", r"q.txt contains no query"),
    ],
)
def test_malformed_queries(tmp_path, text, message):
    (tmp_path / "q.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queries(tmp_path / "q.txt", GRAPH)


@pytest.mark.parametrize(("read", "name"), [(read_queries, "q.csv"), (read_types, "types.json"), (read_descriptions, "texts.tsv.gz")])
def test_a_missing_file(tmp_path, read, name):
    with pytest.raises(FileNotFoundError, match=rf"the file .*{name} does not exist; give the path of an existing file"):
        read(tmp_path / name, GRAPH)


def test_types_of_text_and_json(tmp_path, caplog):
    (tmp_path / "types.tsv").write_text("Berlin\tcity\nBerlin\tcapital\nBerlin\tcity\nParis\tcity\n")
    assert read_types(tmp_path / "types.tsv", GRAPH) == (("city", "capital"), (), ())
    assert "read a type for 1 of 3 entities; skipped 1 labels that are not in the graph" in caplog.text
    (tmp_path / "types.json").write_text(json.dumps({"Berlin": ["city"], "Germany": "state"}))
    assert read_types(tmp_path / "types.json", GRAPH) == (("city",), ("state",), ())


def test_descriptions(tmp_path):
    (tmp_path / "texts.tsv").write_text("Berlin\tA city, on the Spree.\n")
    assert read_descriptions(tmp_path / "texts.tsv", GRAPH) == ("A city, on the Spree.", "", "")
    (tmp_path / "texts.tsv").write_text("Berlin\tone\nBerlin\ttwo\n")
    with pytest.raises(ValueError, match="'Berlin' has two descriptions; remove one"):
        read_descriptions(tmp_path / "texts.tsv", GRAPH)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("types.tsv", "Berlin\tcity\nBerlin city\n", r"types.tsv, line 2: 'Berlin city', expected entity<TAB>type"),
        ("types.tsv", "Berlin\t\n", r"types.tsv, line 1: 'Berlin<TAB>', expected entity<TAB>type"),
        ("types.tsv", "Paris\tcity\n", r"contains no entity of the graph .e.g. 'Berlin'., but 1 other labels: Paris"),
        ("types.tsv", "", r"contains no entity of the graph"),
        ("types.json", "{", r"types.json: not JSON"),
        ("types.json", "[1]", r"expected a JSON object that maps each entity to its type, got \[1\]"),
        ("types.json", '{"Berlin": 3}', r"types.json, entity 'Berlin': 3 is not a type; expected a string or a list of strings"),
    ],
)
def test_malformed_types(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_types(tmp_path / name, GRAPH)
