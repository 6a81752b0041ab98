"""A checkpoint is one file that brings all but the base model, and refuses what it does not fit; a run leaves a model that others load."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from tiny import EOS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import lora, save_base
from transformers import AutoModelForCausalLM

from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sft import SFT


def with_vocabulary(**changes):
    catalog = tiny_catalog()
    return replace(catalog, vocabulary=replace(catalog.vocabulary, **changes))


def fit(folder: Path, config: LanguageModelConfig, **settings):
    """Fit for an epoch; return the module, the Trainer and the checkpoint's path."""
    module = SFT(language_model=config, ks=(1, 3), tuning=Tuning(lr=1e-2, warmup_steps=0), **settings)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[ModelCheckpoint(folder / "checkpoints", filename="saved")])
    trainer.fit(module, TinyData())
    return module, trainer, folder / "checkpoints/saved.ckpt"


# --- checkpoints ---


def test_checkpoint_restores_weights_catalogue_and_settings(tmp_path):
    """Nothing but the file is needed: no catalogue, no settings, no pickle."""
    module, _, path = fit(tmp_path, tiny_config(), decoding=Decoding(num_beams=5, exclude_seen=False))
    batch = batch_of(tiny_rows(6))
    loaded = SFT.load_from_checkpoint(path, weights_only=True).eval()
    assert loaded.catalog == tiny_catalog()
    assert (loaded.language_model, loaded.decoding, loaded.tuning, loaded.ks) == (module.language_model, module.decoding, module.tuning, module.ks)
    expected, found = module.eval().recommend(batch, 8), loaded.recommend(batch, 8)
    assert torch.equal(found.item_ids, expected.item_ids)
    assert torch.equal(found.scores, expected.scores)


def test_testing_from_a_checkpoint_equals_testing_the_fitted_model(tmp_path):
    module, trainer, path = fit(tmp_path, tiny_config())
    straight = trainer.test(module, TinyData(), verbose=False)
    fresh = SFT(language_model=tiny_config(), ks=(1, 3))
    assert quiet_trainer(tmp_path).test(fresh, TinyData(), ckpt_path=path, weights_only=True, verbose=False) == straight
    assert {"test_loss", "test_hr_1", "test_ndcg_3", "test_div_ratio_3", "test_or_ratio_3"} <= straight[0].keys()


def test_adapter_checkpoint_contains_the_adapter_only(tmp_path):
    """The base is neither in it under one name nor, as a head tied to the embeddings, under another."""
    module, _, path = fit(tmp_path, lora(save_base(tmp_path / "base")))
    checkpoint = torch.load(path, weights_only=True)
    trainable = {f"model.{name}" for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert set(checkpoint["state_dict"]) == trainable
    assert all("lora_" in name for name in trainable)
    loaded = SFT.load_from_checkpoint(path, weights_only=True).eval()
    batch = batch_of(tiny_rows(6))
    assert torch.equal(loaded.recommend(batch).scores, module.eval().recommend(batch).scores)


def test_adapter_training_is_resumed(tmp_path):
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    module = SFT(language_model=config, ks=(1, 3))
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, TinyData(), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 24


def test_another_base_is_refused(tmp_path):
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    other = lora(save_base(tmp_path / "other", seed=1))
    message = "trained with another base model than '.*other' .fingerprint .*give the base model that it was trained with"
    with pytest.raises(MisconfigurationException, match=message):
        SFT.load_from_checkpoint(path, weights_only=True, language_model=other)
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path).test(SFT(language_model=other), TinyData(), ckpt_path=path)


def test_the_base_of_an_earlier_checkpoint_is_not_compared(tmp_path, caplog):
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    entries = torch.load(path, weights_only=True)
    torch.save(entries | {"base_fingerprint": "0" * 64}, path)
    SFT.load_from_checkpoint(path, weights_only=True, language_model=config)
    assert "written by an earlier version: its base model cannot be compared" in caplog.text


def test_missing_and_unexpected_weights_are_refused(tmp_path):
    """Loading is not strict because frozen weights are left out; so the module looks itself."""
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    checkpoint = torch.load(path, weights_only=True)
    first, *rest = checkpoint["state_dict"].items()
    module = SFT(language_model=config)
    with pytest.raises(
        MisconfigurationException, match=r"does not fit this module: missing \['model.*lora_A.*'\], unexpected \[\] \(1 and 0 in total\)"
    ):
        module.on_load_checkpoint(checkpoint | {"state_dict": dict(rest)})
    with pytest.raises(MisconfigurationException, match=r"missing \[\], unexpected \['model.other'\] \(0 and 1 in total\)"):
        module.on_load_checkpoint(checkpoint | {"state_dict": {**dict([first, *rest]), "model.other": first[1]}})


def test_another_vocabulary_is_refused(tmp_path):
    _, _, path = fit(tmp_path, tiny_config())
    with pytest.raises(MisconfigurationException, match="vocab_size 16 in the checkpoint, 20 here"):
        SFT.load_from_checkpoint(path, weights_only=True, catalog=with_vocabulary(vocab_size=20))


def test_a_checkpoint_without_catalogue_needs_one():
    with pytest.raises(MisconfigurationException, match="SFT needs `vocabulary`, which the checkpoint does not contain: pass vocabulary="):
        SFT().on_load_checkpoint({"state_dict": {}})


# --- export ---


@torch.no_grad()
def test_the_run_exports_a_model_that_transformers_loads(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    module, _, _ = fit(tmp_path, tiny_config(), catalog=with_vocabulary(tokenizer=str(tokenizer)))
    folder = tmp_path / "run/model"
    assert (folder / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([[2, 4, 5, EOS]])
    torch.testing.assert_close(loaded(tokens).logits, module.model.eval()(tokens).logits)


@torch.no_grad()
def test_the_run_exports_an_adapter_that_peft_loads(tmp_path):
    base = save_base(tmp_path / "base")
    module, _, _ = fit(tmp_path, lora(base))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run/adapter").eval()
    tokens = torch.tensor([[2, 4, 5, EOS]])
    torch.testing.assert_close(loaded(tokens).logits, module.model.eval()(tokens).logits)
    assert not (tmp_path / "run/model").exists()


def test_fast_dev_run_exports_nothing(tmp_path):
    quiet_trainer(tmp_path, fast_dev_run=True).fit(SFT(language_model=tiny_config()), TinyData())
    assert not list(tmp_path.rglob("*.safetensors"))
