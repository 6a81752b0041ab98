"""A plain language model: learns text, keeps what it trains and what was edited, takes a published model as it is."""

import math
from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny import batch_of
from tiny_data import quiet_trainer

from malleable import AlphaEdit, CausalLM, EditEvaluation, EditingDataModule, LanguageModelConfig, LoRA, Scratch, Tuning
from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.language.tokenizer import tokenizer_digest
from malleable.datamodules.sources.editing.countries import Countries

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_length": 128}


def data(**options):
    return EditingDataModule(Countries(relations=["continent"], limit=5), **{"vocab_size": 500, "shuffles": 1, "pack_length": 64, **options})


def scratch(**options):
    return CausalLM(LanguageModelConfig(scratch=Scratch(**SIZES)), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model in Hugging Face format, and its run."""
    path = tmp_path_factory.mktemp("trained")
    module = scratch(tuning=Tuning(lr=1e-2))
    trainer = quiet_trainer(path, max_epochs=3)
    trainer.fit(module, data())
    return path, trainer, module


def test_training_lowers_the_loss_and_perplexity_is_its_exponential(folder):
    _, trainer, module = folder
    assert trainer.callback_metrics["val_loss"] < 3
    (figures,) = trainer.test(module, data(), verbose=False)
    assert figures["test_perplexity"] == pytest.approx(math.exp(figures["test_loss"]), rel=1e-4)


def test_evaluation_runs_the_model_once_a_batch(folder):
    _, trainer, module = folder
    calls = []
    handle = module.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        trainer.test(module, datamodule := data(), verbose=False)
    finally:
        handle.remove()
    assert len(calls) == len(datamodule.test_dataloader())


def test_the_exported_model_is_the_trained_one(folder):
    _, trainer, module = folder
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(f"{trainer.log_dir}/model")
    own = module.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in exported.state_dict().items())


def test_a_checkpoint_contains_the_vocabulary(folder):
    path = folder[1].checkpoint_callback.best_model_path
    loaded = CausalLM.load_from_checkpoint(path)
    assert tokenizer_digest(loaded.vocabulary.tokenizer) == tokenizer_digest(folder[2].vocabulary.tokenizer)
    assert replace(loaded.vocabulary, tokenizer=None) == replace(folder[2].vocabulary, tokenizer=None)
    own = folder[2].model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in loaded.model.state_dict().items())


def test_the_loss_is_that_of_the_batch():
    module = scratch(vocabulary=Vocabulary(300))
    module.configure_model()
    torch.nn.init.zeros_(module.model.lm_head.weight)
    batch = batch_of([{"sample_id": 0, "input_ids": [2, 4, 5, 1], "document_ids": [1, 1, 2, 2]}])
    output = module.compute_loss(batch)
    assert output.weight == 2
    assert float(output.loss.detach()) == pytest.approx(math.log(300), rel=1e-5)
    batch.sample_id = torch.tensor([-1])
    assert module.compute_loss(batch).weight == 0


def published(folder, **options):
    return LanguageModelConfig(name=f"{folder[1].log_dir}/model", **options)


def edit():
    return AlphaEdit(settings={"layers": [0, 1], "method": "ridge", "contexts": 0})


def test_a_frozen_model_is_edited_without_training(folder, tmp_path):
    module, evaluation = CausalLM(published(folder), frozen=True), EditEvaluation({"texts": 5})
    trainer = quiet_trainer(tmp_path, max_steps=0, callbacks=[edit(), evaluation])
    source = data(tokenizer=folder[2].vocabulary.tokenizer)
    trainer.fit(module, source)
    edited = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert sorted(edited["state_dict"]) == [f"model.model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    before = folder[2].model.state_dict()
    assert not torch.equal(edited["state_dict"]["model.model.layers.1.mlp.down_proj.weight"], before["model.layers.1.mlp.down_proj.weight"])
    other = CausalLM(published(folder), frozen=True)
    (figures,) = quiet_trainer(tmp_path / "test", callbacks=[edit(), EditEvaluation({"texts": 5})]).test(
        other, source, ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False
    )
    assert figures["test_efficacy"] == pytest.approx(evaluation.after.figures["efficacy"])
    assert figures["test_perplexity_ratio"] > 0
    state = module.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.model.state_dict().items())


def test_a_frozen_model_is_not_fitted_by_an_engine_that_needs_an_optimizer(tmp_path, monkeypatch):
    """As DeepSpeed's does; `test` and `validate` run there."""
    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    module = CausalLM(LanguageModelConfig(name="unused"), vocabulary=Vocabulary(16, eos_token_id=1), frozen=True)
    module.trainer = quiet_trainer(tmp_path, max_steps=0)
    with pytest.raises(MisconfigurationException, match=r"CausalLM\(frozen=True\) cannot run `fit` with SingleDeviceStrategy.*use `test`"):
        module.setup("fit")
    module.setup("test")


def test_a_frozen_model_is_not_trained(folder, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"CausalLM\(frozen=True\) has no trainable weights: set --trainer.max_steps 0"):
        quiet_trainer(tmp_path, max_epochs=1).fit(CausalLM(published(folder), frozen=True), data(tokenizer=folder[2].vocabulary.tokenizer))
    with pytest.raises(ValueError, match="a frozen model needs pretrained weights"):
        CausalLM(frozen=True)


def test_training_an_adapter_keeps_edited_weights_of_the_base(folder, tmp_path):
    """What an edit changed below an adapter stays in every later checkpoint."""
    config = published(folder, lora=LoRA(r=2))
    source = data(tokenizer=folder[2].vocabulary.tokenizer)
    callback = edit()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[callback])
    trainer.fit(CausalLM(config), source)
    edited = trainer.checkpoint_callback.best_model_path
    key = "model.base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"
    value = torch.load(edited, weights_only=True)["state_dict"][key]
    again, module = edit(), CausalLM(config)
    on = quiet_trainer(tmp_path / "on", max_epochs=2, callbacks=[again])
    on.fit(module, source, ckpt_path=edited, weights_only=True)
    kept = torch.load(on.checkpoint_callback.best_model_path, weights_only=True)
    assert torch.equal(kept["state_dict"][key], value)
    assert torch.equal(dict(module.named_parameters())[key], value)
