"""Building, adapting, recognising and saving language models."""

from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftModel
from shared import shared_data
from tiny import tiny_catalog, tiny_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.language.tokenizer import load_tokenizer, train_tokenizer
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, Scratch, build_language_model, dropout_off, fingerprint
from malleable.lightning_modules.language.export import gathered_state, save_language_model
from malleable.lightning_modules.serialization import from_plain, to_plain

TOKENS = torch.tensor([[2, 4, 5, 1]])


@pytest.fixture
def base(tmp_path):
    """A base model on disk, as a local folder."""
    torch.manual_seed(0)
    save_language_model(build_language_model(tiny_config(), tiny_catalog().vocabulary), tmp_path / "base")
    return str(tmp_path / "base")


def lora(base: str, **changes) -> LanguageModelConfig:
    return LanguageModelConfig(name=base, lora=LoRA(r=2, alpha=4, dropout=0.5), **changes)


def test_from_scratch_takes_the_catalogues_vocabulary():
    model = build_language_model(tiny_config(), tiny_catalog().vocabulary)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.vocab_size == 16
    assert model.config.eos_token_id == 1
    assert model.training, "training mode, dropout included, also after from_pretrained"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_is_the_configurations_not_the_checkpoints(base, tmp_path):
    """transformers 5 would load bf16 weights as bf16."""
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = build_language_model(LanguageModelConfig(name=str(tmp_path / "half")), tiny_catalog().vocabulary)
    assert model.dtype == torch.float32
    assert model.training
    assert build_language_model(LanguageModelConfig(name=base, dtype="bfloat16"), tiny_catalog().vocabulary).dtype == torch.bfloat16


def test_lora_trains_adapters_only(base):
    model = build_language_model(lora(base), tiny_catalog().vocabulary)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    # Seven linear maps of one block, two matrices each; the head gets none.
    assert len(trained) == 14


def test_saved_adapter_loads_in_peft(base, tmp_path):
    model = build_language_model(lora(base), tiny_catalog().vocabulary)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_language_model(model, tmp_path / "adapter")
    assert not list(tmp_path.glob("*.partial"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
        again = build_language_model(LanguageModelConfig(name=base, adapter=str(tmp_path / "adapter")), tiny_catalog().vocabulary).eval()
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
        assert any(parameter.requires_grad for parameter in again.parameters())
        with model.disable_adapter():
            assert not torch.allclose(model(TOKENS).logits, loaded(TOKENS).logits), "adapters off is another model"


def test_saved_model_loads_in_transformers(tmp_path):
    model = build_language_model(tiny_config(), tiny_catalog().vocabulary).eval()
    save_language_model(model, tmp_path / "model")
    save_language_model(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_adapter_of_another_base_is_refused(base, tmp_path):
    save_language_model(build_language_model(lora(base), tiny_catalog().vocabulary), tmp_path / "adapter")
    wider = LanguageModelConfig(scratch=Scratch(hidden_size=32, num_layers=1, num_heads=2), adapter=str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"was made for another base model than 'None': .*size mismatch"):
        build_language_model(wider, tiny_catalog().vocabulary)
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        build_language_model(LanguageModelConfig(name=base, adapter=str(tmp_path)), tiny_catalog().vocabulary)


def test_fingerprint_depends_on_the_base_only(base):
    torch.manual_seed(1)
    first = build_language_model(lora(base), tiny_catalog().vocabulary)
    torch.manual_seed(2)
    second = build_language_model(lora(base), tiny_catalog().vocabulary)
    assert fingerprint(first) == fingerprint(second)
    # A small edit of one matrix, which leaves its first values as they are.
    down = dict(second.named_parameters())["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"]
    with torch.no_grad():
        down[1:] *= 1.001
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(build_language_model(lora(base, dtype="bfloat16"), tiny_catalog().vocabulary)) == fingerprint(first)


def test_gathered_state_is_a_copy(base):
    model = build_language_model(lora(base), tiny_catalog().vocabulary)
    state = gathered_state(model, trainable_only=True)
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    next(iter(state.values())).fill_(7)
    assert not any((p == 7).all() for p in model.parameters())


def test_dropout_off_keeps_recomputing_blocks_in_training_mode(base):
    model = build_language_model(lora(base, gradient_checkpointing=True), tiny_catalog().vocabulary)
    with dropout_off(model):
        modes = {type(module).__name__: module.training for module in model.modules()}
        assert modes["Dropout"] is False
        assert modes["LlamaDecoderLayer"] is True, "or the block would keep its activations"
    assert all(module.training for module in model.modules())


def test_gradient_checkpointing_keeps_gradients(base):
    """Without re-entrance and with input gradients, or adapters below a frozen embedding get none."""
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_language_model(replace(lora(base), gradient_checkpointing=checkpointing), tiny_catalog().vocabulary)
        with dropout_off(model):
            model(TOKENS, use_cache=False).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads[1].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_plain_round_trip(base):
    config = lora(base, adapter=None)
    assert to_plain(config) == asdict(config)
    assert from_plain(LanguageModelConfig, to_plain(config)) == config
    assert from_plain(LanguageModelConfig, config) is config
    assert from_plain(LanguageModelConfig, None) is None


def test_quantization_needs_adapters():
    with pytest.raises(ValueError, match="quantization needs adapters"):
        build_language_model(LanguageModelConfig(quantization="4bit"), tiny_catalog().vocabulary)


def test_tokenizer_larger_than_the_model(base):
    with pytest.raises(ValueError, match=r"the tokenizer has 99 tokens, but the model .* embeds 16"):
        build_language_model(LanguageModelConfig(name=base), replace(tiny_catalog().vocabulary, vocab_size=99))
    with pytest.raises(ValueError, match="needs the vocabulary of a tokenizer"):
        build_language_model(LanguageModelConfig(), replace(tiny_catalog().vocabulary, vocab_size=0))


def test_tokens_that_no_text_has_need_no_embedding(base, tmp_path):
    """Gemma 3 1B has 262,145 tokens and 262,144 rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(["Heat"], 300))
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = LanguageModelConfig(name=base)
    unused = replace(tiny_catalog().vocabulary, vocab_size=99, tokenizer=str(tmp_path / "tokenizer"), largest_token_id=15)
    assert build_language_model(config, unused).config.vocab_size == 16
    used = replace(unused, largest_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    with pytest.raises(ValueError, match=r"the texts of the data contain the token '<image>' \(\d+\), but the model .* embeds only 16 tokens"):
        build_language_model(config, used)


def test_added_tokens_need_no_embedding_where_the_texts_are_unknown(tmp_path, caplog):
    """A vocabulary made by hand says nothing of texts."""
    tokenizer = load_tokenizer(str(train_tokenizer(["Heat"], 300)))
    rows = len(tokenizer)
    save_language_model(build_language_model(tiny_config(), replace(tiny_catalog().vocabulary, vocab_size=rows)), tmp_path / "base")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = LanguageModelConfig(name=str(tmp_path / "base"))
    by_hand = Vocabulary(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, str(tmp_path / "tokenizer"))
    build_language_model(config, by_hand)
    assert f"embeds {rows} tokens, but the tokenizer has {rows + 1}: texts must not contain the added tokens <image>" in caplog.text
    for wrong in (replace(by_hand, pad_token_id=rows), replace(by_hand, tokenizer=None), replace(by_hand, vocab_size=rows + 2)):
        with pytest.raises(ValueError, match="use the tokenizer of the model"):
            build_language_model(config, wrong)


def test_four_bits_without_the_library(base, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        build_language_model(replace(lora(base), quantization="4bit"), tiny_catalog().vocabulary)


def test_a_real_checkpoint():
    """stories260k, 260,032 weights: 0.71 nats a token on a short story, against ln 512 = 6.24 untrained."""
    from transformers import AutoTokenizer

    folder = shared_data("models/stories260k")
    model = build_language_model(LanguageModelConfig(name=str(folder)), replace(tiny_catalog().vocabulary, vocab_size=512)).eval()
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() < 1.2


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_without_custom_masks_is_an_error(attention):
    with pytest.raises(ValueError, match=f"one of sdpa, eager, got '{attention}'; use sdpa"):
        LanguageModelConfig(attention=attention)
