"""Preference optimisation: it starts at log 2, learns, needs a reference, and is measured like any recommender."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import ready

from malleable.callbacks.reference import ReferenceCache
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.preference import DMPO, Sigmoid, SoftmaxDPO
from malleable.lightning_modules.recommendation.dpo import DPO


def pairs(count: int, rejected: int = 1) -> list[dict]:
    """The true title against those two and more behind it."""
    rows = []
    for row in tiny_rows(count):
        items = [row["item_ids"][0], *((row["item_ids"][0] + 2 + step) % 8 for step in range(rejected))]
        rows.append(row | {"item_ids": items, "answers": [TOKENS[item] for item in items]})
    return rows


def fit(folder: Path, rows: list[dict], **settings):
    """Fit for three epochs; return the module, the Trainer and what was logged at each step."""
    torch.manual_seed(0)
    module = DPO(**{"language_model": tiny_config(), "ks": (1, 3), "tuning": Tuning(lr=1e-2, warmup_steps=0), **settings})
    trainer = quiet_trainer(folder, max_epochs=3, callbacks=[ReferenceCache()], enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, TinyData(train=rows))
    with (folder / "run/metrics.csv").open() as file:
        steps = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return module, trainer, [step for step in steps if "train_loss" in step]


def mean_of_epoch(steps, name):
    """Mean over the six steps of the last epoch."""
    return sum(step[name] for step in steps[-6:]) / 6


def test_training_increases_the_margin(tmp_path):
    module, trainer, steps = fit(tmp_path, pairs(48), loss=Sigmoid(beta=0.5))
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["train_rewards_margins"] == pytest.approx(0, abs=1e-6)
    last = steps[-12:]
    assert sum(step["train_loss"] for step in last) / 12 < 0.5
    assert sum(step["train_rewards_accuracies"] for step in last) / 12 > 0.9
    assert steps[-1]["train_rewards_chosen"] > steps[-1]["train_rewards_rejected"]
    (result,) = trainer.test(module, TinyData(), verbose=False)
    assert {"test_loss", "test_hr_1", "test_ndcg_3", "test_or_ratio_3"} <= result.keys()


@pytest.mark.parametrize("loss", [SoftmaxDPO(beta=0.5), DMPO(beta=0.5), Sigmoid(beta=0.5)], ids=lambda loss: type(loss).__name__)
def test_several_rejected_answers(tmp_path, loss):
    _, _, steps = fit(tmp_path, pairs(24, rejected=3), loss=loss)
    start = math.log(4) if isinstance(loss, SoftmaxDPO) else math.log(2)
    assert steps[0]["train_loss"] == pytest.approx(start, abs=1e-6)
    assert mean_of_epoch(steps, "train_loss") < start - 0.15
    assert mean_of_epoch(steps, "train_rewards_accuracies") > 0.9


def test_sft_weight_keeps_the_likelihood_of_chosen_answers(tmp_path):
    """Preference alone may lower both answers; the likelihood term raises the chosen."""
    _, _, plain = fit(tmp_path / "plain", pairs(24))
    _, _, added = fit(tmp_path / "added", pairs(24), sft_weight=1.0)
    assert added[0]["train_loss"] > plain[0]["train_loss"] + 1, "the likelihood of an untrained model, about ln 16"
    assert mean_of_epoch(added, "train_logps_chosen") > mean_of_epoch(plain, "train_logps_chosen") + 0.5


def test_evaluation_without_rejected_answers_measures_likelihood():
    """Validation and test rows have one answer, or several without a reference: the loss is the true answer's, per token."""
    module = ready(DPO)
    single, several = batch_of(tiny_rows(4)), batch_of(pairs(4))
    expected = module.answer_loss(single)
    assert module.compute_loss(several).loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert module.compute_loss(single).weight == expected.weight
    with torch.no_grad():
        reference = answer_logps(module.model, several)
    known = batch_of([row | {"reference_logps": logps} for row, logps in zip(pairs(4), reference.tolist(), strict=True)])
    assert module.compute_loss(known).loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_training_needs_pairs_with_a_reference(tmp_path):
    module = ready(DPO).train()
    with pytest.raises(MisconfigurationException, match="DPO needs chosen and rejected answers, got AnswerBatch: use PreferenceDataModule, or give"):
        module.compute_loss(batch_of(tiny_rows(4)))
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="the batch has no reference log-probabilities: add the callback ReferenceCache"):
        trainer.fit(DPO(language_model=tiny_config(), catalog=tiny_catalog()), TinyData(train=pairs(8)))


def test_defaults_and_refusals():
    module = DPO()
    assert module.tuning.lr == 2e-5
    assert isinstance(module.loss, Sigmoid)
    assert module.loss.beta == 0.1
    with pytest.raises(ValueError, match="sft_weight must be >= 0, got -1"):
        DPO(sft_weight=-1)


def test_a_checkpoint_stores_the_loss():
    """What loads it goes on training with the same loss."""
    stored = json.loads(json.dumps(dict(DPO(language_model=tiny_config(), loss=SoftmaxDPO(beta=0.7)).hparams)))
    loss = DPO(**stored).loss
    assert isinstance(loss, SoftmaxDPO)
    assert loss.beta == 0.7
