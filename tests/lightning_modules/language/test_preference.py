"""The shared preference step: what it computes, what it logs, and what it leaves alone."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows

from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.config import build_language_model
from malleable.lightning_modules.language.preference import answer_figures, preference_step, reduce_rows, reward_figures
from malleable.lightning_modules.losses.answer_losses import KTO
from malleable.lightning_modules.losses.preference import Sigmoid, SoftmaxDPO

FAR = torch.tensor([[-9.0, -4.0], [-3.0, -7.0], [-5.0, -5.0], [-2.0, -8.0]])


def pairs(count: int = 4, rejected: int = 1):
    """Rows whose rejected answers are the titles that come behind the true one."""
    rows = tiny_rows(count)
    return batch_of([row | {"answers": [TOKENS[(row["item_ids"][0] + step) % 8] for step in range(rejected + 1)]} for row in rows])


def tiny_model(dropout: float = 0.0):
    config = tiny_config()
    config.scratch.dropout = dropout
    torch.manual_seed(0)
    return build_language_model(config, tiny_catalog().vocabulary)


def gradients(model, loss) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_loss_by_hand():
    """-log sigmoid(beta ((S_w - R_w) - (S_l - R_l))), the mean over rows, from separately computed log-probabilities."""
    model, batch = tiny_model(), pairs()
    output = preference_step(model, batch.replace(reference_logps=FAR), Sigmoid(beta=0.3))
    with torch.no_grad():
        ratios = answer_logps(model, batch) - FAR
    deltas = 0.3 * (ratios[:, 0] - ratios[:, 1])
    assert output.loss.item() == pytest.approx(torch.log1p((-deltas).exp()).mean().item(), abs=1e-5)
    assert output.extras["rewards_margins"].item() == pytest.approx(deltas.mean().item(), abs=1e-5)


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_the_policy_starts_at_the_reference(shared_prompt):
    """Step 0: loss log 2, rewards 0, nothing counted as right; dropout does not part the two."""
    model, batch = tiny_model(dropout=0.5), pairs()
    model.eval()
    with torch.no_grad():
        reference = answer_logps(model, batch)
    model.train()
    output = preference_step(model, batch.replace(reference_logps=reference), Sigmoid(), shared_prompt=shared_prompt)
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert output.extras["rewards_chosen"].abs() < 1e-5
    assert model.training, "dropout comes back for what follows"


def test_equal_chosen_and_rejected_answers_have_no_gradient():
    """Chosen = rejected among other pairs: loss log 2, gradient exactly zero, also from a reference that differs by rounding."""
    model = tiny_model()
    rows = tiny_rows(1)
    answer = rows[0]["answers"][0]
    batch = batch_of([rows[0] | {"answers": [answer, answer]}])
    batch = batch.replace(reference_logps=torch.tensor([[-3.0, -3.0001]]))
    output = preference_step(model, batch, Sigmoid())
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert all((gradient == 0).all() for gradient in gradients(model, output.loss))


@pytest.mark.parametrize("answers", [[(4, 5), (4, 5, 6)], [(4, 5, 6), (4, 5)]])
def test_an_answer_that_continues_another_is_not_the_same(answers):
    """One begins the other, whichever is chosen: a pair like any other."""
    row = tiny_rows(1)[0] | {"answers": answers}
    batch = batch_of([row]).replace(reference_logps=torch.zeros(1, 2))
    model = tiny_model()
    assert any(gradient.abs().sum() > 0 for gradient in gradients(model, preference_step(model, batch, Sigmoid()).loss))


def test_likelihood_of_the_chosen_may_be_added():
    """total = preference loss + weight x negative log-likelihood per chosen token."""
    model, batch = tiny_model(), pairs().replace(reference_logps=FAR)
    plain, added = (preference_step(model, batch, Sigmoid(), sft_weight=weight).loss.item() for weight in (0.0, 0.7))
    with torch.no_grad():
        chosen = answer_logps(model, batch)[:, 0].sum().item()
    tokens = int(batch.answer_mask[:, 0].sum())
    assert added - plain == pytest.approx(-0.7 * chosen / tokens, abs=1e-5)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_padding_rows_are_not_counted(sft_weight):
    model, batch = tiny_model(), pairs().replace(reference_logps=FAR)
    marked = batch.replace(sample_id=torch.tensor([0, 1, -3, -4]))
    output = preference_step(model, marked, Sigmoid(), sft_weight=sft_weight)
    alone = preference_step(model, pairs(2).replace(reference_logps=FAR[:2]), Sigmoid(), sft_weight=sft_weight)
    torch.testing.assert_close(output.loss, alone.loss)
    torch.testing.assert_close(output.extras, alone.extras)
    assert output.weight == 2


def test_figures_by_hand():
    """Two rows with two rejected answers: margins 2, -1, 0, 3 over beta; a tie is not right."""
    rewards = torch.tensor([[1.0, -1.0, 2.0], [3.0, 3.0, 0.0]])
    policy = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    lengths = torch.tensor([[1, 2, 1], [4, 4, 2]])
    rows = answer_figures(policy, lengths) | reward_figures(rewards, lengths > 0)
    figures = {name: value.item() for name, value in reduce_rows(rows, torch.ones(2, dtype=torch.bool)).items()}
    assert figures == {
        "rewards_chosen": 2.0,
        "rewards_rejected": 1.0,
        "rewards_margins": 1.0,
        "rewards_accuracies": 0.5,
        "logps_chosen": -2.5,
        "logps_rejected": -4.0,
        "logps_accuracies": 1.0,
        "mean_logps_accuracies": 0.75,
        "tokens_chosen": 2.5,
        "tokens_rejected": 2.25,
    }


def test_several_rejected_answers():
    model, batch = tiny_model(), pairs(rejected=3)
    with torch.no_grad():
        reference = answer_logps(model, batch)
    output = preference_step(model, batch.replace(reference_logps=reference), SoftmaxDPO())
    # -log sigmoid(-log 3) = log(1 + 3): all four answers stand alike.
    assert output.loss.item() == pytest.approx(math.log(4), abs=1e-6)
    assert not any(value.requires_grad for value in output.extras.values())


def test_a_missing_reference_is_an_error():
    message = "the batch has no reference log-probabilities: add the callback ReferenceCache .* or yield PreferenceBatch"
    with pytest.raises(MisconfigurationException, match=message):
        preference_step(tiny_model(), pairs(), Sigmoid())


def test_each_row_has_the_same_weight_in_an_incomplete_step():
    """Four rows and one row: the normaliser is their mean number, 2.5."""
    model, batch = tiny_model(), pairs().replace(reference_logps=FAR)
    whole = Sigmoid()(answer_logps(model, batch), FAR).losses
    steps = torch.tensor(2.5)
    first = preference_step(model, batch.replace(num_step_rows=steps), Sigmoid())
    second = preference_step(model, pairs(1).replace(reference_logps=FAR[:1], num_step_rows=steps), Sigmoid())
    torch.testing.assert_close((first.loss + second.loss) / 2, (whole.sum() + whole[0]) / 5)


def test_the_likelihood_of_undesirable_answers_is_not_increased():
    batch = pairs().replace(reference_logps=FAR, desirable=torch.tensor([True, False, True, False]))
    with pytest.raises(MisconfigurationException, match="sft_weight would also increase the likelihood of undesirable answers"):
        preference_step(tiny_model(), batch, KTO(), sft_weight=0.5)
    output = preference_step(tiny_model(), batch, KTO())
    assert {"rewards_margins", "rewards_accuracies", "kl", "logps", "tokens"} <= output.extras.keys()
    with pytest.raises(MisconfigurationException, match="Sigmoid cannot be trained on unpaired rows: choose another loss, such as KTO"):
        preference_step(tiny_model(), batch, Sigmoid())
    with pytest.raises(MisconfigurationException, match="KTO cannot be trained on pairs of answers"):
        preference_step(tiny_model(), pairs().replace(reference_logps=FAR), KTO())
