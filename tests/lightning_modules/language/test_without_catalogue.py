"""A language model needs a vocabulary only; recommending is a part that comes with a catalogue."""

import json
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import EOS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer

from malleable import DPO, SFT, CausalLM, Tuning
from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.lightning_modules.language.language_model import LanguageModel

VOCABULARY = Vocabulary(16, EOS)


class Texts(TinyData):
    """The toy rows as texts, without items."""

    def __init__(self, train=None):
        super().__init__(train)
        del self.catalog
        self.vocabulary = VOCABULARY


def pairs(count):
    return [row | {"answers": [*row["answers"], (9, EOS)], "reference_logps": [-3.0, -3.0]} for row in tiny_rows(count)]


def test_all_language_models_have_one_base_class():
    assert all(issubclass(kind, LanguageModel) for kind in (CausalLM, SFT, DPO))


def test_supervised_tuning_reports_the_perplexity(tmp_path):
    module = SFT(tiny_config())
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, Texts())
    (figures,) = trainer.test(module, Texts(), verbose=False)
    assert set(figures) == {"test_loss", "test_perplexity"}
    assert figures["test_perplexity"] == pytest.approx(math.exp(figures["test_loss"]), rel=1e-4)
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert "catalog" not in checkpoint
    assert checkpoint["vocabulary"]["vocab_size"] == 16
    assert "vocabulary" in json.loads((tmp_path / "run/model/malleable.json").read_text())
    loaded = SFT.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert (loaded.catalog, loaded.vocabulary) == (None, VOCABULARY)
    assert len(torch.cat(trainer.predict(loaded, Texts()))) == 5


def test_preferences_are_learnt_and_measured(tmp_path):
    module = DPO(tiny_config(), tuning=Tuning(lr=1e-2))
    trainer = quiet_trainer(tmp_path, max_epochs=3)
    trainer.fit(module, Texts(pairs(48)))
    assert trainer.callback_metrics["train_rewards_accuracies"] == 1
    data = Texts()
    data.setup("test")
    data.setup = lambda stage: None
    data.test_dataset = pairs(13)
    (figures,) = trainer.test(module, data, verbose=False)
    assert {"test_loss", "test_rewards_accuracies"} <= set(figures)
    assert not any("hr_" in name for name in figures)


def test_recommending_without_a_catalogue_is_an_error():
    module = SFT(tiny_config(), vocabulary=VOCABULARY)
    module.configure_model()
    with pytest.raises(MisconfigurationException, match="SFT has no catalogue of items to recommend: pass catalog="):
        module.recommend(batch_of(tiny_rows(2)))


def test_the_vocabulary_is_that_of_the_catalogue():
    assert SFT(tiny_config(), tiny_catalog()).vocabulary == tiny_catalog().vocabulary
    assert Catalog(("A",)).vocabulary is None


def test_weights_are_the_same_with_and_without_a_catalogue():
    rows = batch_of(tiny_rows(4))
    losses = []
    for options in ({"catalog": tiny_catalog()}, {"vocabulary": VOCABULARY}):
        torch.manual_seed(0)
        module = SFT(tiny_config(), **options)
        module.configure_model()
        losses.append(module.compute_loss(rows).loss)
    assert torch.equal(*losses)
