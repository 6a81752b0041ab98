"""From files of triples to batches of queries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch
from query_run import Additive
from shared import shared_data
from tiny_data import quiet_trainer
from toy_graph import NAMES, RELATIONS, toy_graph, toy_triples, write_toy_graph

from malleable.datamodules import WN18RR, CoDExS, FB15k237
from malleable.datamodules.batch import KnowledgeGraph
from malleable.datamodules.graphs import store as graph_store
from malleable.datamodules.graphs.datamodule import KnowledgeGraphDataModule
from malleable.datamodules.sources.graphs.triples import Triples

HELPERS = Path(__file__).parents[2] / "helpers"
TRIPLES = toy_triples()
SIZES = {split: len(rows) for split, rows in TRIPLES.items()}


@pytest.fixture
def data(tmp_path: Path) -> KnowledgeGraphDataModule:
    module = toy_graph(tmp_path / "graph")
    module.prepare_data()
    module.setup("fit")
    return module


def labelled(graph: KnowledgeGraph, batches) -> list[tuple[str, str, str]]:
    """The triples that batches ask for, each query turned back to its direction."""
    found = []
    for batch in batches:
        for head, relation, tail in zip(
            batch.head[batch.target_row].tolist(), batch.relation[batch.target_row].tolist(), batch.target.tolist(), strict=True
        ):
            if relation >= len(graph.relations):
                head, relation, tail = tail, relation - len(graph.relations), head
            found.append((graph.entities[head], graph.relations[relation], graph.entities[tail]))
    return sorted(found)


def test_the_vocabulary_is_that_of_all_splits(data):
    assert data.graph.entities == tuple(sorted([*NAMES, "newcomer"]))
    assert data.graph.relations == RELATIONS
    assert (data.num_entities, data.num_relations) == (13, 6)
    by_hand = [sum(name in (h, t) for h, _, t in TRIPLES["train"]) for name in data.graph.entities]
    assert list(data.graph.degree) == by_hand
    assert list(data.graph.frequency) == [sum(r == name for _, r, _ in TRIPLES["train"]) for name in data.graph.relations]
    assert data.graph.degree[data.graph.entities.index("newcomer")] == 0


@pytest.mark.parametrize("grouped", [False, True])
def test_training_has_both_queries_of_every_triple(tmp_path, grouped):
    data = toy_graph(tmp_path / "graph", group_queries=grouped)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert labelled(data.graph, batches) == sorted(2 * TRIPLES["train"])
    assert all(batch.known.numel() == 0 for batch in batches)
    assert sum(map(len, batches)) == (data.report.queries if grouped else 2 * SIZES["train"])
    assert 0 < len(batches[-1]) == sum(map(len, batches)) % 8, "the short last batch is kept"


@pytest.mark.parametrize(("split", "file"), [("val", "valid"), ("test", "test")])
def test_evaluation_has_both_queries_of_every_triple_with_all_known_answers(data, split, file):
    batches = list(getattr(data, f"{split}_dataloader")())
    assert labelled(data.graph, batches) == sorted(2 * TRIPLES[file])
    everything = [row for rows in TRIPLES.values() for row in rows]
    entities, count = data.graph.entities, len(RELATIONS)
    for batch in batches:
        for row in range(len(batch)):
            head, relation = entities[batch.head[row]], int(batch.relation[row])
            name = RELATIONS[relation % count]
            by_hand = (
                {t for h, r, t in everything if (h, r) == (head, name)}
                if relation < count
                else {h for h, r, t in everything if (t, r) == (head, name)}
            )
            assert {entities[key] for key in batch.known[batch.known_row == row]} == by_hand
            assert int((batch.known_row == row).sum()) == len(by_hand)


def test_ids_are_distinct_and_stay(data, tmp_path):
    ids = {split: [key for batch in getattr(data, f"{split}_dataloader")() for key in batch.sample_id.tolist()] for split in ("train", "val", "test")}
    assert sorted(key for own in ids.values() for key in own) == list(range(2 * sum(SIZES.values())))
    dropped = toy_graph(tmp_path / "graph", unseen_entities="drop")
    dropped.setup("test")
    kept = [key for batch in dropped.test_dataloader() for key in batch.sample_id.tolist()]
    assert kept == ids["test"][:-2]
    grouped = toy_graph(tmp_path / "graph", group_queries=True)
    grouped.setup("fit")
    own = [key for batch in grouped.train_dataloader() for key in batch.sample_id.tolist()]
    assert len(set(own)) == len(own)
    assert set(own) <= set(ids["train"])


def test_unseen_entities(tmp_path, caplog):
    keep = toy_graph(tmp_path / "graph")
    keep.setup("test")
    assert "triples with an entity or relation that is not in training (1 entities): 0 of val, 1 of test; they are ranked" in caplog.text
    assert len(keep.test_dataset) == 2 * SIZES["test"]
    drop = toy_graph(tmp_path / "graph", unseen_entities="drop")
    drop.setup("test")
    assert "omitted, so figures are not comparable" in caplog.text
    assert len(drop.test_dataset) == 2 * SIZES["test"] - 2
    assert drop.num_entities == keep.num_entities
    with pytest.raises(
        ValueError, match=r"1 of \d+ test triples have an entity or a relation that is not in training \(first: \('newcomer', 'knows', 'p"
    ):
        toy_graph(tmp_path / "graph", unseen_entities="error").setup("test")


def test_limits_draw_the_same_triples_each_time(tmp_path):
    limited = [toy_graph(tmp_path / "graph", train_limit=10, val_limit=2) for _ in range(2)]
    for data in limited:
        data.setup("fit")
        assert (len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)) == (20, 4, 2 * SIZES["test"])
    first, second = (labelled(data.graph, data.val_dataloader()) for data in limited)
    assert first == second
    assert first[::2] == first[1::2], "both directions of the same triples"


def test_the_report_is_logged(tmp_path, caplog):
    data = toy_graph(tmp_path / "graph")
    data.setup("fit")
    assert "13 entities, 3 relations" in caplog.text
    assert f"{SIZES['train']} / {SIZES['valid']} / {SIZES['test']} triples" in caplog.text
    assert data.report.unseen == {"val": 0, "test": 1}


def test_a_leaking_graph_warns(tmp_path, caplog):
    (tmp_path / "leak").mkdir()
    pairs = [(f"e{k}", f"e{k + 1}") for k in range(20)]
    lines = {"train": [(a, "hyper", b) for a, b in pairs] + [(b, "hypo", a) for a, b in pairs[2:]], "test": [(b, "hypo", a) for a, b in pairs[:2]]}
    for split, rows in lines.items():
        (tmp_path / "leak" / f"{split}.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    data = KnowledgeGraphDataModule(Triples(str(tmp_path / "leak")))
    data.setup("test")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "100.0% of test follow from a training triple by hyper inverts hypo (100%)" in record.getMessage()
    with pytest.raises(ValueError, match="the val split is empty"):
        data.val_dataloader()


def test_the_cache_is_built_once_and_shared(tmp_path, cache, monkeypatch):
    data = toy_graph(tmp_path / "graph")
    data.prepare_data()
    (folder,) = (cache / "knowledge_graph").iterdir()
    monkeypatch.setattr(graph_store, "build", lambda *_: pytest.fail("built again"))
    data.setup("fit")
    other = toy_graph(tmp_path / "graph", group_queries=True, unseen_entities="drop", seed=9)
    other.setup("fit")
    assert [path.name for path in (cache / "knowledge_graph").iterdir()] == [folder.name]
    base = other.answers.tails.values
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap), "read from the disk when needed, not copied"


def test_other_files_make_another_cache(tmp_path, cache):
    toy_graph(tmp_path / "graph").prepare_data()
    path = tmp_path / "graph" / "train.txt"
    source = Triples(str(tmp_path / "graph"))
    before = graph_store.fingerprint(source)
    path.write_text(path.read_text() + "person 0\tknows\tperson 5\n")
    assert graph_store.fingerprint(source) != before
    data = KnowledgeGraphDataModule(source)
    data.setup("fit")
    assert len(data.train_dataset) == 2 * SIZES["train"] + 2
    assert len(list((cache / "knowledge_graph").iterdir())) == 2


def test_a_malformed_file_leaves_no_cache(tmp_path, cache):
    data = toy_graph(tmp_path / "graph")
    (tmp_path / "graph" / "test.txt").write_text("person 0\tknows\n")
    with pytest.raises(ValueError, match=r"test.txt, line 1: 2 columns"):
        data.prepare_data()
    assert not (cache / "knowledge_graph").exists() or not list((cache / "knowledge_graph").iterdir())


def test_prediction_from_a_file(tmp_path):
    (tmp_path / "queries.tsv").write_text("person 0\tknows\n?\tolder than\tperson 5\n\nnewcomer\tnext to\t?\n")
    data = toy_graph(tmp_path / "graph", predict_file=str(tmp_path / "queries.tsv"), eval_batch_size=2)
    data.setup("predict")
    first, second = list(data.predict_dataloader())
    key = {label: number for number, label in enumerate(data.graph.entities)}
    assert first.sample_id.tolist() == [0, 1]
    assert first.head.tolist() == [key["person 0"], key["person 5"]]
    assert first.relation.tolist() == [0, 2 + 3]
    assert first.target.tolist() == second.target.tolist() == []
    older = {h for rows in TRIPLES.values() for h, r, t in rows if (r, t) == ("older than", "person 5")}
    assert {data.graph.entities[entity] for entity in first.known[first.known_row == 1]} == older
    assert (len(second), second.known.tolist()) == (1, [])


def test_types_and_descriptions(tmp_path):
    (tmp_path / "types.tsv").write_text("person 0\tadult\nperson 0\tpilot\n")
    (tmp_path / "texts.json").write_text(json.dumps({"person 1": "a neighbour"}))
    data = toy_graph(tmp_path / "graph", types_file=str(tmp_path / "types.tsv"), descriptions_file=str(tmp_path / "texts.json"))
    data.setup("fit")
    key = data.graph.entities.index("person 0")
    assert (data.types[key], data.types[key + 1]) == (("adult", "pilot"), ())
    assert data.descriptions[data.graph.entities.index("person 1")] == "a neighbour"
    assert len(data.types) == len(data.descriptions) == 13
    plain = toy_graph(tmp_path / "graph")
    plain.setup("fit")
    assert plain.types == plain.descriptions == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unseen_entities": "ignore"}, "unseen_entities must be keep, drop or error, got 'ignore'"),
        ({"val_limit": 0}, "val_limit must be >= 1, got 0"),
        ({"train_limit": -1}, "train_limit must be >= 1, got -1"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeGraphDataModule(Triples("nowhere"), **arguments)


def weights_of(module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values()])


@pytest.mark.parametrize("grouped", [False, True])
def test_accumulated_steps_learn_the_same_with_the_last_short_one(tmp_path, grouped):
    """Steps of 8 queries, in one pass, and in smaller passes that must be normalised over the step."""
    learnt, steps = [], set()
    for batch_size in (8, 4, 2, 1):
        data = toy_graph(tmp_path / "graph", batch_size=batch_size, global_batch_size=8, group_queries=grouped)
        data.prepare_data()
        data.setup("test")
        module = Additive(data.num_entities, data.num_relations)
        trainer = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0, enable_checkpointing=False, logger=False)
        trainer.fit(module, data)
        steps.add(trainer.global_step)
        learnt.append(weights_of(module))
    rows = data.report.queries if grouped else 2 * SIZES["train"]
    assert rows % 8, "the last step must be short, or this shows nothing"
    assert steps == {2 * -(-rows // 8)}
    for other in learnt[1:]:
        torch.testing.assert_close(other, learnt[0], atol=1e-6, rtol=1e-5)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_learn_and_test_the_same(tmp_path):
    write_toy_graph(tmp_path / "graph")
    script = [str(HELPERS / "query_run.py"), str(tmp_path)]
    launch(script, ranks=1)
    launch(script, ranks=2)
    for size in (4, 2):
        for grouped in (0, 1):
            alone = json.loads((tmp_path / "ranks1" / "0" / f"{size}_{grouped}.json").read_text())
            pair = [json.loads((tmp_path / "ranks2" / str(rank) / f"{size}_{grouped}.json").read_text()) for rank in range(2)]
            for rank in pair:
                assert rank["steps"] == alone["steps"]
                for name, value in alone["weights"].items():
                    torch.testing.assert_close(torch.tensor(rank["weights"][name]), torch.tensor(value), atol=1e-6, rtol=1e-5)
            assert sorted(pair[0]["evaluated"] + pair[1]["evaluated"]) == sorted(alone["evaluated"])


@pytest.mark.parametrize(
    ("source", "name", "counts"),
    [
        (WN18RR, "WN18RR", (40_943, 22, 173_670, 103_509, 6_068, 6_268, 5_848)),
        (FB15k237, "FB15k-237", (14_541, 474, 544_230, 149_689, 35_070, 40_932, 40_876)),
        (CoDExS, "codex-s", (2_034, 84, 65_776, None, 3_654, 3_656, 3_656)),
    ],
)
def test_real_graphs(source, name, counts):
    """Entities, relations with reciprocals, training queries plain and grouped, validation, test, and test without unseen entities."""
    folder = str(shared_data(f"kg/{name}"))
    plain = KnowledgeGraphDataModule(source(folder))
    plain.prepare_data()
    plain.setup("fit")
    entities, relations, train, grouped, val, test, seen = counts
    assert (plain.num_entities, plain.num_relations) == (entities, relations)
    assert (len(plain.train_dataset), len(plain.val_dataset), len(plain.test_dataset)) == (train, val, test)
    together = KnowledgeGraphDataModule(source(folder), group_queries=True, unseen_entities="drop")
    together.setup("fit")
    assert len(together.train_dataset) == (grouped or plain.report.queries)
    assert len(together.test_dataset) == seen
    assert sum(together.row_tokens()) == train
    batch = next(iter(plain.test_dataloader()))
    assert torch.isin(batch.target, batch.known).all()
