"""What computes with weights says so where there are none yet."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import batch_of, tiny_catalog, tiny_rows
from tiny_graph import tiny_graph

import malleable
from malleable.datamodules.negative_samplers import SelfPlay

BATCH = batch_of(tiny_rows(2))
PACKED = batch_of([{"sample_id": 0, "input_ids": [2, 4, 1], "document_ids": [1, 1, 1]}])
CALLS = [
    *((name, lambda module: module.recommend(BATCH)) for name in ("SFT", "DPO", "SPRec")),
    ("SPRec", lambda module: module.generate_negatives(BATCH, SelfPlay())),
    *((name, lambda module: module.compute_loss(BATCH)) for name in ("SFT", "SPRec", "DPO")),
    ("CausalLM", lambda module: module.compute_loss(PACKED)),
    ("CausalLM", lambda module: module.predict_step(PACKED, 0)),
    *((name, lambda module: module.recommend(BATCH)) for name in ("Popularity", "ItemKNN", "Markov")),
    *((name, lambda module: module.query(torch.tensor([0]), torch.tensor([0]))) for name in ("NFE", "TransE")),
]


@pytest.mark.parametrize("number", range(len(CALLS)), ids=[f"{name}-{number}" for number, (name, _) in enumerate(CALLS)])
def test_a_call_before_configure_model_is_an_error_with_the_remedy(number):
    name, call = CALLS[number]
    with pytest.raises(MisconfigurationException, match=rf"{name} has no weights yet: pass \w+=... and call configure_model\(\)"):
        call(getattr(malleable, name)())


def test_the_error_does_not_mention_existing_attributes():
    with pytest.raises(MisconfigurationException, match=r"ItemKNN has no weights yet: call configure_model\(\)"):
        malleable.ItemKNN(tiny_catalog()).recommend(BATCH)


@pytest.mark.parametrize("call", ["predict_tails('a', 'r')", "predict_heads('r', 'a')", "predict_relations('a', 'b')", "score([('a', 'r', 'b')])"])
def test_answers_by_label_need_labels(call):
    with pytest.raises(MisconfigurationException, match=r"NFE has no labels yet: pass graph=... and call configure_model\(\)"):
        eval(f"module.{call}", {"module": malleable.NFE()})


def test_answers_by_label_need_tables():
    graph = tiny_graph()
    with pytest.raises(MisconfigurationException, match="NFE has no weights yet"):
        malleable.NFE(graph=graph).predict_tails(graph.entities[0], graph.relations[0])


def test_the_history_replaces_missing_seen_items():
    rows = [{name: value for name, value in row.items() if name != "seen"} for row in tiny_rows(8)]
    batch = batch_of(rows)
    assert [[item for item in seen if item >= 0] for seen in batch.seen.tolist()] == [row["history"] for row in rows]
    module = malleable.Popularity(tiny_catalog())
    module.configure_model()
    assert not any(set(row["history"]) & set(found) for row, found in zip(rows, module.recommend(batch, 3).item_ids.tolist(), strict=True))
    # An empty list is a statement: everything may be recommended again.
    again = batch_of([row | {"seen": ()} for row in rows])
    assert again.seen.shape == (8, 0)
