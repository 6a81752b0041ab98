"""Adapters that PEFT has saved: all of its forms, another base model's, and their number format."""

import json
from copy import deepcopy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_catalog
from tiny_module import lora, save_base
from transformers import AutoModelForCausalLM

from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, build_language_model
from malleable.lightning_modules.language.export import save_language_model

TOKENS = torch.tensor([[2, 4, 5, 1]])
FORMS = {
    "head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "embedding_lora": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "head_lora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "trainable_tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5]}),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True),
    "rslora": LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "patterns": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 7}),
    "bias": LoraConfig(r=2, target_modules=["q_proj"], bias="none", lora_bias=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def untied(folder):
    """A base model on disk whose head is not tied to its embeddings, as adapters of either need it."""
    model = AutoModelForCausalLM.from_pretrained(save_base(folder))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return str(folder)


def moved(model):
    """Give every trainable weight a value of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def build(base, adapter, **changes):
    return build_language_model(LanguageModelConfig(name=base, adapter=str(adapter), **changes), tiny_catalog().vocabulary)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_peft_saves_loads_and_continues(tmp_path, form):
    base = untied(tmp_path / "base")
    settings = deepcopy(FORMS[form])
    settings.task_type = "CAUSAL_LM"
    theirs = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build(base, tmp_path / "theirs")
    names = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in ours.named_parameters() if parameter.requires_grad} == names
    torch.testing.assert_close(ours.eval()(TOKENS).logits, theirs(TOKENS).logits)
    moved(ours)
    save_language_model(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS).logits, ours(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], None])
def test_an_adapter_with_more_embedding_rows_than_the_base(tmp_path, modules):
    """Rows for added tokens, or padded to a multiple: the base grows as it did where the adapter was made."""
    base = untied(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(pad_to_multiple_of=24)
    theirs = moved(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=modules)))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = build(base, tmp_path / "theirs", gradient_checkpointing=True).eval()
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits)
    save_language_model(ours, tmp_path / "ours")
    torch.testing.assert_close(build(base, tmp_path / "ours").eval()(TOKENS).logits, theirs(TOKENS).logits)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    save_language_model(build_language_model(lora(base), tiny_catalog().vocabulary), tmp_path / "adapter")
    file, settings = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
    tensors, stored = load_file(file), json.loads(settings.read_text())
    first = sorted(tensors)[0]
    broken = {
        "missing": {key: value for key, value in tensors.items() if key != first},
        r"unexpected \['base": tensors | {first.replace("layers.0", "layers.7"): tensors[first].clone()},
        "size mismatch": tensors | {first: torch.zeros(2, 99)},
    }
    for message, changed in broken.items():
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"was made for another base model than '.*base'.*{message}"):
            build(base, tmp_path / "adapter")
    save_file(tensors, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(stored | {"target_modules": ["c_attn"]}))
    with pytest.raises(ValueError, match=r"was made for another base model than .*Target modules"):
        build(base, tmp_path / "adapter")


def test_an_adapter_of_prompt_tokens_is_refused(tmp_path):
    base = save_base(tmp_path / "base")
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match=r"adds tokens to each prompt \(PREFIX_TUNING\)"):
        build(base, tmp_path / "prefix")


@pytest.mark.parametrize("form", [None, "head", "embeddings", "trainable_tokens", "dora"])
def test_trained_weights_are_float32_on_a_half_precision_base(tmp_path, form):
    base = untied(tmp_path / "base")
    if form is None:
        config = LanguageModelConfig(name=base, lora=LoRA(r=2), dtype="bfloat16")
    else:
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), deepcopy(FORMS[form])).save_pretrained(tmp_path / "adapter")
        config = LanguageModelConfig(name=base, adapter=str(tmp_path / "adapter"), dtype="bfloat16")
    model = build_language_model(config, tiny_catalog().vocabulary)
    formats = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        formats[parameter.requires_grad].add(parameter.dtype)
    assert formats == {True: {torch.float32}, False: {torch.bfloat16}}
    model(TOKENS).logits.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_adapters_are_created_and_loaded_without_warnings(tmp_path, recwarn):
    base = save_base(tmp_path / "base")
    save_language_model(build_language_model(lora(base), tiny_catalog().vocabulary), tmp_path / "adapter")
    assert build(base, tmp_path / "adapter").peft_config["default"].base_model_name_or_path == base
    assert [str(warning.message) for warning in recwarn if "base_model_name_or_path" in str(warning.message)] == []
