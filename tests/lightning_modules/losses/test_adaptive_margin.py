"""Golden values, reductions and gradients of the alpha-DPO loss; see section 2 and 7 of its specification."""

import math

import pytest
import torch
from torch.nn import functional as F

from malleable.lightning_modules.losses.adaptive_margin import AdaptiveMargin, SimPO

# Summed log-probabilities and lengths.
POLICY = torch.tensor([[-6.2, -7.9], [-11.4, -10.2], [-3.3, -8.8], [-20.1, -19.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-6.8, -7.5], [-11.0, -10.9], [-4.1, -8.0], [-21.0, -19.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[4, 5], [6, 5], [3, 4], [10, 9]])
PUBLISHED = {"beta": 2.5, "gamma_beta_ratio": 0.6}
Z = torch.tensor([0.2548405645, -1.3100397771, 1.1029818184, -0.0477826059], dtype=torch.float64)
GOLDEN = torch.tensor([1.7444734125, 0.9709552699, 0.4036809972, 1.3756855365], dtype=torch.float64)
STATISTICS = [{"stat_mode": "batch"}, {"stat_update": "micro_batch"}]


def golden(**options):
    return AdaptiveMargin(**{**PUBLISHED, "alpha": 0.2, **options}).double()


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, check_dtype=False)


def compute(loss, policy=POLICY, **options):
    reference = REFERENCE if loss.needs_reference else None
    return loss(policy, reference, LENGTHS, **options)


def test_golden_simpo():
    losses = compute(SimPO(**PUBLISHED)).losses
    close(losses, torch.tensor([1.6405213465, 1.4250805832, 0.2519290813, 1.3935939895], dtype=torch.float64), 1e-9)
    assert losses.mean().item() == pytest.approx(1.1777812501, abs=1e-9)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_golden_losses_at_every_step(statistics):
    """Without bias of the averages, an unchanged batch gives the same losses in every step."""
    loss = golden(**statistics)
    for _ in range(4):
        close(compute(loss).losses, GOLDEN)
    mean, std = loss.statistics.current()
    close(mean, torch.tensor(0.1588888889))
    close(std, torch.tensor(0.2790415695))
    close(loss.standardized(torch.tensor([0.23, -0.20666667, 0.46666667, 0.14555556])), Z, 2e-6)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_golden_gradient(statistics):
    """dL/ddelta = -beta sigmoid(-logit), divided by the length of the chosen answer; the margin is constant."""
    scores = POLICY.clone().requires_grad_()
    compute(golden(**statistics), scores).losses.sum().backward()
    expected = torch.tensor([-2.0631575524, -1.553197289, -0.8303571611, -1.8683341889])
    close(scores.grad[:, 0] * LENGTHS[:, 0], expected)
    close(scores.grad[:, 1] * LENGTHS[:, 1], -expected)


def test_golden_reward_scale():
    loss = golden(stat_mode="batch", alpha_scale="reward")
    assert compute(loss).losses.mean().item() == pytest.approx(1.1515741421, abs=1e-6)
    equal = golden(stat_mode="batch", alpha=0.2 / 2.5)
    close(compute(equal).losses, compute(loss).losses, 1e-12)


def test_golden_series_of_the_official_code():
    loss = golden(compat="official")
    means = [(0.0158888889, 0.0279041570), (0.0301888889, 0.0530178982), (0.0430588889, 0.0756202653)]
    for expected, (mean, std) in zip((3.9038838422, 2.2150342954, 1.7216106969), means, strict=True):
        assert compute(loss).losses.mean().item() == pytest.approx(expected, abs=2e-6)
        close(torch.stack(loss.statistics.current()), torch.tensor([mean, std]))


@pytest.mark.parametrize("scale", ["log_ratio", "reward"])
def test_without_alpha_it_is_simpo_bit_for_bit(scale):
    scores = [POLICY.float().clone().requires_grad_() for _ in range(2)]
    losses = (AdaptiveMargin(**PUBLISHED, alpha=0.0, alpha_scale=scale), SimPO(**PUBLISHED))
    results = [compute(loss, own) for loss, own in zip(losses, scores, strict=True)]
    for found, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(found, expected)
    for result in results:
        result.losses.sum().backward()
    assert torch.equal(scores[0].grad, scores[1].grad)
    assert not AdaptiveMargin(alpha=0.0).needs_reference


def test_equal_policy_and_reference_give_simpo():
    """The standard deviation of gaps is then 0, or rounding noise."""
    noise = 1e-7 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for statistics in (*STATISTICS, {}, {"compat": "official"}):
        loss = golden(**statistics)
        for _ in range(3):
            loss(REFERENCE, REFERENCE, LENGTHS)
            loss.end_of_step()
        exact = loss(REFERENCE, REFERENCE, LENGTHS).losses
        close(exact, SimPO(**PUBLISHED)(REFERENCE, None, LENGTHS).losses)
        assert exact.isfinite().all()
    rounded = golden(stat_mode="batch")((REFERENCE + noise).float(), REFERENCE.float(), LENGTHS).losses
    close(rounded, SimPO(**PUBLISHED)(REFERENCE, None, LENGTHS).losses, 1e-5)


def test_noise_of_half_precision_is_not_amplified():
    noise = 2e-4 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    loss = golden(stat_mode="batch")
    expected = SimPO(**PUBLISHED)(REFERENCE + noise * LENGTHS, None, LENGTHS).losses
    close(loss(REFERENCE + noise * LENGTHS, REFERENCE, LENGTHS, precision=torch.bfloat16).losses, expected, 1e-5)
    amplified = loss(REFERENCE + noise * LENGTHS, REFERENCE, LENGTHS, precision=torch.float32).losses
    assert (amplified - expected).abs().max() > 0.1


def test_a_constant_gap_gives_no_nan():
    scores = (REFERENCE + 0.3 * LENGTHS * torch.tensor([1, -1])).requires_grad_()
    for statistics in (*STATISTICS, {}, {"compat": "official"}):
        loss = golden(**statistics)
        for _ in range(3):
            value = loss(scores, REFERENCE, LENGTHS).losses
            loss.end_of_step()
            (gradient,) = torch.autograd.grad(value.sum(), scores)
            assert value.isfinite().all()
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("shift", "factor"), [(0.7, 1.0), (0.0, 3.0), (-1.0, 0.2)])
def test_z_does_not_change_if_all_gaps_are_shifted_or_scaled(shift, factor):
    """g' = factor g + shift at the same delta, by another reference."""
    loss = golden(stat_mode="batch")
    delta = POLICY[:, 0] / LENGTHS[:, 0] - POLICY[:, 1] / LENGTHS[:, 1]
    gaps = factor * torch.tensor([0.23, -0.2066666667, 0.4666666667, 0.1455555556], dtype=torch.float64) + shift
    reference = torch.stack([torch.zeros(4).double(), (gaps - delta) * LENGTHS[:, 1]], 1)
    close(loss(POLICY, reference, LENGTHS).losses, GOLDEN, 2e-6)


def test_permuted_pairs_have_permuted_losses():
    order = torch.tensor([2, 0, 3, 1])
    loss = golden(stat_mode="batch")
    found = loss(POLICY[order], REFERENCE[order], LENGTHS[order]).losses
    close(found, compute(loss).losses[order])


def test_swapped_answers_negate_delta_and_gap():
    loss = golden(stat_mode="batch", gamma_beta_ratio=0.0)
    compute(loss)
    swapped = loss(POLICY.flip(1), REFERENCE.flip(1), LENGTHS.flip(1))
    logits = torch.log(torch.expm1(swapped.losses.clone())).neg()  # loss = softplus(-logit)
    straight = torch.log(torch.expm1(compute(loss).losses)).neg()
    close(logits, -straight, 1e-5)


def test_identical_answers_have_no_gap():
    scores = POLICY[:, :1].expand(-1, 2)
    reference, lengths = REFERENCE[:, :1].expand(-1, 2), LENGTHS[:, :1].expand(-1, 2)
    losses = golden(stat_mode="batch")(scores, reference, lengths).losses
    close(losses, torch.full((4,), math.log1p(math.exp(2.5 * 0.6))))


def test_full_smoothing_is_symmetric():
    """With eps 0.5, a pair and the swapped pair have the same loss, and the gradient vanishes at logit 0."""
    loss = SimPO(beta=2.5, gamma_beta_ratio=0.0, smoothing=0.5)
    close(loss(POLICY, None, LENGTHS).losses, loss(POLICY.flip(1), None, LENGTHS.flip(1)).losses)
    equal = torch.tensor([[-4.0, -8.0]], requires_grad=True)
    loss(equal, None, torch.tensor([[1, 2]])).losses.sum().backward()
    assert equal.grad.abs().max() < 1e-7


def test_the_margin_has_no_gradient():
    """The gradient equals finite differences with the margin of the unchanged policy."""
    loss = golden(stat_mode="batch")
    scores = POLICY.clone().requires_grad_()
    compute(loss, scores).losses.sum().backward()
    ratios = POLICY / LENGTHS
    margins = 0.6 + 0.2 * Z
    step = 1e-6

    def value(chosen):
        return F.softplus(-2.5 * (chosen / LENGTHS[:, 0] - ratios[:, 1] - margins))

    numeric = (value(POLICY[:, 0] + step) - value(POLICY[:, 0] - step)) / (2 * step)
    close(scores.grad[:, 0], numeric)


def test_statistics_of_a_step_are_used_in_the_next_one():
    """z is 0 in the first two steps: without statistics, and because those of the first step are left out."""
    loss, simpo = golden(), SimPO(**PUBLISHED)(POLICY, None, LENGTHS).losses
    for _ in range(2):
        close(compute(loss).losses, simpo)
        loss.end_of_step()
    close(compute(loss).losses, GOLDEN)
    loss.end_of_step()
    close(compute(loss).losses, GOLDEN)


def test_accumulated_batches_give_the_statistics_of_the_step():
    whole, parts, padded = golden(), golden(), golden()
    for _ in range(3):
        whole(POLICY, REFERENCE, LENGTHS)
        for rows in (slice(0, 1), slice(1, 4)):
            parts(POLICY[rows], REFERENCE[rows], LENGTHS[rows])
        double = [torch.cat([values, values]) for values in (POLICY, 3 * REFERENCE, LENGTHS)]
        double[1][:4] = REFERENCE
        padded(*double, real=torch.arange(8) < 4)
        for loss in (whole, parts, padded):
            loss.end_of_step()
    assert whole.statistics.updates == 2
    for loss in (parts, padded):
        close(torch.stack(loss.statistics.current()), torch.stack(whole.statistics.current()))


def test_several_rejected_answers_and_missing_ones():
    """Each existing pair is a value of the statistics."""
    wide = torch.cat([POLICY, torch.zeros(4, 1)], 1)
    reference = torch.cat([REFERENCE, torch.full((4, 1), 5.0)], 1)
    lengths = torch.cat([LENGTHS, torch.zeros(4, 1, dtype=torch.long)], 1)
    close(golden(stat_mode="batch")(wide, reference, lengths).losses, GOLDEN)
    twice = golden(stat_mode="batch")
    pairs = twice(torch.cat([POLICY, POLICY[:, 1:]], 1), torch.cat([REFERENCE, REFERENCE[:, 1:]], 1), torch.cat([LENGTHS, LENGTHS[:, 1:]], 1))
    mean, std = twice.statistics.current()
    close(mean, torch.tensor(0.1588888889))
    # The squared deviations double, and the number of values grows from 4 to 8.
    close(std, torch.tensor(0.2790415695 * (2 * 3 / 7) ** 0.5))
    assert pairs.losses.shape == (4,)


def test_z_clip_and_smallest_deviation():
    loss = golden(stat_mode="batch", z_clip=1.0)
    logits = 2.5 * (torch.tensor([0.03, 0.14, 1.10, 0.1566666667]).double() - 0.6 - 0.2 * Z.clamp(-1, 1))
    close(compute(loss).losses, F.softplus(-logits))
    close(compute(golden(stat_mode="batch", stat_min_std=0.3)).losses, SimPO(**PUBLISHED)(POLICY, None, LENGTHS).losses)


def test_evaluation_changes_nothing():
    for statistics in (*STATISTICS, {}, {"compat": "official"}):
        loss = golden(**statistics)
        for _ in range(3):
            compute(loss)
            loss.end_of_step()
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        expected = compute(loss.eval()).losses
        for _ in range(3):
            loss(2 * POLICY, REFERENCE, LENGTHS)
        assert torch.equal(compute(loss).losses, expected)
        loss.train()
        loss.end_of_step()
        assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_statistics_are_restored_from_a_state_dict():
    loss, again = golden(), golden()
    for _ in range(3):
        compute(loss)
        loss.end_of_step()
    assert set(loss.state_dict()) == {"statistics.average", "statistics.updates"}
    again.load_state_dict(loss.state_dict())
    assert torch.equal(compute(again).losses, compute(loss).losses)
    again.reset()
    close(compute(again.eval()).losses, SimPO(**PUBLISHED)(POLICY, None, LENGTHS).losses)


def test_statistics_stay_float32():
    loss = AdaptiveMargin().to(torch.bfloat16)
    assert {buffer.dtype for buffer in loss.buffers()} == {torch.float32}


def test_rewards_and_figures():
    """Rewards are beta [(1 - alpha) log pi + alpha log pi_ref] per token."""
    loss = golden(stat_mode="batch")
    output = compute(loss)
    close(output.rewards, 2.5 * (0.8 * POLICY + 0.2 * REFERENCE) / LENGTHS, 1e-9)
    figures = {name: values.mean().item() for name, values in output.figures.items()}
    assert figures["target_margin"] == pytest.approx(0.6 + 0.2 * Z.mean().item(), abs=1e-6)
    assert figures["gap_mean"] == pytest.approx(0.1588888889, abs=1e-6)
    assert figures["gap_std"] == pytest.approx(0.2790415695, abs=1e-6)
    assert figures["gap_z"] == pytest.approx(Z.abs().mean().item(), abs=1e-6)
    assert figures["margins_simpo"] == pytest.approx(2.5 * 1.4266666667 / 4, abs=1e-6)
    assert figures["margins_dpo"] == pytest.approx(2.5 * 0.1588888889, abs=1e-6)
    weights = -torch.tensor([-2.0631575524, -1.553197289, -0.8303571611, -1.8683341889]) / 2.5
    assert figures["gradient_weight"] == pytest.approx(weights.mean().item(), abs=1e-6)
    assert output.figures["target_margin_max"].max().item() == pytest.approx(0.6 + 0.2 * Z.max().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"gamma_beta_ratio": -1}, "gamma_beta_ratio must be >= 0, got -1"),
        ({"alpha_scale": "logit"}, "alpha_scale must be one of log_ratio, reward, got 'logit'"),
        ({"stat_mode": "all"}, "stat_mode must be one of ema, batch, got 'all'"),
        ({"stat_decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"z_clip": 0.0}, "z_clip must be > 0, got 0.0"),
        ({"compat": "official", "stat_update": "micro_batch"}, "compat='official' sets stat_mode, .*: omit them"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveMargin(**options)


def test_unused_arguments_are_refused():
    with pytest.raises(ValueError, match="SimPO does not use a reference; omit reference"):
        SimPO()(POLICY, REFERENCE, LENGTHS)
    with pytest.raises(ValueError, match="length_norm needs the lengths of the answers"):
        SimPO()(POLICY)
    with pytest.raises(TypeError, match="alpha"):
        SimPO(alpha=0.1)


def test_rewards_do_not_depend_on_the_scale_of_alpha():
    rewards = [compute(golden(stat_mode="batch", alpha=alpha, alpha_scale=scale)).rewards for alpha, scale in ((0.2, "log_ratio"), (0.5, "reward"))]
    close(rewards[0], rewards[1], 1e-12)


def test_a_value_that_is_not_finite_is_left_out():
    """The statistics of the other pairs are used, in this step and in the next one."""
    loss, finite = golden(), golden()
    for _ in range(2):
        spoilt = POLICY.clone()
        spoilt[3] = torch.nan
        loss(spoilt, REFERENCE, LENGTHS)
        finite(POLICY[:3], REFERENCE[:3], LENGTHS[:3])
        for own in (loss, finite):
            own.end_of_step()
    assert finite.statistics.updates == 1
    close(torch.stack(loss.statistics.current()), torch.stack(finite.statistics.current()))


def test_a_step_with_one_pair_does_not_change_the_statistics():
    loss = golden()
    for rows in (slice(None), slice(None), slice(0, 1)):
        loss(POLICY[rows], REFERENCE[rows], LENGTHS[rows])
        loss.end_of_step()
    assert loss.statistics.updates == 1
    close(loss.statistics.current()[1], torch.tensor(0.2790415695))
