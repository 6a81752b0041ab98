import pytest
import torch
from peft import get_peft_model_state_dict
from tiny_patch import gpt2, llama, with_lora

from malleable.lightning_modules.patches.names import canonical_name, canonical_names, canonical_tensors, untied


@pytest.mark.parametrize(("build", "target"), [(llama, "q_proj"), (gpt2, "c_attn")])
def test_a_wrapped_model_has_the_names_of_the_bare_one_and_those_of_its_adapter(build, target):
    bare, wrapped = build(), with_lora(build(), target)
    names = canonical_names(wrapped.state_dict())
    own = {name for name in names if ".lora_" in name}
    assert set(names) - own == set(bare.state_dict())
    assert own == {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(wrapped)}
    assert sorted(names.values()) == sorted(wrapped.state_dict())  # every key has its name, and back


@pytest.mark.parametrize(("build", "target"), [(llama, "q_proj"), (gpt2, "c_attn")])
def test_the_module_that_holds_the_model_adds_a_prefix_only(build, target):
    for model in (build(), with_lora(build(), target)):
        state = model.state_dict()
        held = canonical_names([*(f"model.{key}" for key in state), "head.weight"], "model.")
        assert held == {name: f"model.{key}" for name, key in canonical_names(state).items()}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["plain", "dora", "modules_to_save"])
def test_memory_and_file_of_an_adapter_agree(settings):
    wrapped = with_lora(llama(), **settings)
    live, filed = canonical_names(wrapped.state_dict()), canonical_names(get_peft_model_state_dict(wrapped))
    assert set(filed) <= set(live)
    state, file = wrapped.state_dict(), get_peft_model_state_dict(wrapped)
    assert all(torch.equal(state[live[name]], file[key]) for name, key in filed.items())


def test_names_outside_an_adapter_are_left_alone():
    assert canonical_name("encoder.default.base_layer.weight") == "encoder.default.base_layer.weight"


def test_two_keys_for_one_name_are_refused():
    with pytest.raises(
        ValueError, match=r"'base_model\.model\.a\.weight' and 'base_model\.model\.a\.base_layer\.weight' would both be named 'a\.weight'"
    ):
        canonical_names(["base_model.model.a.weight", "base_model.model.a.base_layer.weight"])


def test_tied_tensors_are_there_once():
    model = gpt2()
    tensors = canonical_tensors(model)
    assert "lm_head.weight" not in tensors
    assert tensors["transformer.wte.weight"] is model.lm_head.weight
    assert untied(model.state_dict())["transformer.wte.weight"] == ["transformer.wte.weight", "lm_head.weight"]


def test_views_and_empty_tensors_are_not_taken_for_tied():
    values = torch.randn(4, 4)
    tensors = {"a": values, "b": values[:2], "c": values.T, "d": torch.empty(0), "e": torch.empty(0)}
    assert untied(tensors) == {name: [name] for name in tensors}
