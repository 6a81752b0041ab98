"""Every malformed line is named with its file, its number and what is expected there."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from malleable.datamodules.graphs.triple_files import check_columns, read_ids, read_labels, read_names

TRIPLES = [("New York", "in", "USA"), ("USA", "has, too", "New York"), ("O'Hare", "in", "USA")]
TEXT = "".join("\t".join(triple) + "\n" for triple in TRIPLES)


def write(folder: Path, text: str, name: str = "train.txt") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["train.txt", "train.tsv", "train.txt.gz", "train.tsv.gz"])
@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), TEXT.rstrip("\n"), "\ufeff" + TEXT, TEXT.replace("\n", "\n\n") + " \n"])
def test_labels_keep_their_spaces_with_any_line_break(tmp_path, name, text):
    assert list(read_labels(write(tmp_path, text, name))) == TRIPLES


def test_labels_of_parquet_are_never_altered(tmp_path):
    heads = ["007", "pkg-1.0", "pkg-1", " a ", "NA"]
    table = pa.table({"head": heads, "relation": [1.0, 2.0, 3.0, 4.0, 5.0], "tail": [1, 2**53 + 1, 3, 4, 5]})
    parquet.write_table(table, tmp_path / "a.parquet")
    tails = ["1", str(2**53 + 1), "3", "4", "5"]
    assert list(read_labels(tmp_path / "a.parquet")) == list(zip(heads, "12345", tails, strict=True))
    parquet.write_table(pa.table({"head": ["a", "b"], "relation": [1.0, 1.5], "tail": ["b", "c"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet, row 2, field relation: the number 1.5 is not an exact integer"):
        list(read_labels(tmp_path / "b.parquet"))


def test_blanks_around_a_label_of_a_text_file_are_spaces_and_tabs_alone(tmp_path):
    """A label that ends in a no-break space or a line separator is another label."""
    text = " a\tr\tb \na\u00a0\tr\tb\u2028\na\x1f\tr\u3000\tb\x85\n\u00a0\n"
    assert list(read_labels(write(tmp_path, text))) == [("a", "r", "b"), ("a\u00a0", "r", "b\u2028"), ("a\x1f", "r\u3000", "b\x85")]


def test_inexact_numbers_of_parquet_are_an_error(tmp_path):
    columns = {"head": ["a", "b"], "relation": ["r", "r"]}
    parquet.write_table(pa.table({**columns, "tail": pa.array([2.0**24 - 1, 2.0**24], pa.float32())}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2, field tail: the number 16777216.0 is not an exact integer"):
        list(read_labels(tmp_path / "a.parquet"))


def test_labels_of_parquet(tmp_path):
    columns = {"tail": [t for _, _, t in TRIPLES], "head": [h for h, _, _ in TRIPLES], "relation": [r for _, r, _ in TRIPLES]}
    parquet.write_table(pa.table(columns), tmp_path / "named.parquet")
    assert list(read_labels(tmp_path / "named.parquet")) == TRIPLES
    other = {"o": columns["tail"], "s": columns["head"], "p": columns["relation"], "weight": [1, 2, 3]}
    parquet.write_table(pa.table(other), tmp_path / "other.parquet")
    assert list(read_labels(tmp_path / "other.parquet", names={"head": "s", "relation": "p", "tail": "o"})) == TRIPLES
    with pytest.raises(ValueError, match=r"other.parquet: columns \['o', 's', 'p', 'weight'\], expected \['head', .*column_names: \{head"):
        list(read_labels(tmp_path / "other.parquet"))
    parquet.write_table(pa.table({"a": columns["tail"], "b": columns["head"], "c": columns["relation"]}), tmp_path / "plain.parquet")
    assert list(read_labels(tmp_path / "plain.parquet", "thr")) == TRIPLES
    parquet.write_table(pa.table({"head": ["a", None], "relation": ["r", "r"], "tail": ["b", "c"]}), tmp_path / "gap.parquet")
    with pytest.raises(ValueError, match=r"gap.parquet, row 2, field head: the cell is empty"):
        list(read_labels(tmp_path / "gap.parquet"))
    with pytest.raises(ValueError, match=r"no.parquet is damaged, or not a Parquet"):
        list(read_labels(write(tmp_path, TEXT, "no.parquet")))


@pytest.mark.parametrize("columns", ["hrt", "htr", "rht", "tdr", "thr"])
def test_the_order_of_columns_is_explicit(tmp_path, columns):
    if "d" in columns:
        with pytest.raises(ValueError, match=r"columns must be a permutation of the letters h .*, got 'tdr'"):
            check_columns(columns)
        return
    text = "".join("\t".join(triple["hrt".index(letter)] for letter in columns) + "\n" for triple in TRIPLES)
    assert list(read_labels(write(tmp_path, text), columns)) == TRIPLES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tr\tb\na\tr\n", r"train.txt, line 2: 2 columns in 'a\\tr', expected 3: head<TAB>relation<TAB>tail"),
        ("a\tr\tb\n\na\tr\tb\tc\n", r"train.txt, line 3: 4 columns in .*expected 3"),
        ("a r b\n", r"train.txt, line 1: 1 column in 'a r b', expected 3: head<TAB>relation<TAB>tail .tabs between them, not spaces"),
        ("a\tr\tb\na\t \tb\n", r"train.txt, line 2, field relation: the cell is empty"),
        ("", r"train.txt contains no triple; expected lines head<TAB>relation<TAB>tail"),
        ("\n\n", r"train.txt contains no triple"),
        ("head\trelation\ttail\na\tr\tb\n", r"train.txt, line 1 looks like a header .*set header: true"),
        ("Subject\tpredicate\tobject\na\tr\tb\n", r"looks like a header"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(read_labels(write(tmp_path, text)))


def test_a_header_is_skipped_with_the_option_header(tmp_path):
    assert list(read_labels(write(tmp_path, "head\trelation\ttail\n" + TEXT), header=True)) == TRIPLES


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "train.txt").write_bytes("a\tr\tMünchen\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train.txt, line 1, byte 6: not text in UTF-8 .*encoding"):
        list(read_labels(tmp_path / "train.txt"))
    (tmp_path / "plain.txt.gz").write_bytes(b"a\tr\tb\n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(TEXT.encode() * 100)[:-20])
    for name in ("plain", "cut"):
        with pytest.raises(ValueError, match=rf"{name}.txt.gz is damaged, or not a gzip file"):
            list(read_labels(tmp_path / f"{name}.txt.gz"))


@pytest.mark.parametrize("text", ["0\t1\t2\n2\t0\t0\n", "0 1 2\r\n2 0 0\r\n"])
def test_ids(tmp_path, text):
    assert read_ids(write(tmp_path, text), entities=3, relations=2).tolist() == [[0, 1, 2], [2, 0, 0]]
    assert read_ids(write(tmp_path, "2\n" + text), 3, 3, "htr", counted=True).tolist() == [[0, 2, 1], [2, 0, 0]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("0\t1\t3\n", {}, r"train2id.txt, line 1, field tail: '3' is not valid, expected one of the 3 ids 0 to 2"),
        ("0\t0\t0\n0\t2\t0\n", {}, r"line 2, field relation: '2' is not valid, expected one of the 2 ids 0 to 1"),
        ("a\t0\t0\n", {}, r"line 1, field head: 'a' is not valid"),
        ("-1\t0\t0\n", {}, r"line 1, field head: '-1' is not valid"),
        ("0\t0\n", {}, r"line 1: 2 columns in .*expected 3: head<TAB>relation<TAB>tail"),
        ("2\n0\t0\t0\n0\t0\t1\n", {}, r"line 1: 1 column in '2', expected 3: .*files of format openke have a first line with the number of lines"),
        ("3\n0\t0\t0\n", {"counted": True}, r"1 lines follow the first one, which states 3; give the complete file"),
        ("0\t0\t0\n", {"counted": True}, r"line 1, which must be the number of the following lines: '0\\t0\\t0' is not valid"),
        ("", {}, r"train2id.txt contains no triple"),
    ],
)
def test_malformed_ids_are_named(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_ids(write(tmp_path, text, "train2id.txt"), 3, 2, **options)


def test_names(tmp_path):
    assert read_names(write(tmp_path, "New York\t1\nUSA\t0\n")) == ["USA", "New York"]
    assert read_names(write(tmp_path, "2\n/m/1 1\n/m/0 0\n"), counted=True) == ["/m/0", "/m/1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t0\nb\t2\n", r"entity2id.txt: 2 labels, but id 1 is missing .the largest is 2.; ids must be consecutive from 0"),
        ("a\t1\nb\t2\n", r"2 labels, but id 0 is missing"),
        ("a\t0\nb\t1\na\t2\n", r"entity2id.txt, line 3: the label 'a' is already in line 1; give every label one id"),
        ("a\t0\nb\t0\n", r"line 2: 'a' already has the id 0"),
        ("a\tx\n", r"line 1, field id: 'x' is not valid, expected an integer >= 0"),
        ("a\t0\t1\n", r"line 1: 3 columns in .*expected 2: label<TAB>id"),
        ("", r"entity2id.txt contains no label"),
    ],
)
def test_malformed_names_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_names(write(tmp_path, text, "entity2id.txt"))


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("g.csv", "head,relation,tail\na,likes,b\n", {}),
        ("g.csv", "tail,weight,Head,relation\nb,0.5,a,likes\n", {}),
        ("g.tsv", "relation\ttail\thead\nlikes\tb\ta\n", {}),
        ("g.txt", "object;predicate;subject\nb;likes;a\n", {"delimiter": ";"}),
        ("g.csv", 'to,from,kind,note\nb,a,likes,"x, y"\n', {"names": {"head": "from", "relation": "kind", "tail": "to"}}),
        ("g.csv", "head,relation,tail\nlikes,a,b\n", {"columns": "rht"}),
        ("g.csv", "one,two,three\na,likes,b\n", {}),
    ],
)
def test_columns_are_found_by_the_names_of_a_header(name, text, options, tmp_path):
    (tmp_path / name).write_text(text)
    assert list(read_labels(tmp_path / name, header=True, **options)) == [("a", "likes", "b")]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("one,two,three,four\na,likes,b,c\n", {}, r"line 1: the columns are .*set their names with column_names"),
        ("head,relation,tail\na,likes,b\n", {"names": {"tail": "goal"}}, r"line 1: the columns are .*column_names"),
        ("head,relation,tail,x\na,likes,b\n", {}, r"line 2: 3 cells, expected 4"),
        ("head,relation,tail\na,,b\n", {}, r"line 2, field relation: the cell is empty"),
    ],
)
def test_incomplete_headers(text, options, message, tmp_path):
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_labels(tmp_path / "g.csv", header=True, **options))
