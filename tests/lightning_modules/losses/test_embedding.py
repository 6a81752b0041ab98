"""The losses against their literal forms: one query, one entity at a time."""

import json

import literal_kg
import pytest
import torch
from torch.nn import functional as F

from malleable.lightning_modules.functional.flows import NFE1, Vectors, score_all
from malleable.lightning_modules.losses.described import object_from_plain
from malleable.lightning_modules.losses.embedding import (
    DURA,
    F2,
    N3,
    BCESum,
    EmbeddingLoss,
    KvsAll,
    NegativeSampling,
    Positives,
    Regulariser,
    Softmax,
)

B, E, W = 6, 11, 5
# Grouped: queries of 1, 3, 0, 2, 1 and 1 true tails.
ROW = torch.tensor([0, 1, 1, 1, 3, 3, 4, 5])
TARGET = torch.tensor([2, 0, 10, 3, 3, 7, 10, 1])
POSITIVES = Positives(TARGET, ROW, B)
LABELS = torch.zeros(B, E, dtype=torch.float64).index_put((ROW, TARGET), torch.ones(8, dtype=torch.float64))


def vectors(biases=True, seed=0, dtype=torch.float64):
    """Queries and entities that want gradient."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((B, W), (B,), (E, W), (E,))]
    return (Vectors(parts[0], parts[1]), Vectors(parts[2], parts[3])) if biases else (Vectors(parts[0]), Vectors(parts[2]))


def run(loss, query, key, positives=POSITIVES, normaliser=1.0):
    return loss(query, lambda ids: key if ids is None else key.rows(ids), positives, len(key.vector), normaliser)


def gradients(loss, *sides):
    parts = [part for side in sides for part in side if part is not None]
    return torch.autograd.grad(loss, parts)


def smooth(labels, smoothing):
    return (1 - smoothing) * labels + smoothing / E


def literal(kind, scores, smoothing):
    """Cross-entropies of every true tail by itself (of every query for K-vs-all), summed."""
    if kind is KvsAll:
        kept = LABELS.sum(1) > 0
        return F.binary_cross_entropy_with_logits(scores[kept], smooth(LABELS, smoothing)[kept] if smoothing else LABELS[kept], reduction="sum")
    total = 0
    for row, tail in zip(ROW, TARGET, strict=True):
        label = smooth(F.one_hot(tail, E).double(), smoothing)
        if kind is BCESum:
            total = total + F.binary_cross_entropy_with_logits(scores[row], label, reduction="sum")
        else:
            total = total - (label * scores[row].log_softmax(0)).sum()
    return total


@pytest.mark.parametrize("chunk_scores", [None, 1, 20, 24, 6 * 11])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kind", [BCESum, Softmax, KvsAll])
def test_loss_and_gradient_equal_the_literal_ones(kind, biases, smoothing, chunk_scores):
    query, key = vectors(biases)
    expected = literal(kind, score_all(query, key), smoothing) / 7
    loss = run(kind(smoothing, chunk_scores), query, key, normaliser=torch.tensor(7.0))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(loss * 3, query, key), gradients(expected * 3, query, key), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(run(kind(smoothing, chunk_scores), query, key, normaliser=7.0), expected, rtol=1e-12, atol=0)


def test_single_precision_stays_within_its_rounding():
    query, key = vectors(dtype=torch.float32)
    expected = literal(BCESum, score_all(query, key).double(), 0.0)
    loss = run(BCESum(chunk_scores=20), query, key)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for own, literally in zip(gradients(loss, query, key), gradients(expected, query, key), strict=True):
        torch.testing.assert_close(own, literally, rtol=1e-5, atol=1e-5)


def test_golden_loss():
    """NFE-1 scores 1, -11.5, -7.75 with gamma 1: softplus(-1) + softplus(-11.5) + softplus(-7.75) = 0.313702."""
    h, r = torch.tensor([[0.5, -1, 2, -0.5]]), torch.tensor([[0.25, 0.5, -1.5, 2]])
    tails = torch.tensor([[-0.5, -1.5, 3, 1], [0, 0, 0, 0], [1, -2, 0.5, -1]])
    query = NFE1().query(h, r)
    query = query._replace(bias=query.bias + 1)
    positives = Positives(torch.tensor([0]), torch.tensor([0]), 1)
    assert score_all(query, NFE1().key(tails)).tolist() == [[1, -11.5, -7.75]]
    assert run(BCESum(), query, NFE1().key(tails), positives).item() == pytest.approx(0.313702, abs=1e-6)
    assert literal_kg.loss(score_all(query, NFE1().key(tails)), torch.tensor([0])).item() == pytest.approx(0.313702, abs=1e-6)


@pytest.mark.parametrize("kind", [BCESum, Softmax])
def test_grouping_identical_queries_changes_nothing(kind):
    query, key = vectors()
    single = query.rows(ROW)
    one_by_one = Positives(TARGET, torch.arange(len(ROW)), len(ROW))
    grouped, apart = run(kind(), query, key), run(kind(), single, key, one_by_one)
    torch.testing.assert_close(grouped, apart)
    torch.testing.assert_close(gradients(grouped, query, key), gradients(apart, query, key))
    assert kind().weight(POSITIVES) == kind().weight(one_by_one) == 8
    assert KvsAll().weight(POSITIVES) == 5


def test_literal_official_loss():
    query, key = vectors()
    positives = Positives(torch.tensor([2, 0, 10, 3, 3, 7]), torch.arange(B), B)
    loss = run(BCESum(), query, key, positives, normaliser=B)
    torch.testing.assert_close(loss, literal_kg.loss(score_all(query, key), positives.target))
    gradient = torch.autograd.grad(literal_kg.loss(score_all(query, key), positives.target), query.bias)
    torch.testing.assert_close(torch.autograd.grad(loss, query.bias), gradient)


def test_only_what_wants_gradient_gets_some():
    query, key = vectors()
    loss = run(BCESum(), Vectors(query.vector.detach(), query.bias), key)
    assert [part.shape for part in torch.autograd.grad(loss, (query.bias, key.vector))] == [(B,), (E, W)]
    with torch.no_grad():
        assert not run(BCESum(), query, key).requires_grad


def test_gradients_are_handed_out_once():
    query, key = vectors()
    loss = run(BCESum(), query, key)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again instead of retain_graph=True"):
        loss.backward()


def test_full_precision_under_mixed_precision():
    query, key = vectors(dtype=torch.float32)
    expected = run(BCESum(), query, key)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(BCESum(), query, key)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)


class TestNegativeSampling:
    def literal(self, query, key, drawn, temperature):
        total = 0
        scores = score_all(query, key)
        for place, (row, tail) in enumerate(zip(ROW.tolist(), TARGET.tolist(), strict=True)):
            entities = [entity for entity in drawn[place].tolist() if entity != tail]
            negative = scores[row, entities]
            weight = (temperature * negative.detach()).softmax(0) if temperature else torch.full_like(negative, 1 / max(1, len(entities)))
            total = total + F.softplus(-scores[row, tail]) + (weight * F.softplus(negative)).sum()
        return total

    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("biases", [True, False])
    def test_equals_the_literal_form(self, temperature, shared, biases):
        query, key = vectors(biases)
        torch.manual_seed(5)
        loss = run(NegativeSampling(4, temperature, shared), query, key, normaliser=8)
        torch.manual_seed(5)
        drawn = torch.randint(E, (1 if shared else 8, 4)).expand(8, 4)
        expected = self.literal(query, key, drawn, temperature) / 8
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(loss, query, key), gradients(expected, query, key))

    def test_asks_for_what_it_draws_only(self):
        query, key = vectors()
        asked = []
        NegativeSampling(3, shared=True)(query, lambda ids: asked.append(ids) or key.rows(ids), POSITIVES, E, 1)
        assert [len(ids) for ids in asked] == [8 + 3]

    def test_a_graph_of_one_entity(self):
        query, key = vectors()
        positives = Positives(torch.tensor([0]), torch.tensor([0]), B)
        for temperature in (0.0, 1.0):
            assert NegativeSampling(2, temperature)(query, lambda ids: key.rows(ids), positives, 1, 1).isfinite()


def test_regularisers_by_hand():
    rows = tuple(torch.tensor([[value, 2.0]]) for value in (1.0, 2.0, 3.0))
    query, key = Vectors(torch.tensor([[1.0, 2.0]])), Vectors(torch.tensor([[3.0, 0.0]]))
    assert F2(0.3)(rows, query, key).item() == pytest.approx(0.1 * (1 + 4 + 9 + 12))
    assert N3(0.3)(rows, query, key).item() == pytest.approx(0.1 * (1 + 8 + 27 + 24))
    assert DURA(0.5)(rows, query, key).item() == pytest.approx(0.5 * (5 + 9))


@pytest.mark.parametrize("thing", [BCESum(0.1, 7), Softmax(), KvsAll(0.2), NegativeSampling(3, 0.5, True), F2(0.2), N3(), DURA(0.1)])
def test_a_checkpoint_describes_them(thing):
    stored = json.loads(json.dumps(thing.as_plain()))
    base = EmbeddingLoss if isinstance(thing, EmbeddingLoss) else Regulariser
    again = object_from_plain(base, stored)
    assert type(again) is type(thing)
    assert again.as_plain() == stored
    with pytest.raises(TypeError, match=f"which is no {base.__name__}"):
        object_from_plain(base, {"class_path": "torch.nn.MSELoss"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BCESum(smoothing=1), r"smoothing must lie in \[0, 1\), got 1"),
        (lambda: Softmax(chunk_scores=0), "chunk_scores must be >= 1, got 0"),
        (lambda: NegativeSampling(0), "num_negatives must be >= 1, got 0"),
        (lambda: NegativeSampling(temperature=-1), "temperature must be >= 0, got -1"),
        (lambda: N3(-1), "weight must be >= 0, got -1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
