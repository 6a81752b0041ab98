import weakref
from collections.abc import Mapping

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_patch import gpt2, llama, with_lora

from malleable.lightning_modules.patches import tensors as module
from malleable.lightning_modules.patches.tensors import (
    canonical_name,
    canonical_names,
    canonical_tensors,
    compare,
    fingerprint,
    group_tied,
    hash_tensor,
    write_changed,
)


@pytest.mark.parametrize(("build", "target"), [(llama, "q_proj"), (gpt2, "c_attn")])
def test_canonical_names_of_a_wrapped_model(build, target):
    bare, wrapped = build(), with_lora(build(), target)
    names = canonical_names(wrapped.state_dict())
    own = {name for name in names if ".lora_" in name}
    assert set(names) - own == set(bare.state_dict())
    assert own == {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(wrapped)}
    assert sorted(names.values()) == sorted(wrapped.state_dict())  # every key has its name, and back


@pytest.mark.parametrize(("build", "target"), [(llama, "q_proj"), (gpt2, "c_attn")])
def test_prefix_of_the_module(build, target):
    for model in (build(), with_lora(build(), target)):
        state = model.state_dict()
        held = canonical_names([*(f"model.{key}" for key in state), "head.weight"], "model.")
        assert held == {name: f"model.{key}" for name, key in canonical_names(state).items()}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["plain", "dora", "modules_to_save"])
def test_names_in_memory_equal_names_in_the_file(settings):
    wrapped = with_lora(llama(), **settings)
    live, filed = canonical_names(wrapped.state_dict()), canonical_names(get_peft_model_state_dict(wrapped))
    assert set(filed) <= set(live)
    state, file = wrapped.state_dict(), get_peft_model_state_dict(wrapped)
    assert all(torch.equal(state[live[name]], file[key]) for name, key in filed.items())


def test_names_outside_an_adapter_do_not_change():
    assert canonical_name("encoder.default.base_layer.weight") == "encoder.default.base_layer.weight"


def test_two_keys_with_one_name_raise():
    with pytest.raises(
        ValueError, match=r"'base_model\.model\.a\.weight' and 'base_model\.model\.a\.base_layer\.weight' would both be named 'a\.weight'"
    ):
        canonical_names(["base_model.model.a.weight", "base_model.model.a.base_layer.weight"])


def test_tied_tensors_occur_once():
    model = gpt2()
    tensors = canonical_tensors(model)
    assert "lm_head.weight" not in tensors
    assert tensors["transformer.wte.weight"] is model.lm_head.weight
    assert group_tied(model.state_dict())["transformer.wte.weight"] == ["transformer.wte.weight", "lm_head.weight"]


def test_views_and_empty_tensors_are_not_tied():
    values = torch.randn(4, 4)
    tensors = {"a": values, "b": values[:2], "c": values.T, "d": torch.empty(0), "e": torch.empty(0)}
    assert group_tied(tensors) == {name: [name] for name in tensors}


def test_hash_does_not_depend_on_the_dtype_up_to_float32():
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.randn(4, 3).to(dtype)
        assert hash_tensor(narrow) == hash_tensor(narrow.float())
    assert hash_tensor(torch.randn(4, 3).bfloat16()) != hash_tensor(torch.randn(4, 3))


def test_hash_depends_on_shape_values_and_kind_of_dtype():
    values = torch.arange(6.0)
    hashes = [hash_tensor(tensor) for tensor in (values, values.view(2, 3), values.view(3, 2), values + 1, values.long(), values.double())]
    assert len(set(hashes)) == len(hashes)
    assert all(len(value) == 16 for value in hashes)


def test_hash_does_not_depend_on_the_layout():
    values = torch.randn(3, 4)
    assert hash_tensor(values.T) == hash_tensor(values.T.contiguous())


def test_hash_does_not_depend_on_the_block_size(monkeypatch):
    values = torch.randn(10, 7)
    whole = hash_tensor(values)
    monkeypatch.setattr(module, "_BLOCK", 16)
    assert hash_tensor(values) == whole


def test_one_tensor_is_read_at_a_time():
    class Lazy(Mapping):
        alive = most = 0

        @classmethod
        def freed(cls):
            cls.alive -= 1

        def __getitem__(self, name):
            values = torch.randn(4)
            Lazy.alive += 1
            Lazy.most = max(Lazy.most, Lazy.alive)
            weakref.finalize(values, Lazy.freed)
            return values

        def __iter__(self):
            return iter("abcd")

        def __len__(self):
            return 4

    assert len(fingerprint(Lazy())) == 4
    assert Lazy.most == 1


def test_comparison_lists_all_differences():
    base = {"same": "1", "other": "2", "gone": "3", "tied": "4"}
    found = compare(base, {"same": "1", "other": "9", "new": "5", "copy": "4", "tied": "4"})
    assert found.checked == 3
    assert (found.differing, found.missing, found.unknown, found.copies) == (("other",), ("gone",), ("new",), {"copy": "tied"})


def test_comparison_with_a_copy_in_half_precision():
    half = llama(dtype=torch.bfloat16)
    assert fingerprint(canonical_tensors(half)) == fingerprint(canonical_tensors(half.float()))
    assert fingerprint(canonical_tensors(half)) != fingerprint(canonical_tensors(llama()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_changed_replaces_one_tensor_only(tmp_path, dtype):
    tensors = {name: torch.randn(3, 4).to(dtype) for name in "abc"} | {"scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "old", metadata={"format": "pt", "note": "kept"})
    (tmp_path / "old").chmod(0o444)
    new = torch.randn(4, 3).to(dtype).T
    write_changed(tmp_path / "old", tmp_path / "new", {"b": new, "scalar": torch.tensor(2.0)})
    read = load_file(tmp_path / "new")
    assert all(torch.equal(read[name], tensors[name]) for name in "ac")
    assert torch.equal(read["b"], new)
    assert read["scalar"] == 2
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o444
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    write_changed(tmp_path / "new", tmp_path / "back", tensors)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "old").read_bytes()
