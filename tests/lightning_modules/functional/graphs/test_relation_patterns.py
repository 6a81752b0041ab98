"""Constructed relations are recognised, and what the figures mean is checked by moving the entities."""

import math

import pytest
import torch

from malleable.lightning_modules.functional.graphs import relation_patterns
from malleable.lightning_modules.functional.graphs.interaction import Map
from malleable.lightning_modules.functional.graphs.relation_patterns import Moments, composition, differences, identity_map, inverse, self_inverse

D = 5
PLACES = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
MOMENTS = Moments.of(PLACES)


def affine(number=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale, shift = (torch.randn(number, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return Map(scale + scale.sign() * 0.3, shift)


def turns(angles):
    """Rotations of complex coordinates by angles."""
    angle = torch.tensor(angles, dtype=torch.float64)[:, None].expand(-1, D)
    scale = torch.polar(torch.ones_like(angle), angle)
    return Map(scale, torch.zeros_like(scale))


def stack(*maps):
    return Map(torch.cat([flow.scale for flow in maps]), torch.cat([flow.shift for flow in maps]))


@pytest.mark.parametrize("complex_places", [False, True])
def test_a_difference_is_the_mean_over_entities(complex_places):
    first, second, places = affine(2), affine(3, seed=2), PLACES
    if complex_places:
        first, second, places = turns([0.3, 2.0]), turns([0.1, 1.0, -2.0]), torch.complex(PLACES, PLACES.flip(0))
    table = differences(first, second, Moments.of(places))
    for i in range(2):
        for j in range(3):
            left, right = first.scale[i] * places + first.shift[i], second.scale[j] * places + second.shift[j]
            spread = sum((side - side.mean(0)).abs().square().mean(0).sum() for side in (left, right)) / 2
            expected = (left - right).abs().square().mean(0).sum() / spread
            assert table[i, j].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("places", [PLACES, torch.complex(PLACES, PLACES.flip(0))])
def test_moments_do_not_depend_on_the_chunk_size(places, monkeypatch):
    whole = Moments.of(places)
    torch.testing.assert_close(whole.mean, places.mean(0))
    torch.testing.assert_close(whole.variance, (places - places.mean(0)).abs().square().mean(0))
    monkeypatch.setattr(relation_patterns, "ROWS", 7)
    torch.testing.assert_close(Moments.of(places), whole)


def test_symmetric():
    shift = torch.randn(1, D, dtype=torch.float64)
    mirror, still = Map(-torch.ones_like(shift), shift), identity_map(affine())
    found = self_inverse(stack(mirror, still, affine(2)), MOMENTS)
    assert found[:2].max() < 1e-12
    assert found[2:].min() > 0.1
    half, quarter = self_inverse(turns([math.pi, math.pi / 2]), Moments.of(torch.complex(PLACES, PLACES.flip(0))))
    assert half < 1e-12
    assert quarter.item() > 2  # twice a quarter is the opposite: nothing in common


def test_inverse():
    there = affine(1)
    back = Map(1 / there.scale, -there.shift / there.scale)
    found = inverse(stack(there, affine(1, seed=5), back), MOMENTS)
    assert max(found[0, 2], found[2, 0]) < 1e-12
    assert min(found[0, 1], found[1, 2], found[0, 0]) > 0.1


def test_composition_depends_on_the_order():
    first, second = affine(1), affine(1, seed=7)
    found, third = composition(stack(first, second, second.after(first)), MOMENTS)
    assert found[0, 1] < 1e-12
    assert third[0, 1] == 2
    assert found[1, 0] > 0.01
    assert found[0, 2].isfinite()
    assert (composition(stack(first, second), MOMENTS)[0] == torch.inf).logical_not().tolist() == [[True, False], [False, True]]
