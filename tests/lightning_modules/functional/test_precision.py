"""The guards of full precision."""

import pytest
import torch

from malleable.lightning_modules.functional.graphs.flows import NFE1, NFE2, NFE3, AffinePoint, Sigma
from malleable.lightning_modules.functional.graphs.interaction import score_all, score_pairs
from malleable.lightning_modules.functional.graphs.points import ComplexDiagonal, Diagonal, Rotation, Translation
from malleable.lightning_modules.functional.precision import exact_products, full, full_precision
from malleable.lightning_modules.functional.search.nearest import nearest

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
INTERACTIONS = NFE1(), NFE2(), NFE2("uniform", True), NFE3(), AffinePoint(), Sigma(), Translation(), Diagonal(), ComplexDiagonal(), Rotation()


@HALF
def test_a_guarded_function_computes_outside_autocast(dtype):
    @full_precision
    def product(left, right, *, scale):
        """Multiply."""
        return scale * (left @ right)

    left, right = torch.randn(2, 5, 5)
    expected = product(left, right, scale=2)
    with torch.autocast("cpu", dtype):
        assert torch.equal(product(left, right, scale=2), expected)
        assert (left @ right).dtype is dtype
    assert product.__doc__ == "Multiply."


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_exact_products_are_exact_and_restore_the_setting(setting):
    torch.set_float32_matmul_precision(setting)
    try:
        with exact_products():
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")


def test_full():
    for dtype in (torch.bfloat16, torch.float16):
        assert full(torch.ones(1, dtype=dtype)).dtype is torch.float32
    for dtype in (torch.float32, torch.float64):
        value = torch.ones(1, dtype=dtype)
        assert full(value) is value


@HALF
@pytest.mark.parametrize("interaction", INTERACTIONS, ids=lambda interaction: type(interaction).__name__)
def test_interactions_score_alike_under_autocast(interaction, dtype):
    sizes = 8 * len(interaction.entity_parts), 8 * len(interaction.relation_parts)
    head, tail, relation = torch.randn(9, sizes[0]), torch.randn(13, sizes[0]), torch.randn(9, sizes[1])

    def scores():
        query, key = interaction.query(head, relation), interaction.key(tail)
        return score_all(query, key), score_pairs(query, key.rows(slice(0, 9)))

    expected = scores()
    with torch.autocast("cpu", dtype):
        found = scores()
    for own, other in zip(found, expected, strict=True):
        assert own.dtype is torch.float32
        assert torch.equal(own, other)


@HALF
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_nearest_vectors_are_the_same_under_autocast(dtype, metric):
    queries, vectors = torch.randn(7, 32), torch.randn(101, 32)
    expected = nearest(queries, vectors, 5, metric=metric)
    with torch.autocast("cpu", dtype):
        found = nearest(queries, vectors, 5, metric=metric)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))
