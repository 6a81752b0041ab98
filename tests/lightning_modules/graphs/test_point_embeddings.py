"""The baselines against the literal loops."""

import literal_kg
import pytest
import torch
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData, collate_queries, query_rows, tiny_graph, tiny_triples

from malleable.lightning_modules.graphs.point_embeddings import ComplEx, DistMult, RotatE, TransE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init
from malleable.lightning_modules.losses.embedding import N3

KINDS = {TransE: "Translation", DistMult: "Diagonal", ComplEx: "ComplexDiagonal", RotatE: "Rotation"}
WIDTHS = {TransE: (8, 8), DistMult: (8, 8), ComplEx: (16, 16), RotatE: (16, 8)}
EVERY = pytest.mark.parametrize("kind", KINDS)


def make(kind, **settings):
    torch.manual_seed(0)
    module = kind(**{"dimension": 8, "graph": tiny_graph(), "init": Init("normal", 0.7), **settings})
    module.configure_model()
    return module


@EVERY
def test_loss_and_gradient_equal_the_literal_ones(kind):
    module, batch = make(kind), collate_queries(query_rows(tiny_triples()))
    entity, relation = (table.weight for table in module.tables)
    assert (entity.shape[1], relation.shape[1]) == WIDTHS[kind]
    scores = -literal_kg.distance(KINDS[kind], entity[batch.head][:, None], relation[batch.relation][:, None], entity[None])
    expected = literal_kg.loss(scores, batch.target)
    loss = module.compute_loss(batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for own, literally in zip(torch.autograd.grad(expected, (entity, relation)), torch.autograd.grad(loss, (entity, relation)), strict=True):
        torch.testing.assert_close(own.to_dense(), literally.to_dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [TransE, RotatE])
def test_distances_have_a_margin(kind):
    triples = [(0, 0, 1), (3, 2, 5)]
    torch.testing.assert_close(make(kind, gamma=2.5).score(triples) - 2.5, make(kind).score(triples))


def test_rotations_are_initialised_over_the_circle():
    angles = make(RotatE, dimension=200).tables[1].weight
    assert angles.abs().max() <= torch.pi
    assert angles.abs().max() > 3


def test_moduli_of_complex_numbers_are_regularised():
    module = make(ComplEx, regulariser=N3(0.3))
    batch = collate_queries(query_rows(tiny_triples())[:1])
    rows = (module.tables[0](batch.head), module.tables[1](batch.relation), module.tables[0](batch.target))
    expected = sum(torch.complex(*row.chunk(2, 1)).abs().pow(3).sum() for row in rows) * 0.1
    torch.testing.assert_close(module.compute_loss(batch).extras["penalty"], expected.detach())
    plain = make(ComplEx).compute_loss(batch).loss
    torch.testing.assert_close(module.compute_loss(batch).loss, plain + expected)
    rotating = make(RotatE, regulariser=N3(0.3))
    assert rotating.compute_loss(batch).extras["penalty"] > 0


@EVERY
def test_learns(kind, tmp_path):
    module = kind(dimension=16, tuning=EmbeddingTuning(lr=0.1), **({"gamma": 3.0} if kind in (TransE, RotatE) else {}))
    trainer = quiet_trainer(tmp_path, max_epochs=40, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, TinyGraphData(batch_size=24))
    (figures,) = trainer.test(module, TinyGraphData(), verbose=False)
    # A ring cannot be translated into itself, and a diagonal has no direction.
    assert figures["test_mrr"] > {TransE: 0.3, DistMult: 0.5}.get(kind, 0.9)
