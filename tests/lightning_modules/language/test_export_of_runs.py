"""What a run exports is what `test` measured: the checkpoint that it registered, after edits."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny_data import TinyData, quiet_trainer
from tiny_module import lora, save_base
from transformers import AutoModelForCausalLM

from malleable.callbacks.editing.post_fit import PostFitEdit
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.storage import open_container
from malleable.lightning_modules.recommendation.sft import SFT

TOKENS = torch.tensor([[2, 4, 5, 1]])
EDITED = "model.layers.0.mlp.down_proj.weight"


class AddOne(PostFitEdit):
    """Add a constant to one matrix."""

    kind = "test"

    def make_patch(self, trainer, pl_module, model):
        from malleable.lightning_modules.patches.tensors import canonical_tensors

        shape = canonical_tensors(model)[EDITED].shape
        return self.patch(model, {EDITED: Delta(torch.full(shape, 0.5))}, title="add")


def fit(folder: Path, config: LanguageModelConfig, callbacks=(), ckpt_path=None, epochs=2, **trainer):
    """Fit; return the module, the Trainer and the run folder."""
    module = SFT(language_model=config, ks=(1, 3), tuning=Tuning(lr=3e-2, warmup_steps=0))
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=list(callbacks), **trainer)
    trainer.fit(module, TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer, folder / "run"


def first_epoch(folder: Path) -> ModelCheckpoint:
    """Keep the first epoch as the best one, as a monitor may."""
    return ModelCheckpoint(folder / "checkpoints", monitor="step", mode="min", save_top_k=1, filename="best")


def logits(module: SFT) -> torch.Tensor:
    with torch.no_grad():
        return module.model.eval()(TOKENS).logits


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_best_checkpoint_is_exported_not_the_last_epoch(tmp_path, kind):
    config = LanguageModelConfig(name=save_base(tmp_path / "base"))
    if kind == "adapter":
        config = lora(config.name)
    module, trainer, run = fit(tmp_path, config, [first_epoch(tmp_path)])
    last = logits(module)
    trainer.test(module, TinyData(), ckpt_path="best", weights_only=True, verbose=False)
    tested = logits(module)
    assert not torch.allclose(tested, last)
    exported = AutoModelForCausalLM.from_pretrained(run / ("model" if kind == "whole" else "adapter")).eval()
    torch.testing.assert_close(exported(TOKENS).logits, tested)


def test_an_edited_model_is_exported_with_its_patches(tmp_path):
    config = LanguageModelConfig(name=save_base(tmp_path / "base"))
    module, trainer, run = fit(tmp_path, config, [first_epoch(tmp_path), AddOne()])
    trainer.test(module, TinyData(), ckpt_path="best", weights_only=True, verbose=False)
    exported = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    torch.testing.assert_close(exported(TOKENS).logits, logits(module))
    edited = load_file(run / "model/model.safetensors")[EDITED]
    container = open_container(run / "model")
    assert [patch.title for patch in container.stack.patches] == ["add"]
    change = container.stack.revert(container.stack.ids, container.tensors)
    torch.testing.assert_close(edited - change.tensors[EDITED], torch.full_like(edited, 0.5))


def test_an_adapter_on_an_edited_base_is_exported_as_one_model(tmp_path):
    module, trainer, run = fit(tmp_path, lora(save_base(tmp_path / "base")), [first_epoch(tmp_path), AddOne()])
    trainer.test(module, TinyData(), ckpt_path="best", weights_only=True, verbose=False)
    assert not (run / "adapter").exists()
    exported = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    torch.testing.assert_close(exported(TOKENS).logits, logits(module))
    assert hasattr(module.model, "peft_config"), "the module goes on with its adapter"


def test_without_checkpoints_the_weights_in_memory_are_exported(tmp_path, caplog):
    with caplog.at_level("INFO", logger="malleable"):
        module, _, run = fit(tmp_path, LanguageModelConfig(name=save_base(tmp_path / "base")), enable_checkpointing=False)
    assert "the weights in memory are exported" in caplog.text
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(run / "model").eval()(TOKENS).logits, logits(module))


def test_a_run_killed_before_its_export_exports_when_resumed(tmp_path, monkeypatch):
    config = LanguageModelConfig(name=save_base(tmp_path / "base"))

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("malleable.lightning_modules.language.language_model.export_result", killed)
        with pytest.raises(SystemExit):
            fit(tmp_path, config, [ModelCheckpoint(tmp_path / "checkpoints", save_last=True)])
    assert not (tmp_path / "run/model").exists()
    again = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    module, _, run = fit(tmp_path, config, [again], ckpt_path=tmp_path / "checkpoints/last.ckpt")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(run / "model").eval()(TOKENS).logits, logits(module))


def test_a_sharded_checkpoint_is_read_completely(tmp_path):
    """The folders that FSDP and ZeRO write."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    from malleable.lightning_modules.language.export import read_checkpoint

    save({"model": {"model.weight": torch.ones(2), "other": torch.zeros(1)}}, storage_writer=FileSystemWriter(tmp_path / "sharded"), no_dist=True)
    torch.save({"epoch": 1}, tmp_path / "sharded/meta.pt")
    weights, stack = read_checkpoint(tmp_path / "sharded")
    assert weights.keys() == {"weight"}
    assert not stack.patches
