"""No pass computes another function than plain passes of one sequence at a time, on models whose attention and state differ."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from architectures import pass_errors, plain_logps, stepwise_logps, tiny_model
from launch import HELPERS, launch

from malleable.lightning_modules.functional.language import pass_check, pass_forms
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.logps import answer_token_logps
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search

TOLERANCE = 1e-4
# The form of an answer's prompt, and of the tree of beams.
MODELS = {
    "llama": "exact",
    "mistral": "windowed",
    "gemma2": "windowed",
    "gemma3_text": "windowed",
    "gpt_oss": "windowed",
    "llama4_text": "windowed",
    "gpt_neo": "separate",
    "gpt_neo wide": "exact up to 24 tokens, separate",
    "mpt": "separate",
    "bloom": "separate",
    "falcon alibi": "separate",
    "opt": "exact",
    "lfm2": "separate",
    "qwen3_5_text": "separate",
    "mamba": "separate",
    "llama dynamic": "exact up to 15 tokens, separate up to 15 tokens, unpadded",
}


# Each of them repeats a mechanism of another one.
REPEATED = ("gpt_neo", "gemma2", "gemma3_text", "gpt_oss", "bloom", "falcon alibi", "opt", "qwen3_5_text")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in REPEATED else kind for kind in MODELS])
def test_every_pass_equals_plain_passes(kind):
    model = tiny_model(kind)
    forms = pass_forms.pass_forms(model).describe()
    # Where logits depend on the length of the whole row, a token is decoded by a pass over what stands before it.
    errors = pass_errors(model, stepwise_logps if kind == "llama dynamic" else plain_logps)
    wrong = {name: error for name, error in errors.items() if isinstance(error, str) or error > TOLERANCE}
    assert not wrong, forms
    assert (forms["shared"], forms["tree"]) == (MODELS[kind], "separate" if kind == "gpt_neo wide" else MODELS[kind])


def test_many_beams_of_a_window_counted_in_columns():
    """All sequences are shorter than the window, but together the beams have more columns."""
    model = tiny_model("gpt_neo wide")
    titles = [[3 + first, 3 + second, 9, 2] for first in range(5) for second in range(5)]
    prompt = torch.arange(10, 20)[None]
    found = beam_search(model, Trie.build(titles), prompt, prompt > 0, num_beams=len(titles), k=len(titles))
    with torch.no_grad():
        expected = torch.stack([plain_logps(model, prompt[0].tolist(), title).sum() for title in titles])
    torch.testing.assert_close(found.scores[0], expected[found.item_ids[0]], atol=1e-3, rtol=0)


def test_the_measurement_does_not_change_model_or_environment():
    model = tiny_model("mistral").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pass_check.check_passes(model)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_itself_is_measured_if_no_copy_can_be_built(monkeypatch):
    def refuse(*_):
        raise TypeError

    monkeypatch.setattr(pass_check, "build_twin", refuse)
    forms = pass_check.check_passes(tiny_model("mistral"))
    assert forms.describe()["shared"] == "windowed up to 8 tokens, separate up to 8 tokens, unpadded"
    assert pass_check.check_passes(tiny_model("llama")).describe()["tree"] == "exact"


def test_large_models_are_measured_by_narrow_twins():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert pass_check.check_passes(model).summary() == ""


def test_a_model_that_attends_to_later_tokens_is_an_error():
    with pytest.raises(ValueError, match="BertLMHeadModel attends to later tokens and cannot be trained or decoded"):
        pass_forms.pass_forms(tiny_model("bert"))
    assert pass_forms.pass_forms(tiny_model("bert", is_decoder=True)).describe()["embedding"] == "separate"


def test_a_model_that_returns_several_streams_cannot_embed():
    model = tiny_model("gemma3n_text")
    assert pass_forms.pass_forms(model).describe()["shared"] == "windowed"
    with pytest.raises(
        ValueError, match=r"Gemma3nForCausalLM does not compute embeddings of texts exactly .*does not return one hidden state for each token"
    ):
        embed_texts(model, [[5, 6]])


def test_forms_are_measured_once_for_a_configuration(monkeypatch):
    pass_forms.pass_forms(tiny_model("llama"))
    monkeypatch.setattr(pass_check, "check_passes", lambda _: pytest.fail("measured again"))
    pass_forms.pass_forms(tiny_model("llama"))


def test_a_prompt_that_cannot_be_shared_is_refused_by_name():
    model = tiny_model("lfm2")
    prompt, answer = torch.tensor([[5, 6]]), torch.tensor([[[7, 8]]])
    parts = (prompt, prompt > 0, answer, answer > 0)
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM does not compute a prompt shared by its answers exactly .*; shared_prompt=None or False"):
        answer_token_logps(model, *parts, shared_prompt=True)
    with torch.no_grad():
        expected = plain_logps(model, [5, 6], [7, 8])
        torch.testing.assert_close(answer_token_logps(model, *parts)[0, 0], expected, atol=1e-4, rtol=0)


# Measured on one core, forward and backward: time of separate rows in relation to shared ones.
MEASURED = [
    ("narrow", 160, 12, 1.80),
    ("narrow", 16, 256, 0.79),
    ("narrow", 64, 64, 1.18),
    ("narrow", 512, 512, 0.83),
    ("narrow", 512, 128, 1.34),
    ("wide", 160, 12, 1.79),
    ("wide", 16, 64, 1.11),
    ("wide", 16, 256, 0.93),
    ("wide", 512, 512, 1.07),
    ("wide", 128, 512, 0.93),
    ("wide", 16, 1024, 0.68),
]
SIZES = {
    "narrow": {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 384},
    "wide": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536},
}


@pytest.mark.parametrize(("sizes", "prompt", "answer", "ratio"), MEASURED)
def test_a_prompt_is_shared_if_that_was_faster(sizes, prompt, answer, ratio):
    from transformers import LlamaConfig

    model = SimpleNamespace(config=LlamaConfig(**SIZES[sizes]))
    assert pass_forms.sharing_pays(model, prompt, 2, answer, 2 * (answer - 1)) == (ratio > 1)


@pytest.mark.parametrize(("shared_prompt", "rows"), [(None, 4), (True, 2), (False, 4)])
def test_long_answers_to_a_short_prompt_get_rows_of_their_own(shared_prompt, rows):
    model, seen = tiny_model("llama", max_position_embeddings=2048), []
    pass_forms.pass_forms(model)
    model.model.register_forward_pre_hook(lambda _, args, options: seen.append(len(options["input_ids"])), with_kwargs=True)
    prompt, answers = torch.full((2, 4), 5), torch.full((2, 2, 200), 6)
    with torch.no_grad():
        answer_token_logps(model, prompt, prompt > 0, answers, answers > 0, shared_prompt=shared_prompt)
    assert seen == [rows]


def test_fallbacks_have_gradients():
    """Shared rows and fallbacks give one gradient."""
    grads = []
    for limit in (float("inf"), 0):
        model = tiny_model("llama")
        forms = pass_forms.pass_forms(model)
        held = {name: pass_forms.Capability(limit) for name in ("shared", "padded", "causal")}
        pass_forms._BY_MODEL[model] = model.config._attn_implementation, dataclasses.replace(forms, **held)
        prompt, answers = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[[7, 8], [9, 0]], [[4, 5], [6, 7]]])
        answer_token_logps(model, prompt, prompt > 0, answers, answers > 0).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral", "gpt_neo"])
def test_forms_are_the_same_with_sharded_weights(kind, tmp_path):
    """Models are built under ``zero.Init``, where a twin's weights would be sharded, too."""
    tiny_model(kind).save_pretrained(tmp_path / "model")
    launch([HELPERS / "pass_forms_run.py", tmp_path / "model", tmp_path])
    expected = {"forms": pass_forms.pass_forms(tiny_model(kind)).describe(), "before": 1, "after": 0}
    assert [json.loads((tmp_path / f"forms-{rank}.json").read_text()) for rank in range(2)] == [expected, expected]
