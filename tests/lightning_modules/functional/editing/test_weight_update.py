"""Null space and weight updates: closed forms against direct solutions, and bounds."""

import pytest
import torch

from malleable.lightning_modules.functional.editing.null_space import NullSpace
from malleable.lightning_modules.functional.editing.null_space_threshold import Threshold
from malleable.lightning_modules.functional.editing.second_moments import Spectrum
from malleable.lightning_modules.functional.editing.weight_update import (
    Covariance,
    LowRank,
    NullSpaceRidge,
    Ridge,
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


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_projector_is_symmetric_and_idempotent(spectrum, moment, share):
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
def test_dual_solution_equals_primal_solutions(spectrum, retained, past):
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


def test_update_minimises_the_objective(null_space):
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


def test_covariance_equals_memit(spectrum, moment):
    keys, residuals, old, weight = draw(U, D, seed=1), draw(U, V, seed=2), draw(N, D, seed=3), 40.0
    found = solve_update(keys, residuals, Covariance(spectrum, weight, floor=1e-12), old).dense()
    expected = residuals.T @ keys @ torch.linalg.inv(old.T @ old + keys.T @ keys + weight * moment)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_update_without_past_and_projection_is_ridge_regression():
    keys, residuals = draw(U, D, seed=1), draw(U, V, seed=2)
    found = solve_update(keys, residuals, Ridge(1.5)).dense()
    expected = torch.linalg.solve(keys.T @ keys + 1.5 * torch.eye(D, dtype=torch.double), keys.T @ residuals).T
    torch.testing.assert_close(found, expected)


def test_small_ridge_fits_exactly(null_space):
    keys, residuals = draw(U, D, seed=1), draw(U, V, seed=2)
    found = solve_update(keys, residuals, NullSpaceRidge(null_space, 1e-12)).dense()
    torch.testing.assert_close(keys @ found.T, residuals, rtol=1e-6, atol=1e-6)


def test_remaining_residual_of_one_fact(null_space):
    key, residual, ridge = draw(1, D, seed=1), draw(1, V, seed=2), 10.0
    found = solve_update(key, residual, NullSpaceRidge(null_space, ridge)).dense()
    strength = float(key @ null_space.dense() @ key.T)
    torch.testing.assert_close(residual - key @ found.T, residual * ridge / (ridge + strength))


def test_drift_is_a_mean_over_text_and_bounded_by_the_threshold(moment, spectrum):
    threshold = 0.05
    space = NullSpace(spectrum, Threshold("absolute", threshold).retained(spectrum.values))
    update = solve_update(draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(space, 0.1))
    text = draw(400, D) * torch.logspace(-2, 0.5, D, dtype=torch.double)
    drift = mean_drift(update, moment)
    assert drift == pytest.approx(float((text @ update.dense().T).square().sum(1).mean()), rel=1e-9)
    assert 0 < drift <= threshold * float(update.dense().square().sum())
    free = solve_update(draw(U, D, seed=1), draw(U, V, seed=2), Ridge(0.1))
    assert mean_drift(free, moment) > threshold * float(free.dense().square().sum())


def test_update_does_not_change_values_of_text_in_a_subspace():
    text = draw(D // 2, D)
    spectrum = Spectrum.of(text.T @ text / len(text))
    space = NullSpace(spectrum, Threshold("absolute", 1e-9).retained(spectrum.values))
    assert space.retained == D - D // 2
    update = solve_update(draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(space, 1e-3)).dense()
    assert update.abs().max() > 0.1
    assert (text @ update.T).abs().max() < 1e-8


def test_past_keys_preserve_earlier_edits(null_space):
    first, second = draw(U, D, seed=1), draw(U, D, seed=4) + 0.5 * draw(U, D, seed=1)
    with_past = solve_update(second, draw(U, V, seed=2), NullSpaceRidge(null_space, 0.01), 30 * first).dense()
    without = solve_update(second, draw(U, V, seed=2), NullSpaceRidge(null_space, 0.01)).dense()
    assert (first @ with_past.T).norm() < 0.05 * (first @ without.T).norm()


def test_sequential_batches_equal_one_batch_for_orthogonal_keys():
    keys, residuals = torch.linalg.qr(draw(D, D)).Q[: 2 * U], draw(2 * U, V, seed=2)
    metric = Ridge(0.7)
    whole = solve_update(keys, residuals, metric).dense()
    first = solve_update(keys[:U], residuals[:U], metric).dense()
    second = solve_update(keys[U:], residuals[U:], metric, keys[:U]).dense()
    torch.testing.assert_close(first + second, whole)


def test_order_of_facts_and_repeated_facts(null_space):
    keys, residuals, metric = draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(null_space, 2.0)
    found = solve_update(keys, residuals, metric).dense()
    torch.testing.assert_close(solve_update(keys.flip(0), residuals.flip(0), metric).dense(), found)
    twice = solve_update(keys[[0, 0]], residuals[[0, 0]], metric).dense()
    weighted = solve_update(2**0.5 * keys[:1], 2**0.5 * residuals[:1], metric).dense()
    torch.testing.assert_close(twice, weighted)


def test_compressed_past_keys_give_the_same_update(null_space):
    past = draw(3 * D, D, seed=5)
    small = compress_keys(past)
    assert small.shape == (D, D)
    keys, residuals, metric = draw(U, D, seed=1), draw(U, V, seed=2), NullSpaceRidge(null_space, 2.0)
    torch.testing.assert_close(solve_update(keys, residuals, metric, small).dense(), solve_update(keys, residuals, metric, past).dense())
    few = draw(3, D)
    assert compress_keys(few) is few


def test_zero_residual_gives_zero_update(null_space):
    assert not solve_update(draw(U, D), torch.zeros(U, V), NullSpaceRidge(null_space, 1.0)).dense().any()


def test_targets_that_are_not_finite_raise(null_space):
    with pytest.raises(ValueError, match="not finite"):
        solve_update(draw(U, D), torch.full((U, V), torch.nan), Ridge(1.0))
    with pytest.raises(ValueError, match="ridge must be > 0"):
        Ridge(0.0)


def test_low_rank_is_a_product():
    update = LowRank(draw(V, 2), draw(2, D))
    assert update.dense().shape == (V, D)
