"""Golden values and invariants of the interactions; rows are written part by part."""

import math
from functools import partial

import literal_kg
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from malleable.lightning_modules.functional.graphs.flows import CROSS_TERM, NFE1, NFE2, NFE3, AffinePoint, Sigma
from malleable.lightning_modules.functional.graphs.interaction import Map, Vectors, score_all, score_pairs
from malleable.lightning_modules.functional.graphs.points import ComplexDiagonal, Diagonal, Rotation, Translation
from malleable.lightning_modules.functional.graphs.squared_distance import slope_form

INTERACTIONS = {
    "NFE1": (NFE1(), {}),
    "NFE2": (NFE2(), {}),
    "NFE2 uniform": (NFE2(base="uniform"), {"base": "uniform"}),
    "NFE2 swap": (NFE2(swap_on_negative_scale=True), {"swap": True}),
    "NFE3": (NFE3(), {}),
    "NFE3 consistent": (NFE3(consistent=True), {"consistent": True}),
    "AffinePoint": (AffinePoint(), {}),
    "Sigma": (Sigma(), {}),
    "Translation": (Translation(), {}),
    "Diagonal": (Diagonal(), {}),
    "ComplexDiagonal": (ComplexDiagonal(), {}),
    "Rotation": (Rotation(), {}),
}
DISTANCES = [name for name, (interaction, _) in INTERACTIONS.items() if interaction.distance]
EVERY = pytest.mark.parametrize("name", INTERACTIONS)


def rows(interaction, number=5, entities=9, width=4, dtype=torch.float64, seed=0):
    """Heads, relations and all entities of random tables."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(entities, len(interaction.entity_parts) * width, generator=generator, dtype=dtype)
    relation = torch.randn(number, len(interaction.relation_parts) * width, generator=generator, dtype=dtype)
    return table[:number], relation, table


def scores(interaction, head, relation, entities):
    return score_all(interaction.query(head, relation), interaction.key(entities))


def literal(name, head, relation, entities):
    return -literal_kg.distance(name.split()[0], head[:, None], relation[:, None], entities[None], **INTERACTIONS[name][1])


@pytest.mark.parametrize("name", ["NFE1", "NFE2", "NFE3"])
def test_the_loop_of_the_benchmarks_equals_the_formula(name):
    head, relation, table = rows(INTERACTIONS[name][0])
    products = literal_kg.products(name, head, relation, table)
    torch.testing.assert_close(products, literal(name, head, relation, table))
    target = torch.tensor([3, 1, 4, 1, 5])
    torch.testing.assert_close(literal_kg.masked_loss(products, target), literal_kg.loss(products, target))


class TestGolden:
    h = torch.tensor([[0.5, -1, 2, -0.5]])
    r = torch.tensor([[0.25, 0.5, -1.5, 2]])
    tails = torch.tensor([[-0.5, -1.5, 3, 1], [0, 0, 0, 0], [1, -2, 0.5, -1]])

    @pytest.mark.parametrize(
        ("interaction", "expected"), [(NFE1(), [0, 12.5, 8.75]), (NFE3(), [1.531251, 2.957185, 6.388957])], ids=["NFE-1", "NFE-3"]
    )
    def test_flows(self, interaction, expected):
        distances = -scores(interaction, self.h, self.r, self.tails)[0]
        torch.testing.assert_close(distances, torch.tensor(expected), atol=5e-6, rtol=1e-6)

    def test_parts_alone(self):
        without = -scores(AffinePoint(), self.h[:, :2], self.r, self.tails[:, :2])[0]
        sigma = -scores(Sigma(), self.h[:, 2:], self.r[:, 2:], self.tails[:, 2:])[0]
        assert without.tolist() == [0, 2.5, 2.5]
        assert sigma.tolist() == [0, 10, 6.25]

    @pytest.mark.parametrize(("base", "expected"), [("normal", [0, 9.946827, 9.266009]), ("uniform", [0, 10.049038, 9.555608])])
    def test_two_slopes(self, base, expected):
        h = torch.tensor([[0.5, -1, 2, -0.5, 1, 0.25]])
        tails = torch.tensor([[-0.5, -1.5, 3, 1, 1.5, 0.5], [0.0] * 6, [1, -2, 0.5, -1, -2, 1]])
        torch.testing.assert_close(-scores(NFE2(base=base), h, self.r, tails)[0], torch.tensor(expected), atol=5e-6, rtol=1e-6)

    def test_the_form_of_two_slopes_is_positive_definite(self):
        """M = [[1, -c/2, c/2], [-c/2, 1/2, 0], [c/2, 0, 1/2]], det M = (1 - c^2) / 4."""
        for base, eigenvalues in (("normal", [0.1329, 0.5, 1.3671]), ("uniform", [0.0886, 0.5, 1.4114])):
            c = CROSS_TERM[base]
            form = torch.tensor([[1, -c / 2, c / 2], [-c / 2, 0.5, 0], [c / 2, 0, 0.5]], dtype=torch.float64)
            torch.testing.assert_close(torch.linalg.eigvalsh(form), torch.tensor(eigenvalues, dtype=torch.float64), atol=5e-5, rtol=0)
            assert form.det().item() == pytest.approx((1 - c * c) / 4)
            one = torch.eye(3, dtype=torch.float64)
            torch.testing.assert_close(slope_form(*one.split(1, dim=1), c), form)


@EVERY
class TestEvery:
    def test_equals_the_literal_form(self, name):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            parts = rows(INTERACTIONS[name][0], dtype=dtype)
            torch.testing.assert_close(scores(INTERACTIONS[name][0], *parts), literal(name, *parts), rtol=tolerance, atol=tolerance)

    def test_pairs_are_entries_of_all(self, name):
        interaction = INTERACTIONS[name][0]
        head, relation, table = rows(interaction)
        query, key = interaction.query(head, relation), interaction.key(table)
        tails = torch.tensor([3, 0, 8, 1, 1])
        expected = score_all(query, key)[torch.arange(5), tails]
        torch.testing.assert_close(score_pairs(query, key.rows(tails)), expected, rtol=1e-12, atol=1e-12)

    def test_gradient_equals_the_literal_one(self, name):
        interaction = INTERACTIONS[name][0]
        gradients = []
        for function in (partial(scores, interaction), partial(literal, name)):
            parts = [part.clone().requires_grad_() for part in rows(interaction)]
            function(*parts).sin().sum().backward()
            gradients.append([part.grad for part in parts])
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)

    def test_gradcheck_away_from_slope_zero(self, name):
        interaction = INTERACTIONS[name][0]
        head, relation, table = rows(interaction, number=2, entities=3, width=2)
        parts = [(part + 0.1 * part.sign()).requires_grad_() for part in (head, relation, table)]
        assert torch.autograd.gradcheck(partial(scores, interaction), parts)

    def test_permuting_entities_permutes_scores(self, name):
        interaction = INTERACTIONS[name][0]
        head, relation, table = rows(interaction)
        order = torch.randperm(len(table))
        torch.testing.assert_close(scores(interaction, head, relation, table[order]), scores(interaction, head, relation, table)[:, order])


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_not_negative(name):
    assert scores(INTERACTIONS[name][0], *rows(INTERACTIONS[name][0], seed=1)).max() <= 1e-12


def neutral(width=3):
    """The row of a relation that changes nothing."""
    return torch.cat([torch.zeros(1, width), torch.ones(1, width)], 1).double()


@pytest.mark.parametrize("interaction", [NFE1(), NFE2(), NFE2(base="uniform"), NFE3(consistent=True), AffinePoint()])
def test_identical_flows_have_distance_zero(interaction):
    table = rows(interaction, width=3)[2]
    diagonal = scores(interaction, table, neutral().expand(len(table), -1), table).diagonal()
    assert diagonal.abs().max() < 1e-12


class TestRelatives:
    def test_without_slopes_all_are_affine_points(self):
        head, relation, table = rows(AffinePoint())
        expected = scores(AffinePoint(), head, relation, table)
        for interaction in (NFE1(), NFE2(), NFE2(base="uniform")):
            flat = [torch.cat([part] + [torch.zeros_like(part)] * (len(interaction.entity_parts) - 1), 1) for part in (head, table)]
            torch.testing.assert_close(scores(interaction, flat[0], relation, flat[1]), expected)

    def test_affine_points_of_scale_one_are_translated(self):
        head, relation, table = rows(AffinePoint())
        shift, scale = relation.chunk(2, 1)
        plain = torch.cat([shift, torch.ones_like(scale)], 1)
        torch.testing.assert_close(scores(AffinePoint(), head, plain, table), scores(Translation(), head, shift, table))

    @pytest.mark.parametrize("base", ["normal", "uniform"])
    def test_equal_slopes_make_the_second_flow_the_first(self, base):
        head, relation, table = rows(NFE1())
        doubled = [torch.cat([part, part.chunk(2, 1)[1]], 1) for part in (head, table)]
        torch.testing.assert_close(scores(NFE2(base=base), doubled[0], relation, doubled[1]), scores(NFE1(), head, relation, table))

    def test_the_score_is_the_sum_of_its_parts(self):
        head, relation, table = rows(NFE1())
        means = scores(AffinePoint(), head[:, :4], relation, table[:, :4])
        deviations = scores(Sigma(), head[:, 4:], relation[:, 4:], table[:, 4:])
        torch.testing.assert_close(means + deviations, scores(NFE1(), head, relation, table))


class TestMeaning:
    def test_first_flow_is_the_wasserstein_distance(self):
        """W2^2 of Gaussians in one dimension: the mean squared difference of their quantiles."""
        head, relation, table = rows(NFE1(), number=1, width=1)
        grid = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
        a, b = relation[0, 1], relation[0, 0]
        for tail, score in zip(table, scores(NFE1(), head, relation, table)[0], strict=True):
            first = Normal(a * head[0, 0] + b, (a * head[0, 1]).abs()).icdf(grid)
            second = Normal(tail[0], tail[1].abs()).icdf(grid)
            assert -score.item() == pytest.approx((first - second).square().mean().item(), rel=1e-3, abs=1e-4)

    @pytest.mark.parametrize("base", ["normal", "uniform"])
    def test_second_flow_is_the_integral(self, base):
        """E |f - g|^2 by quadrature over the base."""
        interaction = NFE2(base=base, swap_on_negative_scale=True)
        generator = torch.Generator().manual_seed(3)
        # Slopes >= 0 make the flows monotone; a < 0 among the relations exercises the exchange.
        head, tail = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        head[:, 1:], tail[:, 1:] = head[:, 1:].abs(), tail[:, 1:].abs()
        relation = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        x = Normal(0.0, 1.0).icdf(grid) if base == "normal" else (2 * grid - 1) * math.sqrt(3)
        distances = -score_pairs(interaction.query(head, relation), interaction.key(tail))
        for row in range(4):
            mu, below, above = head[row]
            b, a = relation[row]
            mapped = a * (mu + torch.where(x < 0, below, above) * x) + b
            if a < 0:  # the same law, as a rising function of the base
                mapped = mapped.flip(0)
            target = tail[row, 0] + torch.where(x < 0, tail[row, 1], tail[row, 2]) * x
            assert distances[row].item() == pytest.approx((mapped - target).square().mean().item(), rel=2e-3)

    @pytest.mark.parametrize("consistent", [False, True])
    def test_third_flow_is_the_divergence(self, consistent):
        head, relation, table = rows(NFE3())
        shift, scale = relation.chunk(2, 1)
        softplus = torch.nn.functional.softplus
        factor = scale.abs() if consistent else softplus(scale)
        first = Normal((scale * head[:, :4] + shift)[:, None], (factor * softplus(head[:, 4:]))[:, None])
        expected = kl_divergence(first, Normal(table[:, :4], softplus(table[:, 4:]))).sum(-1)
        torch.testing.assert_close(-scores(NFE3(consistent=consistent), head, relation, table), expected)

    @pytest.mark.parametrize("consistent", [False, True])
    def test_vanishing_deviations_stay_finite(self, consistent):
        head, relation, table = (part.float() for part in rows(NFE3()))
        parts = [part.requires_grad_() for part in (head - 200, relation - 200, table - 200)]
        total = scores(NFE3(consistent=consistent), *parts).sum()
        total.backward()
        assert total.isfinite()
        assert all(part.grad.isfinite().all() for part in parts)
        assert not parts[2].grad[:, 4:].any()  # at the floor

    @pytest.mark.parametrize("base", ["normal", "uniform"])
    def test_deviations(self, base):
        """Of samples of the flow itself."""
        table = rows(NFE2(), width=2, entities=3)[2]
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        x = Normal(0.0, 1.0).icdf(grid) if base == "normal" else (2 * grid - 1) * math.sqrt(3)
        mu, below, above = (part[..., None] for part in table.chunk(3, 1))
        values = mu + torch.where(x < 0, below.abs(), above.abs()) * x
        torch.testing.assert_close(NFE2(base=base).deviation(table), values.std(-1), rtol=1e-3, atol=0)
        pairs = table[:, :4]
        torch.testing.assert_close(NFE1().deviation(pairs), pairs[:, 2:].abs())
        torch.testing.assert_close(Sigma().deviation(pairs), pairs.abs())
        torch.testing.assert_close(NFE3().deviation(pairs), torch.nn.functional.softplus(pairs[:, 2:]))
        assert AffinePoint().deviation(pairs) is None


class TestPatterns:
    """The relations of the affine group, by their rows and by what they do to scores."""

    entities = rows(NFE1())[2]

    def mapped(self, *relations):
        """What relations make of the entities one after another, as rows of NFE-1."""
        result = self.entities
        for relation in relations:
            shift, scale = relation.chunk(2, 1)
            mean, slope = result.chunk(2, 1)
            result = torch.cat([scale * mean + shift, scale * slope], 1)
        return result

    def test_symmetric(self):
        shift = torch.randn(1, 4, dtype=torch.float64)
        for relation in (torch.cat([shift, -torch.ones_like(shift)], 1), torch.cat([0 * shift, torch.ones_like(shift)], 1)):
            table = scores(NFE1(), self.entities, relation.expand(9, -1), self.entities)
            torch.testing.assert_close(table, table.T)

    def test_inverse(self):
        shift, scale = rows(NFE1(), number=1)[1].chunk(2, 1)
        there, back = torch.cat([shift, scale], 1), torch.cat([-shift / scale, 1 / scale], 1)
        torch.testing.assert_close(self.mapped(there, back), self.entities)
        tails = self.mapped(there)
        assert score_pairs(NFE1().query(tails, back.expand(9, -1)), NFE1().key(self.entities)).abs().max() < 1e-12

    def test_composition_and_its_order(self):
        first, second = rows(NFE1(), number=2)[1].split(1)
        maps = [NFE1().flow(relation) for relation in (first, second)]
        composed = maps[1].after(maps[0])
        row = torch.cat([composed.shift, composed.scale], 1)
        torch.testing.assert_close(self.mapped(first, second), self.mapped(row))
        swapped = maps[0].after(maps[1])
        torch.testing.assert_close(swapped.scale, composed.scale)
        assert not torch.allclose(swapped.shift, composed.shift)

    def test_maps_of_the_others(self):
        for interaction in (Translation(), Diagonal(), ComplexDiagonal(), Rotation(), AffinePoint()):
            head, relation, _ = rows(interaction)
            flow = interaction.flow(relation)
            point = flow.scale * interaction.location(head) + flow.shift
            stored = torch.cat([point.real, point.imag], 1) if point.is_complex() else point
            vector = interaction.query(head, relation).vector / (2 if interaction.distance else 1)
            torch.testing.assert_close(vector, stored)
        assert Sigma().location(head) is None
        assert torch.equal(Sigma().flow(relation).scale, relation.abs())
        assert NFE1().location(self.entities).shape == (9, 4)
        assert NFE2().location(torch.zeros(2, 6)).shape == (2, 2)
        assert isinstance(flow, Map)


def test_refusals():
    with pytest.raises(ValueError, match=r"base must be one of \['normal', 'uniform'\], got 'cauchy'"):
        NFE2(base="cauchy")
    with pytest.raises(ValueError, match="min_deviation must be > 0, got 0"):
        NFE3(min_deviation=0)


def test_rows_without_a_bias():
    table = Vectors(torch.arange(6.0).reshape(3, 2))
    assert table.rows(torch.tensor([2])).bias is None
