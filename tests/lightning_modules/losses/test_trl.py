"""Losses, and training steps, equal to those of TRL 1.16."""

from types import SimpleNamespace

import pytest
import torch

from malleable.lightning_modules.losses.adaptive_margin import SimPO
from malleable.lightning_modules.losses.answer_losses import KTO, SPPO, APODown, APOZero, BCOPair, NCAPair
from malleable.lightning_modules.losses.preference import CPO, IPO, ORPO, Discopop, ExoPair, Hinge, Robust, Sigmoid

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[bench]'")

B, T = 6, 9
BETA = 0.3
PAIRS = {
    "sigmoid": (Sigmoid(BETA), {}),
    "sigmoid_norm": (Sigmoid(BETA, length_norm=True), {}),
    "hinge": (Hinge(BETA), {}),
    "ipo": (IPO(BETA, length_norm=True), {}),
    "robust": (Robust(BETA, smoothing=0.2), {"label_smoothing": 0.2}),
    "exo_pair": (ExoPair(BETA, smoothing=0.05), {"label_smoothing": 0.05}),
    "nca_pair": (NCAPair(BETA), {}),
    "bco_pair": (BCOPair(BETA, shift="none"), {}),
    "sppo_hard": (SPPO(BETA), {}),
    "apo_zero": (APOZero(BETA), {}),
    "apo_down": (APODown(BETA), {}),
    "discopop": (Discopop(BETA, tau=0.05), {}),
}


def random_rows():
    """Log-probabilities of tokens of chosen and rejected answers ``(2 B, T)``, their lengths, and sums under a reference."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, T + 1, (2, B), generator=generator)
    mask = torch.arange(T) < lengths.flatten()[:, None]
    tokens = -2 * torch.rand(2 * B, T, generator=generator) * mask
    reference = tokens.sum(1) + torch.randn(2 * B, generator=generator)
    return tokens, mask, lengths.T, reference


def fake_accelerator():
    def gather(values):
        return values

    return SimpleNamespace(gather=gather, gather_for_metrics=gather, device=torch.device("cpu"))


def fake_model(tokens, training=True):
    outputs = {"log_probs": tokens, "entropy": tokens, "mean_logits": tokens, "is_top1": tokens > 0}

    class Model:
        def __call__(self, **_):
            return SimpleNamespace(**outputs)

    model = Model()
    model.training = training
    return model


def their_loss(name, tokens, mask, reference, **options):
    """The loss of ``DPOTrainer`` on log-probabilities instead of a model."""
    from collections import defaultdict

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=fake_accelerator(),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        beta=BETA,
        label_smoothing=0.0,
        loss_types=[name],
        loss_weights=[1.0],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(trainer).update(options)
    inputs = {
        "input_ids": torch.ones(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(2 * B, 1, dtype=torch.long), mask.long()], 1),
        "ref_chosen_logps": reference[:B],
        "ref_rejected_logps": reference[B:],
    }
    return trl.DPOTrainer._compute_loss(trainer, fake_model(tokens), inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize("name", PAIRS)
def test_losses_of_pairs_and_their_gradients(name):
    loss, options = PAIRS[name]
    tokens, mask, lengths, reference = random_rows()
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    expected, _ = their_loss(name, theirs, mask, reference, **options)
    found = loss(ours.sum(1).reshape(2, B).T, reference.reshape(2, B).T, lengths).losses.mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad * mask, theirs.grad * mask, atol=1e-6, rtol=1e-6)


def test_rewards():
    tokens, mask, lengths, reference = random_rows()
    _, metrics = their_loss("sigmoid", tokens, mask, reference)
    rewards = Sigmoid(BETA)(tokens.sum(1).reshape(2, B).T, reference.reshape(2, B).T, lengths).rewards
    assert rewards[:, 0].mean().item() == pytest.approx(metrics["rewards/chosen"][0], abs=1e-6)
    assert rewards[:, 1].mean().item() == pytest.approx(metrics["rewards/rejected"][0], abs=1e-6)
    assert (rewards[:, 0] > rewards[:, 1]).float().mean().item() == pytest.approx(metrics["rewards/accuracies"][0])


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (SimPO(BETA, gamma_beta_ratio=0.5 / BETA), {"loss_type": "simpo", "simpo_gamma": 0.5}),
        (SimPO(BETA, gamma_beta_ratio=0.5 / BETA, smoothing=0.1), {"loss_type": "simpo", "simpo_gamma": 0.5, "label_smoothing": 0.1}),
        (CPO(BETA, nll_weight=0.0), {"loss_type": "sigmoid"}),
        (CPO(BETA, nll_weight=0.0, smoothing=0.2), {"loss_type": "sigmoid", "label_smoothing": 0.2}),
    ],
)
def test_losses_without_reference(loss, options):
    from trl.experimental.cpo import CPOTrainer

    tokens, _, lengths, _ = random_rows()
    policy = tokens.sum(1).reshape(2, B).T
    logps = policy / lengths if isinstance(loss, SimPO) else policy
    trainer = SimpleNamespace(**{"alpha": 0.0, "beta": BETA, "label_smoothing": 0.0, "accelerator": fake_accelerator(), **options})
    expected, chosen, rejected = CPOTrainer.cpo_loss(trainer, logps[:, 0], logps[:, 1])
    output = loss(policy, None, lengths)
    torch.testing.assert_close(output.losses, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.rewards, torch.stack([chosen, rejected], 1))


def test_odds_ratio():
    from trl.experimental.orpo import ORPOTrainer

    tokens, _, lengths, _ = random_rows()
    policy = tokens.sum(1).reshape(2, B).T
    means = policy / lengths
    trainer = SimpleNamespace(beta=BETA, accelerator=fake_accelerator())
    theirs, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])
    torch.testing.assert_close(ORPO(BETA)(policy, None, lengths).losses, -theirs - means[:, 0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [-1.0, 2.0])
def test_unpaired_rows(shift):
    """A negative estimate of the divergence counts as 0."""
    from collections import defaultdict

    tokens, mask, lengths, reference = random_rows()
    tokens, others = tokens[:B], tokens[B:]
    desirable = torch.tensor([True, False, True, True, False, False])
    reference_others = others.sum(1) - shift
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=fake_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: others.sum(1),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(B, 1, dtype=torch.long), mask[:B].long()], 1),
        "label": desirable,
        "ref_logps": reference[:B],
        "ref_KL_logps": reference_others,
    }
    expected = trl.KTOTrainer._compute_loss(trainer, fake_model(tokens), inputs, False)
    loss = KTO(BETA, 1.5, 0.7, kl_update="micro_batch")
    policy = torch.stack([tokens.sum(1), others.sum(1)], 1)
    found = loss(policy, torch.stack([reference[:B], reference_others], 1), desirable=desirable).losses.mean()
    assert loss.divergence().item() == pytest.approx(max(0.0, shift), abs=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert lengths.shape == (B, 2)
