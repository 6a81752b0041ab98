"""Golden values and limits of the preference losses; the arithmetic is in the docstrings."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from torch.nn import functional as F

from malleable import DPO
from malleable.lightning_modules.losses.adaptive_margin import AdaptiveMargin, SimPO
from malleable.lightning_modules.losses.answer_losses import KTO, SPPO, APODown, APOZero, BCOPair, NCAPair
from malleable.lightning_modules.losses.preference import CPO, DMPO, IPO, ORPO, RDPO, Discopop, ExoPair, Hinge, Robust, Sigmoid, SoftmaxDPO
from malleable.lightning_modules.losses.preference_base import PreferenceInputs, PreferenceLoss
from malleable.lightning_modules.serialization import object_from_plain

CHOSEN = torch.tensor([-6.2, -11.4, -3.3, -20.1], dtype=torch.float64)
REJECTED = torch.tensor([-7.9, -10.2, -8.8, -19.5], dtype=torch.float64)
REFERENCE = torch.stack([torch.tensor([-6.8, -11.0, -4.1, -21.0]), torch.tensor([-7.5, -10.9, -8.0, -19.0])], 1).double()
PAIRWISE = [Sigmoid(), Sigmoid(smoothing=0.2), Robust(), IPO(), Hinge()]


def policy(requires_grad: bool = False) -> torch.Tensor:
    return torch.stack([CHOSEN, REJECTED], 1).requires_grad_(requires_grad)


def test_golden_dpo():
    """delta = (S_w - R_w) - (S_l - R_l) = [1.0, -1.1, 1.6, 1.4]; dL/dS_w = -beta sigmoid(-beta delta)."""
    scores = policy(requires_grad=True)
    losses, rewards, _ = Sigmoid(beta=0.1)(scores, REFERENCE)
    expected = torch.tensor([0.6443966601, 0.7496589186, 0.6163437730, 0.6255951823], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, atol=1e-7, rtol=0)
    assert losses.mean().item() == pytest.approx(0.6589986335, abs=1e-7)
    losses.sum().backward()
    gradient = torch.tensor([-0.0475020813, -0.0527472304, -0.0460085115, -0.0465057055], dtype=torch.float64)
    torch.testing.assert_close(scores.grad[:, 0], gradient, atol=1e-8, rtol=0)
    torch.testing.assert_close(scores.grad[:, 1], -gradient, atol=1e-8, rtol=0)
    torch.testing.assert_close(rewards[:, 0] - rewards[:, 1], torch.tensor([0.1, -0.11, 0.16, 0.14], dtype=torch.float64), atol=1e-6, rtol=0)
    assert not rewards.requires_grad


def test_golden_robust():
    losses = Robust(beta=0.1, smoothing=0.1)(policy(), REFERENCE).losses
    expected = torch.tensor([0.6318966601, 0.7634089186, 0.5963437730, 0.6080951823], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, atol=1e-7, rtol=0)


def test_golden_conservative():
    """Row 1 of the smoothed golden values, eps 0.1: 0.9 softplus(0.11) + 0.1 softplus(-0.11) = 0.7386589186."""
    assert Sigmoid(beta=0.1, smoothing=0.1)(policy(), REFERENCE).losses[1].item() == pytest.approx(0.7386589186, abs=1e-7)


@pytest.mark.parametrize("loss", [Sigmoid(), Sigmoid(smoothing=0.3), Robust(), DMPO(), SoftmaxDPO()])
def test_equal_policy_and_reference_give_log_two(loss):
    losses, rewards, _ = loss(REFERENCE, REFERENCE)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert rewards.abs().max() == 0


@pytest.mark.parametrize("loss", PAIRWISE)
def test_identical_answers_have_no_gradient(loss):
    """With the same answer twice, delta is 0 whatever the weights: the two gradients cancel."""
    score = CHOSEN.clone().requires_grad_()
    loss(torch.stack([score, score], 1), torch.stack([REFERENCE[:, 0], REFERENCE[:, 0]], 1)).losses.sum().backward()
    assert score.grad.abs().max() < 1e-15


def test_small_beta_limit():
    """beta -> 0: loss -> log 2 and dL/dS_w -> -beta / 2."""
    scores = policy(requires_grad=True)
    losses = Sigmoid(beta=1e-6)(scores, REFERENCE).losses
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.grad[:, 0], torch.full_like(losses, -0.5e-6), atol=1e-11, rtol=0)


def test_ipo_and_hinge_by_hand():
    """IPO: (delta - 5)^2 at beta 0.1; hinge: 1 - 0.1 delta."""
    delta = torch.tensor([1.0, -1.1, 1.6, 1.4], dtype=torch.float64)
    torch.testing.assert_close(IPO(beta=0.1)(policy(), REFERENCE).losses, (delta - 5) ** 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(Hinge(beta=0.1)(policy(), REFERENCE).losses, 1 - 0.1 * delta, atol=1e-6, rtol=0)


def test_multi_negative_losses_reduce_to_dpo_with_one():
    expected = Sigmoid(beta=0.5)(policy(), REFERENCE).losses
    torch.testing.assert_close(SoftmaxDPO(beta=0.5)(policy(), REFERENCE).losses, expected)
    torch.testing.assert_close(DMPO(beta=0.5)(policy(), REFERENCE).losses, expected)


def test_multi_negative_losses_by_definition():
    ratios = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(ratios)
    margins = ratios[:, 1:] - ratios[:, :1]
    softmax = -F.logsigmoid(-torch.log((0.7 * margins).exp().sum(1)))
    torch.testing.assert_close(SoftmaxDPO(beta=0.7)(ratios, zero).losses, softmax)
    mean = -F.logsigmoid(0.7 * (ratios[:, 0] - ratios[:, 1:].mean(1)))
    torch.testing.assert_close(DMPO(beta=0.7)(ratios, zero).losses, mean)
    pairs = F.softplus(0.7 * margins).mean(1)
    torch.testing.assert_close(Sigmoid(beta=0.7)(ratios, zero).losses, pairs)


def test_softmax_loss_does_not_overflow():
    assert SoftmaxDPO(beta=1.0)(torch.tensor([[-900.0, 0.0, 0.0]]), torch.zeros(1, 3)).losses.isfinite().all()


def test_length_norm_divides_before_beta():
    lengths = torch.tensor([[2, 4]] * 4)
    expected = Sigmoid(beta=0.1)(policy() / lengths, REFERENCE / lengths).losses
    torch.testing.assert_close(Sigmoid(beta=0.1, length_norm=True)(policy(), REFERENCE, lengths).losses, expected)
    with pytest.raises(ValueError, match="length_norm needs the lengths of the answers"):
        Sigmoid(length_norm=True)(policy(), REFERENCE)


def test_no_gradient_reaches_the_reference():
    reference = REFERENCE.clone().requires_grad_()
    Sigmoid()(policy(requires_grad=True), reference).losses.sum().backward()
    assert reference.grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sigmoid(beta=0), "beta must be > 0, got 0"),
        (lambda: Sigmoid(smoothing=1.2), r"smoothing must be in \[0, 1\], got 1.2"),
        (lambda: Robust(smoothing=0.5), r"smoothing must be in \[0, 0.5\), got 0.5"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- arguments of every loss ---


@pytest.mark.parametrize("loss", [*PAIRWISE, DMPO(), SoftmaxDPO()])
def test_missing_answers_are_not_counted(loss):
    """A row with one rejected answer has the same loss and gradient beside a wider one."""
    ratios = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[3, 2, 4, 1], [3, 2, 0, 0]])
    wide, alone = ratios.clone().requires_grad_(), ratios[1:, :2].clone().requires_grad_()
    together = loss(wide, torch.zeros_like(ratios), lengths).losses
    single = loss(alone, torch.zeros(1, 2, dtype=torch.float64), lengths[1:, :2]).losses
    torch.testing.assert_close(together[1:], single)
    together.sum().backward()
    single.sum().backward()
    torch.testing.assert_close(wide.grad[1:, :2], alone.grad)
    assert wide.grad[1, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("kind", [Sigmoid, Robust])
def test_smoothing_of_each_row_replaces_that_of_the_loss(kind):
    rates = [0.0, 0.1, 0.2, 0.4]
    expected = torch.stack([kind(smoothing=rate)(policy(), REFERENCE).losses[row] for row, rate in enumerate(rates)])
    smoothing = torch.tensor(rates, dtype=torch.float64)
    torch.testing.assert_close(kind(smoothing=0.3)(policy(), REFERENCE, smoothing=smoothing).losses, expected)


@pytest.mark.parametrize("loss", [IPO(), Hinge(), Discopop()])
def test_smoothing_mixes_the_losses_of_both_orders(loss):
    eps = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    reverse = loss(policy().flip(1), REFERENCE.flip(1)).losses
    expected = (1 - eps) * loss(policy(), REFERENCE).losses + eps * reverse
    torch.testing.assert_close(loss(policy(), REFERENCE, smoothing=eps).losses, expected)


@pytest.mark.parametrize("loss", [DMPO(), SoftmaxDPO(), ExoPair(), NCAPair(), APOZero(), APODown(), SPPO(), BCOPair()])
def test_smoothing_that_has_no_effect_is_refused(loss):
    with pytest.raises(ValueError, match="does not accept a smoothing for each row; use a pairwise loss such as Sigmoid"):
        loss(policy(), REFERENCE, smoothing=torch.full((4,), 0.1))


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="Sigmoid needs log-probabilities of a reference"):
        Sigmoid()(policy())


class Shorter(PreferenceLoss):
    """A user's own loss, which reads the rows."""

    needs_lengths = True

    def losses(self, rows: PreferenceInputs) -> torch.Tensor:
        assert rows.lengths is not None
        return F.softplus(-self.beta * rows.delta[:, 0]) * rows.lengths[:, 0]


def test_a_loss_of_a_user_reads_the_rows():
    lengths = torch.tensor([[1, 2], [2, 2], [3, 1], [4, 4]])
    output = Shorter(beta=0.1)(policy(), REFERENCE, lengths)
    torch.testing.assert_close(output.losses, Sigmoid(beta=0.1)(policy(), REFERENCE).losses * lengths[:, 0])
    assert output.figures == {}
    with pytest.raises(ValueError, match="Shorter needs the lengths of the answers"):
        Shorter()(policy(), REFERENCE)


class WithState(Sigmoid):
    """Counts optimizer steps, and needs no reference."""

    needs_reference = False

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta)
        self.register_buffer("steps", torch.full((1,), 1e-9, dtype=torch.float32))

    def end_of_step(self):
        self.steps += 1

    def reset(self):
        self.steps.zero_()


def test_state_stays_float32_when_a_module_is_converted():
    loss = WithState().to(torch.bfloat16)
    assert loss.steps.dtype == torch.float32
    assert loss.steps.item() == torch.tensor(1e-9).item()
    assert "steps" in loss.state_dict()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_module_calls_end_of_step_of_its_loss(tmp_path, accumulated):
    """Once an optimizer step, whatever the accumulation; the state is in the checkpoint."""
    rows = [row | {"answers": [*row["answers"], (9, EOS)]} for row in tiny_rows(16)]
    module = DPO(tiny_config(), tiny_catalog(), loss=WithState())
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, TinyData(rows, batch_size=4 // accumulated, global_batch_size=4))
    assert module.loss.steps.item() == pytest.approx(4)
    stored = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert stored["state_dict"]["loss.steps"].item() == pytest.approx(4)


# --- the theory of self-play on three items, solved with the real loss ---

TARGET = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
START = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def minimise(beta: float, reference: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Exact minimiser of the expected loss over pairs (a ~ TARGET, b ~ rejected), by L-BFGS on the logits."""
    logits = reference.log().clone().requires_grad_()
    loss = Sigmoid(beta=beta)
    first, second = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    weights = (TARGET[:, None] * rejected[None, :]).flatten()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        pairs = torch.stack([logps[first], logps[second]], -1).reshape(-1, 2)
        refs = torch.stack([reference.log()[first], reference.log()[second]], -1).reshape(-1, 2)
        value = (weights * loss(pairs, refs).losses).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize(
    ("beta", "rounds"),
    [
        (1.0, [(0.6, 0.3, 0.1)]),
        (0.75, [(0.7285832499, 0.2130390346, 0.0583777155), (0.5522849278, 0.3302147964, 0.1175002759)]),
        (0.5, [(0.8940397351, 0.0894039735, 0.0165562914), (0.2, 0.5, 0.3)]),
        (2.0, [(0.3819660113, 0.4270509831, 0.1909830056)]),
    ],
)
def test_tabular_self_play(beta, rounds):
    """Rejected answers and reference are the previous round's policy: pi' ~ pi^(1 - 1/beta) p^(1/beta)."""
    current = START
    for expected in rounds:
        current = minimise(beta, current, current)
        torch.testing.assert_close(current, torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=0)


def test_tabular_uniform_negatives_sharpen_popularity():
    """pi' ~ reference p^(1/beta): with beta 0.5 and the reference START, (.2 .36, .5 .09, .3 .01) normalised."""
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(minimise(0.5, START, uniform), torch.tensor([0.6, 0.375, 0.025], dtype=torch.float64), atol=2e-6, rtol=0)


class Scaled(Sigmoid):
    """A user's own loss, with an argument more."""

    def __init__(self, beta: float = 0.1, scale: float = 1.0) -> None:
        super().__init__(beta)
        self.scale = scale


@pytest.mark.parametrize(
    "loss",
    [
        *(Sigmoid(0.7, 0.1, True), Robust(0.3, 0.2), IPO(0.4), Hinge(2.0), SoftmaxDPO(0.9), DMPO(0.2, True), Scaled(0.5, 3.0)),
        *(RDPO(0.3, 0.1), CPO(0.3, 0.5), ORPO(0.2), ExoPair(0.3, 0.01), Discopop(0.2, 0.1), SimPO(2.5, 0.6), KTO(0.2, 1.3, 1.0, "micro_batch")),
        *(NCAPair(0.3), APOZero(0.3), APODown(0.3), SPPO(0.3), BCOPair(0.3, "none"), AdaptiveMargin(2.5, 0.6, 0.2, "reward", z_clip=3.0)),
    ],
)
def test_a_loss_is_restored_from_plain_data(loss, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Scaled=Scaled))
    stored = json.loads(json.dumps(loss.as_plain()))
    again = object_from_plain(PreferenceLoss, stored)
    assert type(again) is type(loss)
    assert again.as_plain() == stored
    assert again.beta == loss.beta


def test_a_renamed_loss_of_an_earlier_version_is_built():
    stored = {"class_path": "malleable.lightning_modules.losses.preference.SDPO", "init_args": {"beta": 0.7}}
    loss = object_from_plain(PreferenceLoss, stored)
    assert type(loss) is SoftmaxDPO
    assert loss.beta == 0.7


def test_only_preference_losses_are_built_from_a_checkpoint():
    with pytest.raises(TypeError, match=r"torch\.nn\.MSELoss, which is not a subclass of PreferenceLoss"):
        object_from_plain(PreferenceLoss, {"class_path": "torch.nn.MSELoss"})
