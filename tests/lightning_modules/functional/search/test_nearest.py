"""Exact search equals a stable sort of all scores, whatever the blocks."""

import pytest
import torch

from malleable.lightning_modules.functional.search import nearest as module
from malleable.lightning_modules.functional.search.nearest import nearest, search_space
from malleable.lightning_modules.functional.search.vector_space import VectorSpace, unit_rows

METRICS = "dot", "cosine", "l2"
BLOCKS = None, 1, 7, 64, 5000
WIDTH, QUERIES = 8, 6


def sorted_scores(queries, vectors, k, metric="dot", allowed=None, exclude=None):
    """The first k of a stable sort of all scores, computed pair by pair in float64 and rounded to float32."""
    if metric == "cosine":
        queries, vectors = unit_rows(queries), unit_rows(vectors)
    queries, vectors = queries.double()[:, None], vectors.double()
    scores = (-(queries - vectors).square().sum(-1).sqrt() if metric == "l2" else (queries * vectors).sum(-1)).float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    for row, items in enumerate([] if exclude is None else exclude.tolist()):
        scores[row, [item for item in items if item >= 0]] = -torch.inf
    values, items = scores.sort(dim=1, descending=True, stable=True)
    items = items.masked_fill(values == -torch.inf, -1)[:, :k]
    missing = (0, k - items.shape[1])
    return torch.nn.functional.pad(items, missing, value=-1), torch.nn.functional.pad(values[:, :k], missing, value=-torch.inf)


def check(found, expected):
    assert found.items.tolist() == expected[0].tolist()
    assert torch.equal(found.scores, expected[1])


def data(kind, count, generator):
    vectors, queries = (torch.randn(size, WIDTH, generator=generator) for size in (count, QUERIES))
    if kind == "equal scores":
        vectors, queries = vectors.round(), queries.round()
    elif kind == "equal vectors":
        vectors = vectors[torch.randint(0, max(1, count // 20), (count,), generator=generator)]
    elif kind == "common offset":
        vectors, queries = vectors + 1000, queries + 1000
    elif kind == "zeros":
        vectors[::2] = queries[::3] = 0
    elif kind == "ascending":
        queries[:, 1:] = 0
        vectors = vectors[vectors[:, 0].argsort()]
    return queries, vectors


KINDS = "random", "equal scores", "equal vectors", "common offset", "zeros", "ascending"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_search_equals_a_stable_sort_for_every_block(kind, metric):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 200):
        queries, vectors = data(kind, count, generator)
        allowed = torch.rand(QUERIES, count, generator=generator) < 0.5
        exclude = torch.randint(-1, count, (QUERIES, 6), generator=generator)
        for k in (1, 5, 30):
            for masks in ({}, {"allowed": allowed}, {"allowed": allowed[0]}, {"exclude": exclude}, {"allowed": allowed, "exclude": exclude}):
                expected = sorted_scores(queries, vectors, k, metric, **masks)
                for block in BLOCKS:
                    check(nearest(queries, vectors, k, metric=metric, block=block, **masks), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_many_vectors_in_many_blocks(metric, monkeypatch):
    """Wide enough for the rounding of products, and more queries than a product has."""
    monkeypatch.setattr(module, "QUERIES", 32)
    vectors, queries = torch.randn(2000, 64), torch.randn(75, 64)
    vectors[1500:2000] = vectors[:500]
    for k, block in ((10, 160), (50, None)):
        check(nearest(queries, vectors, k, metric=metric, block=block), sorted_scores(queries, vectors, k, metric))


def test_equal_vectors_are_found_in_order_where_products_differ_in_their_last_bits(monkeypatch):
    """A hundred equal vectors at the limit of the result; products are disturbed by less than their bound."""
    queries, vectors = torch.randn(4, 64), torch.randn(1000, 64)
    vectors[300:900:6] = queries[0] / 10
    product = VectorSpace.products

    def disturbed(self, part, formed, out):
        product(self, part, formed, out)
        out += torch.rand_like(out) * 1e-6

    monkeypatch.setattr(VectorSpace, "products", disturbed)
    for metric in METRICS:
        found = nearest(queries, vectors, 20, metric=metric)
        check(found, sorted_scores(queries, vectors, 20, metric))
    assert found.items[0].tolist() == list(range(300, 420, 6))


def test_few_queries_are_searched_twice(monkeypatch):
    """Else the first pass would be of no use."""
    searches = []
    again = module._Search.above_product
    monkeypatch.setattr(module._Search, "above_product", lambda self, *args: searches.append(len(self.queries)) or again(self, *args))
    nearest(torch.randn(500, 64), torch.randn(5000, 64), 10)
    assert sum(searches) < 10


def test_results_do_not_depend_on_the_other_queries():
    queries, vectors = torch.randn(20, 33), torch.randn(500, 33)
    together = nearest(queries, vectors, 7, metric="l2")
    for row in range(20):
        alone = nearest(queries[row : row + 1], vectors, 7, metric="l2")
        assert torch.equal(alone.items[0], together.items[row])
        assert torch.equal(alone.scores[0], together.scores[row])


def test_missing_results_are_padded():
    allowed = torch.zeros(2, 5, dtype=torch.bool)
    allowed[0, 3] = True
    found = nearest(torch.randn(2, 4), torch.randn(5, 4), 7, allowed=allowed)
    assert found.items.tolist() == [[3, *[-1] * 6], [-1] * 7]
    assert (found.scores[0, 1:] == -torch.inf).all()
    assert nearest(torch.randn(2, 4), torch.randn(0, 4), 3).items.tolist() == [[-1] * 3] * 2
    assert nearest(torch.randn(0, 4), torch.randn(5, 4), 3).items.shape == (0, 3)


@pytest.mark.parametrize("metric", METRICS)
def test_numbers_that_are_not_finite_are_never_found(metric):
    queries, vectors = torch.randn(3, 4), torch.randn(40, 4)
    expected = sorted_scores(queries, vectors, 40, metric, allowed=torch.arange(40) % 10 > 0)
    vectors[::20, 0], vectors[10::20, 1] = torch.nan, torch.inf
    found = nearest(queries, vectors, 40, metric=metric)
    assert torch.equal(found.items, expected[0])
    torch.testing.assert_close(found.scores, expected[1])
    queries[1, 2] = torch.nan
    again = nearest(queries, vectors, 40, metric=metric)
    assert again.items[1].tolist() == [-1] * 40
    assert torch.equal(again.items[::2], found.items[::2])


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15, 1e30])
def test_the_length_of_vectors_does_not_change_cosines(scale):
    queries, vectors = torch.randn(5, 12), torch.randn(200, 12)
    expected, found = nearest(queries, vectors, 9, metric="cosine"), nearest(queries / scale, vectors * scale, 9, metric="cosine")
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_other_dtypes(dtype, metric):
    queries, vectors = torch.randn(5, 12, dtype=dtype), torch.randn(200, 12, dtype=dtype)
    check(nearest(queries, vectors, 9, metric=metric, block=50), sorted_scores(queries, vectors, 9, metric))


def test_a_vector_is_at_distance_zero_from_itself():
    vectors = torch.randn(50, 16) + 300
    found = nearest(vectors, vectors, 1, metric="l2")
    assert found.items[:, 0].tolist() == list(range(50))
    assert (found.scores == 0).all()


def test_a_first_pass_may_be_given():
    """It is not used where items are excluded."""
    queries, vectors = torch.randn(5, 12), torch.randn(200, 12)
    calls = []

    def first_pass(formed, keep):
        calls.append(keep)
        products = formed @ vectors.T
        top = products.topk(keep)
        return top.indices, top.values

    space = VectorSpace(vectors)
    check(search_space(space, queries, 9, first_pass=first_pass), sorted_scores(queries, vectors, 9))
    allowed = torch.arange(200) % 2 > 0
    check(search_space(space, queries, 9, first_pass=first_pass, allowed=allowed), sorted_scores(queries, vectors, 9, allowed=allowed))
    assert len(calls) == 1
    assert calls[0] > 9


WRONG = {
    "metric must be one of dot, cosine, l2; got 'cos'": {"metric": "cos"},
    "k must be >= 1, got 0": {"k": 0},
    "block must be >= 1, got 0": {"block": 0},
    r"queries must have the shape \(B, 4\), as wide as the vectors; got \(2, 5\)": {"queries": torch.zeros(2, 5)},
    r"vectors must have the shape \(N, d\), got \(4,\)": {"vectors": torch.zeros(4)},
    r"allowed must be bool of shape \(3,\) or \(2, 3\), got torch.bool of shape \(2,\)": {"allowed": torch.ones(2, dtype=torch.bool)},
    r"allowed must be bool of shape \(3,\) or \(2, 3\), got torch.int64": {"allowed": torch.ones(3, dtype=torch.long)},
    r"exclude must be int64 of shape \(2, E\), got torch.int64 of shape \(1, 3\)": {"exclude": torch.zeros(1, 3, dtype=torch.long)},
    "exclude must contain positions from 0 to 2, or -1 for padding; got -1 to 3": {"exclude": torch.tensor([[-1], [3]])},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message):
    arguments = {"queries": torch.zeros(2, 4), "vectors": torch.zeros(3, 4), "k": 2} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        nearest(arguments.pop("queries"), arguments.pop("vectors"), **arguments)
