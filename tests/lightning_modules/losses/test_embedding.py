"""The losses against their literal forms: one query, one entity at a time."""

import json

import literal_kg
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from malleable.lightning_modules.functional.graphs.flows import NFE1
from malleable.lightning_modules.functional.graphs.interaction import Vectors, score_all
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
from malleable.lightning_modules.serialization import object_from_plain

B, E, W = 6, 11, 5
# Grouped: queries of 1, 3, 0, 2, 1 and 1 true tails.
ROW = torch.tensor([0, 1, 1, 1, 3, 3, 4, 5])
TARGET = torch.tensor([2, 0, 10, 3, 3, 7, 10, 1])
POSITIVES = Positives(TARGET, ROW, B)
LABELS = torch.zeros(B, E, dtype=torch.float64).index_put((ROW, TARGET), torch.ones(8, dtype=torch.float64))


class Sides:
    """Queries, and a table of entities whose last column is the bias."""

    def __init__(self, biases=True, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        query, bias, table = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((B, W), (B,), (E, W + biases)))
        self.query = Vectors(query.requires_grad_(), bias.requires_grad_() if biases else None)
        self.entity = nn.Embedding(E, W + biases, _weight=table)
        self.biases = biases

    def key_of(self, rows):
        return Vectors(rows[:, :W], rows[:, W]) if self.biases else Vectors(rows)

    @property
    def scores(self):
        return score_all(self.query, self.key_of(self.entity.weight))

    def run(self, loss, positives=POSITIVES, normaliser=1.0, query=None):
        return loss(query or self.query, self.entity, self.key_of, positives, normaliser)

    def gradients(self, loss):
        return torch.autograd.grad(loss, [part for part in (*self.query, self.entity.weight) if part is not None])


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


@pytest.mark.parametrize("chunk", [None, 1, 4, 11])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kind", [BCESum, Softmax, KvsAll])
def test_loss_and_gradient_equal_the_literal_ones(kind, biases, smoothing, chunk):
    sides = Sides(biases)
    expected = literal(kind, sides.scores, smoothing) / 7
    loss = sides.run(kind(smoothing, chunk), normaliser=torch.tensor(7.0))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sides.gradients(loss * 3), sides.gradients(expected * 3), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(sides.run(kind(smoothing, chunk), normaliser=7.0), expected, rtol=1e-12, atol=0)


def test_single_precision_is_exact_up_to_rounding():
    sides = Sides(dtype=torch.float32)
    expected = literal(BCESum, sides.scores.double(), 0.0)
    loss = sides.run(BCESum(chunk=3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for own, literally in zip(sides.gradients(loss), sides.gradients(expected), strict=True):
        torch.testing.assert_close(own, literally, rtol=1e-5, atol=1e-5)


def test_golden_loss():
    """NFE-1 scores 1, -11.5, -7.75 with gamma 1: softplus(-1) + softplus(-11.5) + softplus(-7.75) = 0.313702."""
    h, r = torch.tensor([[0.5, -1, 2, -0.5]]), torch.tensor([[0.25, 0.5, -1.5, 2]])
    tails = torch.tensor([[-0.5, -1.5, 3, 1], [0, 0, 0, 0], [1, -2, 0.5, -1]])
    query = NFE1().query(h, r)
    query = query._replace(bias=query.bias + 1)
    positives = Positives(torch.tensor([0]), torch.tensor([0]), 1)
    assert score_all(query, NFE1().key(tails)).tolist() == [[1, -11.5, -7.75]]
    table = nn.Embedding(3, 4, _weight=tails)
    assert BCESum()(query, table, NFE1().key, positives, 1.0).item() == pytest.approx(0.313702, abs=1e-6)
    assert literal_kg.loss(score_all(query, NFE1().key(tails)), torch.tensor([0])).item() == pytest.approx(0.313702, abs=1e-6)


@pytest.mark.parametrize("kind", [BCESum, Softmax])
def test_grouping_identical_queries_changes_nothing(kind):
    sides = Sides()
    one_by_one = Positives(TARGET, torch.arange(len(ROW)), len(ROW))
    grouped, apart = sides.run(kind()), sides.run(kind(), one_by_one, query=sides.query.rows(ROW))
    torch.testing.assert_close(grouped, apart)
    torch.testing.assert_close(sides.gradients(grouped), sides.gradients(apart))
    assert kind().weight(POSITIVES) == kind().weight(one_by_one) == 8
    assert KvsAll().weight(POSITIVES) == 5


def test_literal_official_loss():
    sides = Sides()
    positives = Positives(torch.tensor([2, 0, 10, 3, 3, 7]), torch.arange(B), B)
    loss = sides.run(BCESum(), positives, normaliser=B)
    torch.testing.assert_close(loss, literal_kg.loss(sides.scores, positives.target))
    gradient = torch.autograd.grad(literal_kg.loss(sides.scores, positives.target), sides.query.bias)
    torch.testing.assert_close(torch.autograd.grad(loss, sides.query.bias), gradient)


def test_gradients_of_inputs_that_require_them_only():
    sides = Sides()
    loss = sides.run(BCESum(), query=Vectors(sides.query.vector.detach(), sides.query.bias))
    assert [part.shape for part in torch.autograd.grad(loss, (sides.query.bias, sides.entity.weight))] == [(B,), (E, W + 1)]
    sides.entity.requires_grad_(False)
    assert [part.shape for part in torch.autograd.grad(sides.run(BCESum()), sides.query)] == [(B, W), (B,)]
    with torch.no_grad():
        assert not sides.run(BCESum()).requires_grad


def test_a_second_backward_pass_is_an_error():
    sides = Sides()
    loss = sides.run(BCESum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again instead of using retain_graph=True"):
        loss.backward()


def test_full_precision_under_mixed_precision():
    sides = Sides(dtype=torch.float32)
    expected = sides.run(BCESum())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sides.run(BCESum())
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)


class TestNegativeSampling:
    def literal(self, scores, drawn, temperature):
        total = 0
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
        sides = Sides(biases)
        sampling = NegativeSampling(4, temperature, shared)
        loss = sides.run(sampling, normaliser=8)
        drawn = sampling.draw(POSITIVES, E).expand(8, 4)
        expected = self.literal(sides.scores, drawn, temperature) / 8
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sides.gradients(loss), sides.gradients(expected))

    def test_samples_depend_on_seed_query_and_tail_only(self):
        sampling, ids = NegativeSampling(16), torch.tensor([7, 2**62, 9, 40, 5, 3])
        whole = sampling.draw(Positives(TARGET, ROW, B, sample_id=ids, seed=3), E)
        assert whole.shape == (8, 16)
        assert len(whole.unique(dim=0)) == 8
        # The queries in another order and in two batches, with the tails of each query in another order.
        for rows in ([5, 3, 1], [4, 0, 2]):
            places = [place for row in rows for place in reversed((row == ROW).nonzero().flatten().tolist())]
            new_row = torch.tensor([rows.index(ROW[place]) for place in places])
            part = sampling.draw(Positives(TARGET[places], new_row, len(rows), sample_id=ids[rows], seed=3), E)
            assert torch.equal(part, whole[places])
        assert not torch.equal(sampling.draw(Positives(TARGET, ROW, B, sample_id=ids, seed=4), E), whole)

    def test_shared_samples_depend_on_the_seed_only(self):
        sampling = NegativeSampling(16, shared=True)
        whole = sampling.draw(Positives(TARGET, ROW, B, sample_id=torch.arange(B), seed=3), E)
        part = sampling.draw(Positives(TARGET[:1], ROW[:1], 1, sample_id=torch.tensor([80]), seed=3), E)
        assert whole.shape == (1, 16)
        assert torch.equal(part, whole)
        assert not torch.equal(sampling.draw(POSITIVES, E), whole)

    def test_only_sampled_rows_are_read(self):
        sides = Sides()
        sides.entity.sparse = True
        sides.run(NegativeSampling(3, shared=True)).backward()
        assert sides.entity.weight.grad.is_sparse
        assert sides.entity.weight.grad._nnz() == 8 + 3

    def test_a_graph_of_one_entity(self):
        sides = Sides()
        sides.entity = nn.Embedding(1, W + 1, dtype=torch.float64)
        positives = Positives(torch.tensor([0]), torch.tensor([0]), B)
        for temperature in (0.0, 1.0):
            assert sides.run(NegativeSampling(2, temperature), positives).isfinite()


@pytest.mark.parametrize("loss", [BCESum(), Softmax(), KvsAll(), NegativeSampling(3), NegativeSampling(3, 1.0, shared=True)])
def test_without_true_tails_the_loss_is_zero(loss):
    """What is left of a batch that only repeats others' rows."""
    sides = Sides()
    positives = Positives(TARGET[:0], ROW[:0], B)
    value = sides.run(loss, positives)
    assert value == 0
    assert loss.weight(positives) == 0
    assert not any(part.any() for part in sides.gradients(value))


def test_regularisers_by_hand():
    rows = tuple(torch.tensor([[value, 2.0]]) for value in (1.0, 2.0, 3.0))
    query, key = Vectors(torch.tensor([[1.0, 2.0]])), Vectors(torch.tensor([[3.0, 0.0]]))
    assert F2(0.3)(rows, query, key).item() == pytest.approx(0.1 * (1 + 4 + 9 + 12))
    assert N3(0.3)(rows, query, key).item() == pytest.approx(0.1 * (1 + 8 + 27 + 24))
    assert DURA(0.5)(rows, query, key).item() == pytest.approx(0.5 * (5 + 9))


@pytest.mark.parametrize("thing", [BCESum(0.1, 7), Softmax(), KvsAll(0.2), NegativeSampling(3, 0.5, True), F2(0.2), N3(), DURA(0.1)])
def test_regularisers_are_restored_from_plain_data(thing):
    stored = json.loads(json.dumps(thing.as_plain()))
    base = EmbeddingLoss if isinstance(thing, EmbeddingLoss) else Regulariser
    again = object_from_plain(base, stored)
    assert type(again) is type(thing)
    assert again.as_plain() == stored
    with pytest.raises(TypeError, match=f"which is not a subclass of {base.__name__}"):
        object_from_plain(base, {"class_path": "torch.nn.MSELoss"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BCESum(smoothing=1), r"smoothing must be in \[0, 1\), got 1"),
        (lambda: Softmax(chunk=0), "chunk must be >= 1, got 0"),
        (lambda: NegativeSampling(0), "num_negatives must be >= 1, got 0"),
        (lambda: NegativeSampling(temperature=-1), "temperature must be >= 0, got -1"),
        (lambda: N3(-1), "weight must be >= 0, got -1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
