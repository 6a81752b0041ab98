"""Language models train on preference data, without a catalogue, and answer held-out prompts."""

import pytest
import torch
from tiny_data import quiet_trainer

from malleable import DPO, SFT, LanguageModelConfig, PreferenceDataModule, ReferenceCache, SyntheticPreferences, Tuning
from malleable.datamodules.preference.split import PreferenceSplit
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.config import Scratch

SMALL = LanguageModelConfig(scratch=Scratch(hidden_size=32, num_layers=2, num_heads=2, max_length=64))


def make_data(folder, **options):
    return PreferenceDataModule(
        SyntheticPreferences(900), **{"batch_size": 32, "split": PreferenceSplit(0.15, 0.1), "cache_dir": str(folder)} | options
    )


@torch.no_grad()
def held_out_accuracy(module, data):
    """Share of validation rows whose chosen answer is more probable than the rejected one."""
    values = torch.cat([answer_logps(module.eval().model, batch) for batch in data.val_dataloader()])
    return (values[:, 0] > values[:, 1]).float().mean()


def test_preference_optimisation_generalises_to_held_out_prompts(tmp_path):
    module, data = DPO(SMALL, tuning=Tuning(lr=1e-2)), make_data(tmp_path)
    trainer = quiet_trainer(tmp_path, max_epochs=5, callbacks=[ReferenceCache()], limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train_rewards_accuracies"] > 0.9
    # Above the range of the control experiment below.
    assert held_out_accuracy(module, data) > 0.75
    stored = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert stored["vocabulary"]["eos_token_id"] == data.vocabulary.eos_token_id
    again = make_data(tmp_path, tokenizer=trainer.checkpoint_callback.best_model_path)
    again.setup("fit")
    assert (again.vocabulary.vocab_size, again.vocabulary.eos_token_id) == (data.vocabulary.vocab_size, data.vocabulary.eos_token_id)
    assert again.train_dataset[0] == data.train_dataset[0]


def test_random_labels_teach_nothing_about_held_out_prompts(tmp_path):
    module, data = DPO(SMALL, tuning=Tuning(lr=1e-2)), make_data(tmp_path, label_noise=0.5)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[ReferenceCache()], limit_val_batches=0).fit(module, datamodule=data)
    assert 0.25 < held_out_accuracy(module, data) < 0.75


def test_supervised_tuning_on_the_chosen_answers_measures_held_out_pairs(tmp_path):
    module, data = SFT(SMALL, tuning=Tuning(lr=1e-2)), make_data(tmp_path, train_view="chosen")
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=data)
    # Answers of a kind are equally likely at first: a mean of 1 nat a token, against 6.1 of an untrained model.
    assert trainer.callback_metrics["train_loss"] < 1.5
    assert trainer.callback_metrics["val_loss"] < 1.5
    # The module logs the accuracy of the same rows.
    assert trainer.callback_metrics["val_logps_accuracies"].item() == pytest.approx(held_out_accuracy(module, data).item())
