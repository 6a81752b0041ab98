import pytest
import torch

from malleable.lightning_modules.patches.delta import Delta


def factors(d1=5, r=2, d0=7):
    return torch.randn(d1, r), torch.randn(r, d0)


def test_low_rank_delta_equals_product():
    up, down = factors()
    delta = Delta(up, down)
    assert (delta.shape, delta.rank) == ((5, 7), 2)
    torch.testing.assert_close(delta.dense(), up @ down)
    assert delta.dense().dtype == torch.float32
    assert delta.norm == pytest.approx(float((up @ down).norm()), rel=1e-6)


def test_product_is_rounded_once():
    up, down = factors(r=64)
    assert torch.equal(Delta(up, down).dense(), (up.double() @ down.double()).float())


@pytest.mark.parametrize(("given", "kept"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_values_are_stored_in_float32_or_float64(given, kept):
    assert Delta(torch.ones(2, 2, dtype=given)).dense().dtype == kept


def test_delta_is_a_copy():
    values = torch.ones(3)
    delta = Delta(values)
    values.zero_()
    assert delta.norm == pytest.approx(3**0.5)


@pytest.mark.parametrize("low", [(False, False), (True, False), (False, True), (True, True)])
def test_inner_products_equal_dense_ones(low):
    pair = [factors(), factors(r=3)]
    one, two = (Delta(*parts) if factored else Delta(parts[0] @ parts[1]) for parts, factored in zip(pair, low, strict=True))
    dense = [(up @ down).flatten() for up, down in pair]
    assert one.dot(two) == pytest.approx(float(dense[0] @ dense[1]), rel=1e-4)
    assert one.cosine(two) == pytest.approx(float(torch.cosine_similarity(*dense, dim=0)), rel=1e-4)


def test_share_in_row_space_equals_dense_projection():
    # Three rows that span two directions.
    up, down = torch.randn(5, 3), torch.randn(3, 7)
    down[2] = down[0] - down[1]
    new, other = Delta(*factors()), Delta(up, down)
    whole = up.double() @ down.double()
    projector = torch.linalg.pinv(whole, rtol=1e-6) @ whole
    expected = float((new.dense().double() @ projector).norm() ** 2) / new.norm**2
    assert new.share_in_rows_of(other) == pytest.approx(expected, rel=1e-5)
    assert Delta(new.dense()).share_in_rows_of(other) == pytest.approx(expected, rel=1e-5)
    assert other.share_in_rows_of(other) == pytest.approx(1.0)
    assert new.share_in_rows_of(Delta(new.dense())) is None


def test_zero_delta():
    zero, one = Delta(torch.zeros(2, 1), torch.zeros(1, 2)), Delta(torch.ones(2, 2))
    assert (zero.cosine(one), one.share_in_rows_of(zero), zero.share_in_rows_of(zero)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        (torch.tensor([1.0, float("nan")]), None, "must be finite"),
        (torch.ones(2, 1), torch.tensor([[float("inf"), 1.0]]), "must be finite"),
        (torch.ones(2, dtype=torch.int64), None, r"floating-point tensor, got torch\.int64"),
        (torch.ones(2, 3), torch.ones(2, 3), r"got \(2, 3\) and \(2, 3\)"),
        (torch.ones(2), torch.ones(1, 2), r"got \(2,\) and \(1, 2\)"),
        (torch.ones(2, 0), torch.ones(0, 2), "r >= 1"),
    ],
)
def test_invalid_delta_raises(up, down, message):
    with pytest.raises(ValueError, match=message):
        Delta(up, down)
