"""Null-space updates: closed forms against the equations written out, bounds, and what must stay exactly as it is."""

import logging

import pytest
import torch

from malleable.lightning_modules.functional.editing.null_space import (
    Covariance,
    LowRank,
    NullSpace,
    NullSpaceRidge,
    Ridge,
    SecondMoment,
    Spectrum,
    Threshold,
    compress_keys,
    mean_drift,
    solve_update,
)

D, V, U, N = 24, 10, 5, 7


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def moment():
    text = draw(400, D) * torch.logspace(-2, 0.5, D, dtype=torch.double)
    return text.T @ text / len(text)


@pytest.fixture
def spectrum(moment):
    return Spectrum.of(moment)


@pytest.fixture
def null_space(spectrum):
    return NullSpace(spectrum, Threshold("absolute", 0.05).retained(spectrum.values))


def test_moment_is_the_mean_outer_product_however_it_is_cut():
    keys = draw(9000, D).float()
    whole, parts = SecondMoment(D), SecondMoment(D)
    whole.add(keys)
    for part in keys.split(37):
        parts.add(part)
    expected = keys.double().T @ keys.double() / len(keys)
    torch.testing.assert_close(whole.mean(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.mean(), whole.mean(), rtol=1e-5, atol=1e-6)
    assert whole.count == parts.count == 9000


def test_moment_keeps_small_directions_beside_a_massive_key():
    keys = draw(20000, 4).float() * 1e-3
    keys[:, 0] = 0
    keys[0, 0] = 3e4
    moment = SecondMoment(4)
    moment.add(keys)
    expected = keys[:, 1:].double().square().mean(0)
    torch.testing.assert_close(moment.mean().diagonal()[1:], expected, rtol=1e-4, atol=0)


def test_moment_refuses_nothing_and_infinity():
    with pytest.raises(ValueError, match="no keys"):
        SecondMoment(3).mean()
    moment = SecondMoment(3)
    moment.add(torch.tensor([[1.0, torch.inf, 0.0]]))
    with pytest.raises(ValueError, match="not finite"):
        moment.mean()


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_projector_is_one(spectrum, moment, share):
    retained = int(share * D)
    space = NullSpace(spectrum, retained)
    projector = space.dense()
    assert space.basis.shape[1] == min(retained, D - retained)
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector, projector.T)
    torch.testing.assert_close(projector.trace(), torch.tensor(float(retained), dtype=torch.double))
    torch.testing.assert_close(projector @ moment, moment @ projector)
    rest = spectrum.vectors[:, retained:]
    torch.testing.assert_close(projector + rest @ rest.T, torch.eye(D, dtype=torch.double))
    keys = draw(3, D)
    torch.testing.assert_close(space.project(keys), keys @ projector)


@pytest.mark.parametrize("retained", [6, 18])
@pytest.mark.parametrize("past", [0, N])
def test_dual_equals_every_other_form(spectrum, retained, past):
    space, ridge = NullSpace(spectrum, retained), 3.0
    keys, residuals, old = draw(U, D, seed=1), draw(U, V, seed=2), draw(past, D, seed=3)
    found = solve_update(keys, residuals, NullSpaceRidge(space, ridge), old).dense()
    projector, used = space.dense(), keys.T @ keys + old.T @ old
    eye = torch.eye(D, dtype=torch.double)
    right = projector @ keys.T @ residuals
    transposed = torch.linalg.solve(projector @ used + ridge * eye, right).T
    direct = residuals.T @ keys @ projector @ torch.linalg.inv(used @ projector + ridge * eye)
    symmetric = torch.linalg.solve(projector @ used @ projector + ridge * eye, right).T
    basis = spectrum.vectors[:, :retained]
    reduced = (basis @ torch.linalg.solve(basis.T @ used @ basis + ridge * torch.eye(retained, dtype=torch.double), basis.T @ keys.T @ residuals)).T
    for other in (transposed, direct, symmetric, reduced):
        assert (found - other).abs().max() < 1e-10
    torch.testing.assert_close(found @ projector, found)


def test_update_is_the_minimum(null_space):
    keys, residuals, old, ridge = draw(U, D, seed=1), draw(U, V, seed=2), draw(N, D, seed=3), 2.0
    projector = null_space.dense()

    def objective(update):
        update = update @ projector
        return (keys @ update.T - residuals).square().sum() + (old @ update.T).square().sum() + ridge * update.square().sum()

    found = solve_update(keys, residuals, NullSpaceRidge(null_space, ridge), old).dense().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found), found)
    assert gradient.abs().max() < 1e-10
    for seed in range(5):
        assert objective(found + 1e-3 * draw(V, D, seed=seed)) > objective(found)


def test_covariance_is_memit(spectrum, moment):
    keys, residuals, old, weight = draw(U, D, seed=1), draw(U, V, seed=2), draw(N, D, seed=3), 40.0
    found = solve_update(keys, residuals, Covariance(spectrum, weight, floor=1e-12), old).dense()
    expected = residuals.T @ keys @ torch.linalg.inv(old.T @ old + keys.T @ keys + weight * moment)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_without_past_and_projection_it_is_ridge_regression():
    keys, residuals = draw(U, D, seed=1), draw(U, V, seed=2)
    found = solve_update(keys, residuals, Ridge(1.5)).dense()
    expected = torch.linalg.solve(keys.T @ keys + 1.5 * torch.eye(D, dtype=torch.double), keys.T @ residuals).T
    torch.testing.assert_close(found, expected)


def test_vanishing_ridge_fits_exactly(null_space):
    keys, residuals = draw(U, D, seed=1), draw(U, V, seed=2)
    found = solve_update(keys, residuals, NullSpaceRidge(null_space, 1e-12)).dense()
    torch.testing.assert_close(keys @ found.T, residuals, rtol=1e-6, atol=1e-6)


def test_one_fact_leaves_the_share_that_the_ridge_says(null_space):
    key, residual, ridge = draw(1, D, seed=1), draw(1, V, seed=2), 10.0
    found = solve_update(key, residual, NullSpaceRidge(null_space, ridge)).dense()
    strength = float(key @ null_space.dense() @ key.T)
    torch.testing.assert_close(residual - key @ found.T, residual * ridge / (ridge + strength))


def test_drift_is_the_mean_over_text_and_bounded_by_the_threshold(moment, spectrum):
    threshold = 0.05
    space = NullSpace(spectrum, Threshold("absolute", threshold).retained(spectrum.values))
    update = solve_update(draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(space, 0.1))
    text = draw(400, D) * torch.logspace(-2, 0.5, D, dtype=torch.double)
    drift = mean_drift(update, moment)
    assert drift == pytest.approx(float((text @ update.dense().T).square().sum(1).mean()), rel=1e-9)
    assert 0 < drift <= threshold * float(update.dense().square().sum())
    free = solve_update(draw(U, D, seed=1), draw(U, V, seed=2), Ridge(0.1))
    assert mean_drift(free, moment) > threshold * float(free.dense().square().sum())


def test_text_that_leaves_directions_free_is_not_touched():
    text = draw(D // 2, D)
    spectrum = Spectrum.of(text.T @ text / len(text))
    space = NullSpace(spectrum, Threshold("absolute", 1e-9).retained(spectrum.values))
    assert space.retained == D - D // 2
    update = solve_update(draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(space, 1e-3)).dense()
    assert update.abs().max() > 0.1
    assert (text @ update.T).abs().max() < 1e-8


def test_earlier_edits_stay_only_if_their_keys_are_remembered(null_space):
    first, second = draw(U, D, seed=1), draw(U, D, seed=4) + 0.5 * draw(U, D, seed=1)
    with_past = solve_update(second, draw(U, V, seed=2), NullSpaceRidge(null_space, 0.01), 30 * first).dense()
    without = solve_update(second, draw(U, V, seed=2), NullSpaceRidge(null_space, 0.01)).dense()
    assert (first @ with_past.T).norm() < 0.05 * (first @ without.T).norm()


def test_batches_one_after_another_equal_one_batch_where_keys_are_orthogonal():
    keys, residuals = torch.linalg.qr(draw(D, D)).Q[: 2 * U], draw(2 * U, V, seed=2)
    metric = Ridge(0.7)
    whole = solve_update(keys, residuals, metric).dense()
    first = solve_update(keys[:U], residuals[:U], metric).dense()
    second = solve_update(keys[U:], residuals[U:], metric, keys[:U]).dense()
    torch.testing.assert_close(first + second, whole)


def test_order_does_not_matter_and_a_repeated_fact_counts_twice(null_space):
    keys, residuals, metric = draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(null_space, 2.0)
    found = solve_update(keys, residuals, metric).dense()
    torch.testing.assert_close(solve_update(keys.flip(0), residuals.flip(0), metric).dense(), found)
    twice = solve_update(keys[[0, 0]], residuals[[0, 0]], metric).dense()
    weighted = solve_update(2**0.5 * keys[:1], 2**0.5 * residuals[:1], metric).dense()
    torch.testing.assert_close(twice, weighted)


def test_compressed_past_gives_the_same_update(null_space):
    past = draw(3 * D, D, seed=5)
    small = compress_keys(past)
    assert small.shape == (D, D)
    keys, residuals, metric = draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(null_space, 2.0)
    torch.testing.assert_close(solve_update(keys, residuals, metric, small).dense(), solve_update(keys, residuals, metric, past).dense())
    few = draw(3, D)
    assert compress_keys(few) is few


def test_nothing_lacking_changes_nothing(null_space):
    assert not solve_update(draw(U, D), torch.zeros(U, V), NullSpaceRidge(null_space, 1.0)).dense().any()


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (Threshold("absolute", 1.0), 2),
        (Threshold("relative_to_max", 0.5), 3),
        (Threshold("relative_energy", 0.25), 3),
        (Threshold("rank", 3), 3),
    ],
)
def test_threshold_modes(threshold, expected):
    assert threshold.retained(torch.tensor([0.1, 0.9, 1.0, 6.0])) == expected


def test_threshold_that_keeps_nothing_is_refused_and_one_that_keeps_all_warned_of(caplog):
    values = torch.tensor([0.5, 1.0])
    with pytest.raises(ValueError, match=r"retains none of 2 directions .* between 0.5 and 1"):
        Threshold("absolute", 0.1).retained(values)
    with caplog.at_level(logging.WARNING):
        assert Threshold("absolute", 2.0).retained(values) == 2
    assert "edits are not restricted" in caplog.text


@pytest.mark.parametrize(("mode", "value"), [("absolute", 0.0), ("relative_energy", 1.5), ("rank", 2.5)])
def test_threshold_out_of_range(mode, value):
    with pytest.raises(ValueError, match=r"threshold\.value"):
        Threshold(mode, value)


def test_lost_targets_are_refused(null_space):
    with pytest.raises(ValueError, match="not finite"):
        solve_update(draw(U, D), torch.full((U, V), torch.nan), Ridge(1.0))
    with pytest.raises(ValueError, match="ridge must be > 0"):
        Ridge(0.0)


def test_low_rank_is_a_product():
    update = LowRank(draw(V, 2), draw(2, D))
    assert update.dense().shape == (V, D)
