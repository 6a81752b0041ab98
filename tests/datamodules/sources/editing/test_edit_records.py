"""Sources of edit requests in published formats."""

import json

import pytest
from shared import shared_data

from malleable.datamodules.editing.requests import EditRequest, Probe
from malleable.datamodules.sources.editing.edit_records import CounterFact, FlatCounterFact, QAEdit, RequestFile, ZsRE

FLAT = {
    "case_id": 7,
    "prompt": "The dog of Anna is named",
    "subject": "Anna",
    "target_new": "Rex",
    "ground_truth": "Bello",
    "rephrase_prompt": "Anna calls her dog",
    "locality_prompt": "The dog of Tom is named",
    "locality_ground_truth": "Bello",
}


def write_json(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def test_counterfact(tmp_path):
    path = shared_data("edit/counterfact_nested_sample.json")
    (request,) = CounterFact(str(path)).load().requests
    assert request.prompt == "The mother tongue of {} is"
    assert (request.subject, request.target, request.true) == ("Danielle Darrieux", "English", "French")
    assert len(request.paraphrases) == 2
    assert len(request.neighbors) == len(request.generation_prompts) == 10
    assert {probe.answer for probe in request.neighbors} == {"French"}
    assert request.references == ()
    snippets = [{"relation_id": "P103", "target_id": "Q1860", "samples": [{"name": "A", "text": "A speaks English."}]}]
    source = CounterFact(str(path), snippets=write_json(tmp_path / "snippets.json", snippets))
    assert source.load().requests[0].references == ("A speaks English.",)


def test_flat_counterfact(tmp_path):
    (request,) = FlatCounterFact(write_json(tmp_path / "flat.json", [FLAT])).load().requests
    assert request.request_id == "7"
    assert request.prompt == "The dog of {} is named"
    assert request.neighbors == (Probe("The dog of Tom is named", "Bello"),)


def test_flat_counterfact_as_published(caplog):
    tables = FlatCounterFact(str(shared_data("edit/counterfact_edit_2000.json"))).load()
    assert len(tables.requests) == 1998
    assert sum(request.prompt.startswith("{}") for request in tables.requests) > 1500
    assert "2 of 2000 records are dropped, because a later record has the same prompt and subject" in caplog.text


def test_zsre():
    path = str(shared_data("edit/zsre_mend_sample.json"))
    first, second = ZsRE(path).load().requests
    assert first.prompt == "What university did {} attend?"
    assert first.target == "Illinois Institute of Technology"
    assert first.true is None
    assert first.neighbors == (Probe("nq question: who played desmond doss father in hacksaw ridge?", "Hugo Weaving"),)
    assert second.paraphrases == ("What's Christiane Cohendy's mother tongue?",)
    assert [request.target for request in ZsRE(path, target="alt").load().requests] == ["University of Michigan", "German"]


def test_qaedit():
    requests = QAEdit(str(shared_data("edit/qaedit_1k.json"))).load().requests
    assert len({request.request_id for request in requests}) == len(requests) == 1000
    assert all(len(request.neighbors) == 5 for request in requests)


def test_last_record_with_the_same_prompt_is_used(tmp_path):
    other = {**FLAT, "case_id": 8, "target_new": "Max"}
    source = FlatCounterFact(write_json(tmp_path / "flat.json", [FLAT, {**FLAT, "case_id": 9, "prompt": "Anna has"}, other]))
    assert [(request.request_id, request.target) for request in source.load().requests] == [("9", "Rex"), ("8", "Max")]


def test_lines_and_limits(tmp_path):
    path = tmp_path / "flat.jsonl"
    path.write_text("\n".join(json.dumps({**FLAT, "case_id": number, "prompt": f"Anna {number}"}) for number in range(5)))
    assert [request.request_id for request in FlatCounterFact(str(path), limit=2).load().requests] == ["0", "1"]
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "{} has", "subject": "Anna", "target": "a dog"}\n{"prompt": "{} has", "subject": "Tom", "target": "a cat"}\n')
    assert [request.subject for request in RequestFile(str(own), limit=1).load().requests] == ["Anna"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([FLAT, {**FLAT, "subject": "Tim"}], r"flat.json, entry 2: the subject 'Tim' does not occur in 'The dog of Anna is named'"),
        (
            [{"prompt": "x"}],
            r"flat.json, entry 1: the field 'subject' is missing; the fields .*; give a file of FlatCounterFact, or another source",
        ),
        ([{**FLAT, "target_new": "Bello"}], r"entry 1: target and true are both 'Bello'"),
        (["text"], r"entry 1: expected a JSON object, got 'text'"),
    ],
)
def test_invalid_records_are_named(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        FlatCounterFact(write_json(tmp_path / "flat.json", records)).load()


def test_other_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the file .* does not exist; give the file of edit records"):
        QAEdit(str(tmp_path / "none.json")).load()
    (tmp_path / "half.json").write_text("[{")
    with pytest.raises(ValueError, match=r"half.json: not JSON"):
        QAEdit(str(tmp_path / "half.json")).load()


@pytest.mark.parametrize("value", ["text", 1, None, {}, ["", "x"], [1], [None], [["x"]], "", [{}]])
@pytest.mark.parametrize("field", ["paraphrases", "generation_prompts", "references", "neighbors"])
def test_lists_of_requests_must_contain_strings(field, value, tmp_path):
    fields = {"request_id": "1", "prompt": "{} speaks", "subject": "Anna", "target": "English"}
    if value is None:
        return
    with pytest.raises(ValueError, match=field):
        EditRequest(**fields, **{field: value})
    with pytest.raises(ValueError, match=rf"r.json, entry 1: .*{'neighbor' if field == 'neighbors' else field}"):
        RequestFile(write_json(tmp_path / "r.json", [fields | {field: value}])).load()


@pytest.mark.parametrize("value", ["text", 1, None, {}, [1], [None]])
@pytest.mark.parametrize(
    ("source", "field"),
    [(CounterFact, "paraphrase_prompts"), (CounterFact, "neighborhood_prompts"), (CounterFact, "generation_prompts"), (QAEdit, "locality")],
)
def test_list_fields_of_records_must_be_lists(tmp_path, source, field, value):
    record = {"prompt": "Anna speaks", "subject": "Anna", "target": "English", "rephrase": "Anna says", "locality": []}
    if source is CounterFact:
        record = json.loads(shared_data("edit/counterfact_nested_sample.json").read_text())[0]
    with pytest.raises(ValueError, match=rf"r.json, entry 1: .*{'loc' if field == 'locality' else field}"):
        source(write_json(tmp_path / "r.json", [record | {field: value}])).load()


@pytest.mark.parametrize("value", [1, None, [], {}, ["x"], True])
@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"])
def test_text_fields_of_records_must_be_strings(tmp_path, field, value):
    if not value and field in ("rephrase_prompt", "locality_prompt"):
        return  # there is none
    with pytest.raises(ValueError, match=rf"r.json, entry 1: field {field}: expected a string, got"):
        FlatCounterFact(write_json(tmp_path / "r.json", [FLAT | {field: value}])).load()
