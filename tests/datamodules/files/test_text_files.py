"""Lines, JSON rows and ids of text files, in every reader that takes them."""

import gzip
import json

import numpy as np
import pytest

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest, Probe, read_requests
from malleable.datamodules.files.text_files import ends_in_blank, id_text, read_json_rows, read_lines
from malleable.datamodules.language.texts import read_texts
from malleable.datamodules.sources.editing.edit_records import FlatCounterFact
from malleable.datamodules.sources.editing.fact_files import LRE, ParaRel
from malleable.datamodules.sources.recommendation.ready_rows import read_rows

# What `str.splitlines` takes for a line end, and JSON and text files do not.
SEPARATORS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]

REQUEST = {"prompt": "The mother tongue of {} is", "subject": "Anna", "target": "English", "true": "Danish"}
FLAT = {"prompt": "Anna speaks", "subject": "Anna", "target_new": "English", "ground_truth": "Danish"}


@pytest.fixture(params=["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def write(request, tmp_path):
    """Writes rows as a file of one of the kinds."""

    def write(rows):
        path = tmp_path / request.param
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = f"[{','.join(lines)}]" if path.suffix == ".json" else "\r\n\n".join(lines)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else b"\xef\xbb\xbf" + text.encode())
        return path

    return write


@pytest.mark.parametrize("separator", SEPARATORS)
def test_lines_end_at_line_feeds_only(tmp_path, separator):
    (tmp_path / "a.txt").write_bytes(f" one{separator}more \r\n \n\ttwo\r".encode())
    assert list(read_lines(tmp_path / "a.txt")) == [(1, f" one{separator}more "), (3, "\ttwo")]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_every_reader_of_json_keeps_all_characters_of_its_strings(write, separator):
    text = f"grew up in{separator}Bath"
    assert [row.value for row in read_json_rows(write([{"text": text}, [1]]))] == [{"text": text}, [1]]
    assert [value for _, value in read_rows(write([{"title": text}]))] == [{"title": text}]
    (request,) = read_requests(write([{**REQUEST, "paraphrases": [text]}]))
    assert request.paraphrases == (text,)
    (request,) = FlatCounterFact(str(write([{**FLAT, "rephrase_prompt": text}]))).load().requests
    assert request.paraphrases == (text,)
    if write([]).name != "rows.jsonl.gz":
        assert read_texts(write([{"text": text}, text])) == [text, text]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_facts_keep_all_characters(tmp_path, separator):
    (tmp_path / "patterns.json").write_text('{"P1": [{"pattern": "[X] speaks [Y] ."}]}')
    facts = [{"rel": "P1", "sub": f"An{separator}na ", "obj": obj} for obj in ("Danish", "English")]
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(fact, ensure_ascii=False) for fact in facts), encoding="utf-8")
    assert [fact.subject for fact in ParaRel(str(tmp_path)).tables().facts] == [f"An{separator}na"]


def test_rows_have_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text("1\n\n2")
    (tmp_path / "a.json").write_text("\n [1, 2]")
    assert [tuple(row) for row in read_json_rows(tmp_path / "a.jsonl")] == [
        (1, f"{tmp_path}/a.jsonl, line 1", 1),
        (3, f"{tmp_path}/a.jsonl, line 3", 2),
    ]
    assert [tuple(row)[:2] for row in read_json_rows(tmp_path / "a.json")] == [(1, f"{tmp_path}/a.json, entry 1"), (2, f"{tmp_path}/a.json, entry 2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"1\n{", r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1: not JSON"),
        ("a.json", b"[1]\n[2]", r"a.json: not JSON .*must end in .jsonl"),
        ("a.json", b'{\n"x": 1}', r"a.json, line 1: not JSON .*expected a JSON array, or one JSON value on each line"),
        ("a.jsonl", b"\xff\xfe1", r"a.jsonl, line 1: not text in UTF-16"),
    ],
)
def test_errors_contain_the_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_json_rows(tmp_path / name))


@pytest.mark.parametrize("text", ["007", "pkg-1.0", "1.0", " a ", "1e3", "NA", "null", "\u2028x", "ä"])
def test_text_ids_are_unchanged(text):
    assert id_text(text, "here") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (2**63 + 1, str(2**63 + 1)), (7.0, "7"), (-0.0, "0"), (np.int64(7), "7"), (np.float32(7), "7"), (2.0**52, str(2**52))],
)
def test_numbers_are_written_as_integers(value, text):
    assert id_text(value, "here") == text


@pytest.mark.parametrize("value", [1.5, 2.0**53, float("inf"), float("nan"), None, "", " ", True, np.True_, [], {}, b"x"])
def test_invalid_ids_are_refused(value):
    with pytest.raises(ValueError, match=r"^file, line 3: "):
        id_text(value, "file, line 3")


def test_blanks():
    assert [ends_in_blank(text) for text in ("", "a", "a ", "a\t", "a\u00a0", "a\n", " a")] == [False, False, True, True, True, False, False]


@pytest.mark.parametrize("field", ["prompt", "subject", "target", "true", "paraphrases", "generation_prompts", "neighbors"])
@pytest.mark.parametrize("form", ["{} ", " {}", "{}\n", "{}\u00a0"])
def test_requests_refuse_white_space_at_the_ends_of_texts(field, form):
    value = form.replace(PLACEHOLDER, REQUEST.get(field, "Anna is"))
    fields = {"neighbors": (Probe(value, "x"),)} if field == "neighbors" else {field: value if field in REQUEST else (value,)}
    with pytest.raises(ValueError, match=f"{field} must not begin or end in white space, got .*; remove it"):
        EditRequest(**{"request_id": "1", **REQUEST, **fields})


def test_references_are_unchanged():
    assert EditRequest(request_id="1", **REQUEST, references=(" Text.\n",)).references == (" Text.\n",)


def test_white_space_of_published_records_is_stripped(tmp_path):
    record = {"prompt": " Anna speaks ", "subject": "Anna ", "target_new": " English", "ground_truth": "Danish\n"}
    (tmp_path / "flat.json").write_text(json.dumps([record]))
    (request,) = FlatCounterFact(str(tmp_path / "flat.json")).load().requests
    assert (request.prompt, request.subject, request.target, request.true) == ("{} speaks", "Anna", "English", "Danish")
    relation = {"name": "speaks", "prompt_templates": ["{} speaks "], "samples": [{"subject": "Anna ", "object": " Danish"}]}
    (tmp_path / "lre.json").write_text(json.dumps(relation))
    tables = LRE(str(tmp_path / "lre.json")).tables()
    assert (tables.relations[0].templates, tables.facts[0].subject, tables.facts[0].object) == (("{} speaks",), "Anna", "Danish")


@pytest.mark.parametrize(("given", "expected"), [(7, "7"), (7.0, "7"), ("7.0", "7.0"), ("007", "007")])
def test_ids_of_requests_are_unchanged(write, given, expected):
    (request,) = read_requests(write([{**REQUEST, "request_id": given}]))
    assert request.request_id == expected


@pytest.mark.parametrize("given", [None, True, 1.5, "", [1]])
def test_invalid_ids_of_requests(write, given):
    with pytest.raises(ValueError, match=r"rows.json.*(line|entry) 1: request_id: "):
        read_requests(write([{**REQUEST, "request_id": given}]))
