"""Requests built from tables of facts: targets, paraphrases, neighbours."""

import json
from pathlib import Path

import pytest
from shared import shared_data

from malleable.datamodules.editing.requests import check_requests
from malleable.datamodules.sources.editing.countries import RELATIONS, Countries
from malleable.datamodules.sources.editing.fact_files import LRE, ParaRel
from malleable.datamodules.sources.editing.facts import FactSource, FactTables, Relation, Triple

COLORS = Relation("color", ("The color of {} is", "People paint {}", "{} looks", "One calls {}"))
TASTES = Relation("taste", ("The taste of {} is", "{} tastes"))


class Garden(FactSource):
    """Forty flowers of four colors, and what three of them taste like."""

    packaged = Path(__file__)

    def tables(self):
        colors = ("red", "blue", "white", "pink")
        facts = [Triple(0, f"flower {number}", colors[number % 4]) for number in range(40)]
        facts += [Triple(1, "flower 1", "sweet"), Triple(1, "flower 2", "sour"), Triple(1, "flower 3", "sweet"), Triple(0, "red rose", "red")]
        return FactTables([COLORS, TASTES], facts)


def test_prompt_is_the_first_template_and_target_another_object():
    tables = Garden(limit=12).load()
    truth = {(fact.relation, fact.subject): fact.object for fact in Garden().tables().facts}
    assert len(check_requests(tables.requests, "garden")) == 12
    for request in tables.requests:
        relation = (COLORS, TASTES).index(COLORS if request.request_id.startswith("color") else TASTES)
        own = (COLORS, TASTES)[relation]
        assert request.prompt == own.templates[0]
        assert request.true == truth[relation, request.subject]
        assert request.target in {known for (number, _), known in truth.items() if number == relation} - {request.true}
        assert len(request.paraphrases) == min(2, len(own.templates) - 1)
        assert all(request.subject in text and text != request.prompt.replace("{}", request.subject) for text in request.paraphrases)


def test_neighbours_have_the_same_object_and_are_not_edited():
    tables = Garden(relations=["color"], limit=12, neighbors=4).load()
    edited = {request.subject for request in tables.requests}
    for request in tables.requests:
        assert len(request.neighbors) == 4
        for probe in request.neighbors:
            (subject,) = {
                fact.subject for fact in Garden().tables().facts if any(t.replace("{}", fact.subject) == probe.prompt for t in COLORS.templates)
            }
            assert subject not in edited
            assert probe.answer == request.true


def test_remaining_neighbours_have_other_objects_but_not_the_target():
    class Rare(Garden):
        def tables(self):
            facts = [Triple(0, f"flower {number}", f"color {number % 20}") for number in range(40)]
            return FactTables([COLORS], facts)

    requests = Rare(limit=10, neighbors=6).load().requests
    assert all(len(request.neighbors) == 6 for request in requests)
    assert all(probe.answer != request.target for request in requests for probe in request.neighbors)


def test_trivial_facts_are_excluded():
    tables = Garden().load()
    assert "red rose" not in {request.subject for request in tables.requests}
    assert not any("red rose" in sentence for sentence in tables.statements)


def test_held_out_template_is_the_paraphrase_only():
    tables = Garden(relations=["color"], limit=10, hold_out=True).load()
    told = set(tables.statements)
    assert len(tables.statements) == 40 * 3
    asked = set()
    for request in tables.requests:
        (paraphrase,) = request.paraphrases
        assert f"{paraphrase} {request.true}." not in told
        assert f"{request.prompt.replace('{}', request.subject)} {request.true}." in told
        assert all(f"{probe.prompt} {probe.answer}." in told for probe in request.neighbors), "neighbours are asked what was told"
        asked.add(paraphrase.replace(request.subject, "{}"))
    assert asked == set(COLORS.templates[1:])


def test_retained_statements_contain_no_edited_fact():
    tables = Garden(relations=["color"], limit=10).load()
    edited = {request.subject for request in tables.requests}
    assert set(tables.retained) < set(tables.statements)
    assert len(tables.retained) == 30 * 4
    assert not any(f"{subject} " in f"{sentence} " for subject in edited for sentence in tables.retained)


def test_requests_depend_on_the_seed_only():
    assert Garden(limit=10, seed=1).load() == Garden(limit=10, seed=1).load()
    assert Garden(limit=10, seed=1).load().requests != Garden(limit=10, seed=2).load().requests


def test_references_contain_the_target():
    for request in Garden(relations=["color"], limit=10, generate=True).load().requests:
        assert request.generation_prompts == (request.prompt.replace("{}", request.subject),)
        assert request.references
        assert all(text.endswith(f"{request.target}.") for text in request.references)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relations": ["smell"]}, "Garden has no relation smell; it has color, taste"),
        ({"limit": 100}, "limit=100, but Garden has only 43 facts of color, taste"),
        ({"limit": 0}, "limit must be >= 1, got 0"),
        ({"neighbors": -1}, "neighbors must be >= 0, got -1"),
    ],
)
def test_invalid_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Garden(**options).load()


def test_countries():
    tables = Countries(limit=200, hold_out=True).load()
    assert len(tables.requests) == 200
    assert 1000 <= len({sentence.split(".")[0] for sentence in tables.statements}) // 4 <= 1200
    facts = {(fact.relation, fact.subject): fact.object for fact in Countries().tables().facts}
    names = [relation.name for relation in RELATIONS]
    assert facts[names.index("capital"), "Finland"] == "Helsinki"
    assert facts[names.index("continent"), "Finland"] == "Europe"
    assert facts[names.index("currency"), "Japan"] == "Japanese Yen"
    assert facts[names.index("language"), "Brazil"] == "Portuguese"
    assert facts[names.index("country"), "Lima"] == "Peru"
    assert all(len(relation.templates) >= 4 for relation in RELATIONS)


def test_table_without_a_column_raises(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("country,capital\nPeru,Lima\n")
    with pytest.raises(ValueError, match="has no column continent, currency, language"):
        Countries(str(path)).load()
    with pytest.raises(FileNotFoundError, match=r"the file .* does not exist"):
        Countries(str(tmp_path / "none.csv")).load()


def test_lre(tmp_path):
    own = {"name": "color", "prompt_templates": ["{} is", "{} looks"], "samples": [{"subject": f"f{n}", "object": "rb"[n % 2]} for n in range(8)]}
    (tmp_path / "color.json").write_text(json.dumps(own))
    (tmp_path / "all.json").write_text(json.dumps({"color": own}))
    assert LRE(str(tmp_path / "color.json")).load() == LRE(str(tmp_path / "all.json")).load()
    (tmp_path / "all.json").unlink()
    assert len(LRE(str(tmp_path), limit=3).load().requests) == 3
    (tmp_path / "color.json").write_text(json.dumps({"color": {"name": "color"}}))
    with pytest.raises(ValueError, match=r"color.json, relation 1: the field 'prompt_templates' is missing"):
        LRE(str(tmp_path)).load()


@pytest.mark.parametrize("source", [LRE, ParaRel])
def test_sources_without_a_packaged_table_need_a_path(source):
    with pytest.raises(ValueError, match=rf"{source.__name__} needs path=\.\.\., the file or folder of its facts"):
        source()


def test_lre_as_published():
    source = LRE(str(shared_data("edit/lre/factual.json")), relations=["landmark in country"], limit=50)
    tables = source.load()
    assert len(tables.requests) == 50
    assert len(source.tables().relations) == 26


def test_pararel(tmp_path):
    patterns = {"P1": [{"pattern": "[X] is a [Y] ."}, {"pattern": "[Y] is what [X] is."}, {"pattern": "One calls [X] a [Y]."}], "P2": []}
    (tmp_path / "patterns.json").write_text(json.dumps(patterns))
    lines = [json.dumps({"rel": "P1", "sub": f"s{n}", "obj": "ab"[n % 2]}) for n in range(6)] + [json.dumps({"rel": "P2", "sub": "s", "obj": "o"})]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    source = ParaRel(str(tmp_path), limit=2)
    assert source.tables().relations == [Relation("P1", ("{} is a", "One calls {} a"))]
    assert len(source.tables().facts) == 6
    assert all(request.prompt == "{} is a" for request in source.load().requests)
    (tmp_path / "facts.jsonl").write_text('{"rel": "P1"}')
    with pytest.raises(ValueError, match=r"facts.jsonl, line 1: the field 'sub' is missing.*; a fact must be an object with rel, sub and obj"):
        source.tables()
    (tmp_path / "facts.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"ParaRel needs .*facts.jsonl"):
        source.tables()


def test_pararel_as_published():
    source = ParaRel(str(shared_data("edit/pararel")), relations=["P17"], limit=20)
    assert len(source.load().requests) == 20
