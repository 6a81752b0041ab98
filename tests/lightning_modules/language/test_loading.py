"""Pretrained weights: the text part of models with images, incomplete checkpoints, names on the hub."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from architectures import tiny_model
from image_models import image_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_module import lora, save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from malleable.datamodules.batch import Vocabulary
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, build_language_model
from malleable.lightning_modules.language.export import save_language_model
from malleable.lightning_modules.language.loading import load_pretrained

VOCABULARY = Vocabulary(97, 2, 0)
VOCABULARY_16 = Vocabulary(16, 1, 0)
TOKENS = torch.arange(3, 20)[None]


@pytest.fixture(params=["gemma3", "gemma4", "mistral3", "llama4", "qwen3_5", "llava"])
def whole(request, tmp_path):
    """A model of text and images, and its folder."""
    model = image_model(request.param)
    model.save_pretrained(tmp_path / "whole")
    return model, str(tmp_path / "whole")


@torch.no_grad()
def test_the_text_part_computes_what_the_whole_model_computes(whole, tmp_path):
    model, folder = whole
    text = build_language_model(LanguageModelConfig(name=folder), VOCABULARY).eval()
    assert type(text).__name__.endswith("ForCausalLM")
    assert not any("vision" in name or "visual" in name for name, _ in text.named_parameters())
    assert torch.equal(text(TOKENS).logits, model(TOKENS).logits)
    for parameter in text.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    save_language_model(text, tmp_path / "model")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(again) is type(text)
    assert not any(info.values()), info
    assert not any(name.startswith(("language_model", "model.language_model")) for name in load_file(tmp_path / "model/model.safetensors"))
    assert torch.equal(again.eval()(TOKENS).logits, text(TOKENS).logits)


@torch.no_grad()
def test_an_adapter_of_the_text_part_fits_the_whole_model(whole, tmp_path):
    """PEFT loads the exported folder on the base as transformers builds it, and so do we, twice."""
    _, folder = whole
    model = build_language_model(LanguageModelConfig(name=folder, lora=LoRA(r=2)), VOCABULARY).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    expected = model(TOKENS).logits
    for name in ("first", "second"):
        save_language_model(model, tmp_path / name)
        kind = AutoModelForImageTextToText if model.get_base_model().__dict__.get("text_prefix") else AutoModelForCausalLM
        loaded = PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / name).eval()
        assert not any("lora" in key and ("vision" in key or "visual" in key) for key, _ in loaded.named_parameters())
        assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
        model = build_language_model(LanguageModelConfig(name=folder, adapter=str(tmp_path / name)), VOCABULARY).eval()
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("kind", ["mamba", "mpt", "gpt_neo", "bloom", "gemma2", "gpt_oss", "llama"])
def test_architectures_without_sdpa_run_with_eager_attention(kind, tmp_path, caplog):
    saved = tiny_model(kind)
    saved.save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="malleable.lightning_modules.language.loading"):
        model = build_language_model(LanguageModelConfig(name=str(tmp_path)), Vocabulary(64, 2, 0)).eval()
    expected = "sdpa" if type(saved)._supports_sdpa else "eager"
    assert model.config._attn_implementation == expected
    line = f"{tmp_path} ({type(saved).__name__}) has no SDPA attention in transformers and runs with attention: eager"
    said = [record.message for record in caplog.records if record.name.startswith("malleable")]
    assert said == ([] if expected == "sdpa" else [line])
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, saved(TOKENS).logits)


def test_eager_attention_is_taken_as_configured(tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="malleable.lightning_modules.language.loading"):
        model = build_language_model(LanguageModelConfig(name=str(tmp_path), attention="eager"), Vocabulary(64, 2, 0))
    assert model.config._attn_implementation == "eager"
    assert not caplog.messages


def test_a_text_part_without_a_causal_model_is_an_error(tmp_path):
    image_model("qwen3_vl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no causal language model for the text part of .* \(Qwen3VLTextConfig\)"):
        load_pretrained(LanguageModelConfig(name=str(tmp_path)))


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of LlamaForCausalLM are missing .*, such as 'model.layers.0.mlp.up_proj.weight'"):
        load_pretrained(LanguageModelConfig(name=base))


def test_an_adapter_folder_as_model_is_an_error(tmp_path):
    base = save_base(tmp_path / "base")
    save_language_model(build_language_model(lora(base), VOCABULARY_16), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter; give its base model as language_model.name and the folder as language_model.adapter"):
        load_pretrained(LanguageModelConfig(name=str(tmp_path / "adapter")))


def test_the_hub_is_used_unless_local_files_only(monkeypatch):
    """A model downloads by its name, never runs code of its repository, and says what to do where it cannot."""
    seen = []

    def from_pretrained(name, **options):
        seen.append((name, options["local_files_only"], options["trust_remote_code"]))
        raise OSError("offline")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    for local in (False, True):
        with pytest.raises(OSError, match=r"cannot load the model 'org/name': .*HF_HUB_OFFLINE is set.*`hf download org/name`"):
            load_pretrained(LanguageModelConfig(name="org/name", local_files_only=local))
    assert seen == [("org/name", False, False), ("org/name", True, False)]


def test_code_of_a_repository_is_not_run(tmp_path):
    base = save_base(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    strange = config | {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "base/config.json").write_text(json.dumps(strange))
    (tmp_path / "base/code.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(OSError, match=r"needs code from its repository, which is not run"):
        load_pretrained(LanguageModelConfig(name=base))


def test_a_name_in_the_local_hub_cache_loads_offline(tmp_path, monkeypatch):
    base = tmp_path / "hub/models--org--name/snapshots/0123456789012345678901234567890123456789"
    save_base(base)
    (tmp_path / "hub/models--org--name/refs").mkdir()
    (tmp_path / "hub/models--org--name/refs/main").write_text(base.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_pretrained(LanguageModelConfig(name="org/name")).config.vocab_size == 16


def test_four_bit_weights_are_stored_for_sharding_and_recomputed_without_reentrance(tmp_path, monkeypatch):
    seen = {}

    def from_pretrained(name, **options):
        seen["quantization"] = options.pop("quantization_config")
        return load(name, **options)

    def prepare(model, **options):
        seen["prepare"] = options
        return model

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **options: SimpleNamespace(**options))
    monkeypatch.setattr("peft.prepare_model_for_kbit_training", prepare)
    config = lora(save_base(tmp_path / "base"), quantization="4bit", dtype="bfloat16", gradient_checkpointing=True)
    build_language_model(config, VOCABULARY_16)
    assert seen["quantization"].bnb_4bit_quant_storage == seen["quantization"].bnb_4bit_compute_dtype == torch.bfloat16
    assert seen["prepare"] == {"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
