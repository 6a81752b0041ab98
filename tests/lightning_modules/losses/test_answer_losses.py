"""Losses with a term for each answer, by hand, and of unpaired rows."""

import math

import pytest
import torch
from torch.nn import functional as F

from malleable.lightning_modules.losses.answer_losses import KTO, SPPO, APODown, APOZero, BCOPair, NCAPair
from malleable.lightning_modules.losses.preference import CPO, ORPO, RDPO, Discopop, ExoPair, Robust, Sigmoid

POLICY = torch.tensor([[-6.2, -7.9], [-11.4, -10.2], [-3.3, -8.8], [-20.1, -19.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-6.8, -7.5], [-11.0, -10.9], [-4.1, -8.0], [-21.0, -19.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[4, 5], [6, 5], [3, 4], [10, 9]])
RATIOS = POLICY - REFERENCE
DESIRABLE = torch.tensor([True, False, True, False])


def close(found, expected, atol=1e-7):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, check_dtype=False)


def sigmoid(*values):
    return [1 / (1 + math.exp(-value)) for value in values]


def test_anchored_losses_by_hand():
    """First row: log-ratios 0.6 and -0.4, at beta 0.5 rewards 0.3 and -0.2."""
    chosen, rejected, margin = sigmoid(0.3, -0.2, 0.5)
    assert APOZero(0.5)(POLICY, REFERENCE).losses[0].item() == pytest.approx(1 - chosen + rejected)
    assert APODown(0.5)(POLICY, REFERENCE).losses[0].item() == pytest.approx(chosen + 1 - margin)
    expected = -math.log(chosen) - 0.5 * math.log(1 - chosen) - 0.5 * math.log(1 - rejected)
    assert NCAPair(0.5)(POLICY, REFERENCE).losses[0].item() == pytest.approx(expected)
    assert SPPO(0.5)(POLICY, REFERENCE).losses[0].item() == pytest.approx((0.6 - 1) ** 2 + (-0.4 + 1) ** 2)


def test_bco_without_shift_by_hand():
    chosen, rejected = sigmoid(0.3, -0.2)
    losses = BCOPair(0.5, shift="none")(POLICY, REFERENCE).losses
    assert losses[0].item() == pytest.approx(-math.log(chosen) - math.log(1 - rejected))


def test_bco_shifts_by_the_mean_reward_of_earlier_steps():
    loss = BCOPair(0.5, decay=0.0)
    first = loss(POLICY, REFERENCE).losses
    close(first, BCOPair(0.5, shift="none")(POLICY, REFERENCE).losses)
    loss.end_of_step()
    shift = 0.5 * RATIOS.mean().item()
    expected = F.softplus(shift - 0.5 * RATIOS[:, 0]) + F.softplus(0.5 * RATIOS[:, 1] - shift)
    close(loss(POLICY, REFERENCE).losses, expected)
    assert loss(POLICY, REFERENCE).figures["reward_shift"][0].item() == pytest.approx(shift, abs=1e-6)


def test_length_regularised_loss_uses_real_lengths():
    """A chosen answer that is one token shorter lowers the logit by alpha."""
    expected = F.softplus(-(0.1 * (RATIOS[:, 0] - RATIOS[:, 1]) + 0.3 * torch.tensor([-1, 1, -1, 1])))
    close(RDPO(0.1, alpha=0.3)(POLICY, REFERENCE, LENGTHS).losses, expected)
    close(RDPO(0.1, alpha=0.0)(POLICY, REFERENCE, LENGTHS).losses, Sigmoid(0.1)(POLICY, REFERENCE).losses)
    with pytest.raises(ValueError, match="RDPO needs the lengths of the answers"):
        RDPO()(POLICY, REFERENCE)


def test_losses_without_reference_by_hand():
    """CPO: logit 0.5 (-6.2 + 7.9), likelihood -6.2 / 4. ORPO: odds of exp(-1.55) and exp(-1.58)."""
    expected = math.log1p(math.exp(-0.85)) + 2 * 6.2 / 4
    assert CPO(0.5, nll_weight=2.0)(POLICY, None, LENGTHS).losses[0].item() == pytest.approx(expected)
    chosen, rejected = math.exp(-1.55), math.exp(-1.58)
    ratio = math.log(chosen / (1 - chosen)) - math.log(rejected / (1 - rejected))
    output = ORPO(0.3)(POLICY, None, LENGTHS)
    assert output.losses[0].item() == pytest.approx(1.55 + 0.3 * math.log1p(math.exp(-ratio)))
    assert output.figures["log_odds"][0].item() == pytest.approx(ratio)
    certain = ORPO()(torch.zeros(1, 2, requires_grad=True), None, torch.ones(1, 2, dtype=torch.long)).losses
    assert certain.isfinite().all()


def test_divergence_and_mixture_by_hand():
    """EXO: KL of (q, 1 - q), q = sigmoid(0.5), from (0.9, 0.1); DiscoPOP: z = 0.5, weight sigmoid(5)."""
    q = sigmoid(0.5)[0]
    expected = q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    assert ExoPair(0.5, smoothing=0.1)(POLICY, REFERENCE).losses[0].item() == pytest.approx(expected)
    weight = sigmoid(5.0)[0]
    expected = (1 - weight) * math.log1p(math.exp(-0.5)) + weight * math.exp(-0.5)
    assert Discopop(0.5, tau=0.1)(POLICY, REFERENCE).losses[0].item() == pytest.approx(expected)


def test_exo_vanishes_at_its_target():
    """The divergence is 0 where beta delta = log((1 - eps) / eps)."""
    delta = math.log(0.9 / 0.1) / 0.5
    scores = torch.tensor([[delta, 0.0]], dtype=torch.float64, requires_grad=True)
    losses = ExoPair(0.5, smoothing=0.1)(scores, torch.zeros(1, 2)).losses
    losses.sum().backward()
    assert losses.item() == pytest.approx(0, abs=1e-9)
    assert scores.grad.abs().max() < 1e-8


@pytest.mark.parametrize("loss", [APOZero(), APODown(), NCAPair(), SPPO(), BCOPair(), RDPO(), CPO(), ORPO(), ExoPair(), Discopop()])
def test_missing_answers_are_not_counted(loss):
    wide, reference = torch.cat([POLICY, POLICY], 1), torch.cat([REFERENCE, 9 + REFERENCE], 1)
    lengths = torch.cat([LENGTHS, torch.zeros_like(LENGTHS)], 1)
    own = (reference, lengths) if loss.needs_reference else (None, lengths)
    alone = (REFERENCE, LENGTHS) if loss.needs_reference else (None, LENGTHS)
    close(loss(wide, *own).losses, loss(POLICY, *alone).losses)


# --- unpaired rows ---


def test_kto_by_hand():
    """Divergence: the mean log-ratio of answers of other rows, -0.4, 0.7, -0.8, -0.5: negative, so 0."""
    loss = KTO(0.5, desirable_weight=2.0, kl_update="micro_batch")
    losses = loss(POLICY, REFERENCE, desirable=DESIRABLE).losses
    signs = torch.tensor([1, -1, 1, -1])
    expected = torch.tensor([2.0, 1, 2, 1]) * (1 - torch.sigmoid(signs * 0.5 * RATIOS[:, 0]))
    close(losses, expected)
    others = RATIOS[:, 1] + 1.0
    shifted = torch.stack([POLICY[:, 0], POLICY[:, 1] + 1.0], 1)
    expected = torch.tensor([2.0, 1, 2, 1]) * (1 - torch.sigmoid(signs * 0.5 * (RATIOS[:, 0] - others.mean())))
    output = loss(shifted, REFERENCE, desirable=DESIRABLE)
    close(output.losses, expected)
    assert output.figures["kl"][0].item() == pytest.approx(others.mean().item(), abs=1e-6)


def test_the_divergence_of_kto_has_no_gradient():
    scores = POLICY.clone().requires_grad_()
    KTO(kl_update="micro_batch")(scores, REFERENCE - 1, desirable=DESIRABLE).losses.sum().backward()
    assert scores.grad[:, 1].abs().max() == 0
    assert (scores.grad[:, 0] * torch.tensor([-1, 1, -1, 1]) > 0).all()


def test_kto_uses_the_divergence_of_the_step_before():
    loss = KTO()
    assert loss(POLICY + 1, REFERENCE, desirable=DESIRABLE).figures["kl"][0] == 0
    loss(POLICY[:2] + 2, REFERENCE[:2], desirable=DESIRABLE[:2])
    loss.end_of_step()
    expected = torch.cat([RATIOS[:, 1] + 1, RATIOS[:2, 1] + 2]).mean()
    close(loss.divergence(), expected)
    loss.eval()
    loss(POLICY + 9, REFERENCE, desirable=DESIRABLE)
    loss.end_of_step()
    close(loss.divergence(), expected)
    loss.reset()
    assert loss.divergence() == 0


def test_pairs_and_unpaired_rows_are_not_confused():
    with pytest.raises(ValueError, match="KTO needs unpaired rows"):
        KTO()(POLICY, REFERENCE)
    with pytest.raises(ValueError, match=r"Sigmoid needs pairs of answers, got unpaired rows .*; use KTO"):
        Sigmoid()(POLICY, REFERENCE, desirable=DESIRABLE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KTO(desirable_weight=0), "desirable_weight must be > 0, got 0"),
        (lambda: KTO(kl_update="never"), "kl_update must be one of optimizer_step, micro_batch, got 'never'"),
        (lambda: BCOPair(shift="mean"), "shift must be running or none, got 'mean'"),
        (lambda: ExoPair(smoothing=0), r"smoothing must be in \(0, 0.5\], got 0"),
        (lambda: Discopop(tau=0), "tau must be > 0, got 0"),
        (lambda: RDPO(alpha=-1), "alpha must be >= 0, got -1"),
        (lambda: CPO(nll_weight=-1), "nll_weight must be >= 0, got -1"),
        (lambda: APOZero(beta=0), "beta must be > 0, got 0"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_discopop_is_finite_for_large_log_ratios():
    scores = torch.tensor([[-1500.0, -500.0], [-500.0, -1500.0]], requires_grad=True)
    losses = Discopop(0.1)(scores, torch.zeros(2, 2)).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert scores.grad.isfinite().all()


def test_robust_is_finite_for_any_smoothing_of_a_row():
    losses = Robust(0.1)(POLICY, REFERENCE, smoothing=torch.tensor([0.0, 0.5, 0.9, 0.45], dtype=torch.float64)).losses
    assert losses.isfinite().all()
    torch.testing.assert_close(losses[2], Robust(0.1, smoothing=0.45)(POLICY, REFERENCE).losses[2], rtol=1e-5, atol=0)
