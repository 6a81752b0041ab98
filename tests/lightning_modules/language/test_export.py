"""Exported folders: complete, their own, whole after a crash, and of the form that other loaders require."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_catalog, tiny_config
from tiny_module import lora, save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from malleable.datamodules.files import atomic as files
from malleable.datamodules.language.tokenizer import train_tokenizer
from malleable.lightning_modules.language.config import LanguageModelConfig, build_language_model
from malleable.lightning_modules.language.export import gathered_state, save_language_model
from malleable.lightning_modules.patches.storage import open_container

TOKENS = torch.tensor([[2, 4, 5, 1]])
TITLES = ["Alien", "Heat", "Dune"]


@pytest.fixture
def published(tmp_path):
    """A base model as the hub has it: several files, bfloat16, its tokenizer of many files beside it, and files that are not the export's."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(save_base(base), dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], pad_token_id=0)
    model.save_pretrained(base, max_shard_size="1KB")
    AutoTokenizer.from_pretrained(train_tokenizer(TITLES, 300)).save_pretrained(base)
    for name in ("tokenizer.model", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    for name in ("preprocessor_config.json", "README.md", "training_args.json", "original.pth"):
        (base / name).write_text("{}")
    assert (base / "model.safetensors.index.json").is_file()
    return str(base)


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "additional_chat_templates"}


@torch.no_grad()
def test_a_tuned_model_is_exported_independently_of_the_format_of_its_base(published, tmp_path):
    model = build_language_model(LanguageModelConfig(name=published), tiny_catalog().vocabulary).eval()
    for parameter in model.parameters():
        parameter.add_(1e-3 * torch.randn_like(parameter))
    save_language_model(model, tmp_path / "model", tokenizer=published)
    assert {path.name for path in (tmp_path / "model").iterdir()} == TOKENIZER | {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "float32"
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"] == [1, 7]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.float32
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template["default"] == "chat_template.jinja"
    assert len(open_container(tmp_path / "model").tensors) == len(list(model.parameters()))


def test_an_adapter_folder_contains_no_weights_of_the_base(published, tmp_path):
    model = build_language_model(lora(published), tiny_catalog().vocabulary).eval()
    save_language_model(model, tmp_path / "adapter", tokenizer=published)
    expected = TOKENIZER | {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == expected
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)(TOKENS).logits, model(TOKENS).logits)


def test_the_tokenizer_of_a_hub_id(tmp_path, monkeypatch):
    model = build_language_model(tiny_config(), tiny_catalog().vocabulary)
    snapshot = tmp_path / "hub/models--org--name/snapshots/0123456789012345678901234567890123456789"
    AutoTokenizer.from_pretrained(train_tokenizer(TITLES, 300)).save_pretrained(snapshot)
    (snapshot / "tokenizer.model").symlink_to(snapshot / "tokenizer.json")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_language_model(model, tmp_path / "model", tokenizer="org/name")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert not (tmp_path / "model" / name).is_symlink()
        assert (tmp_path / "model" / name).read_bytes() == (snapshot / name).read_bytes()


def test_the_tokenizer_of_a_gguf_file(tmp_path, monkeypatch):
    original = AutoTokenizer.from_pretrained(train_tokenizer(TITLES, 300))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **options: original if options["gguf_file"] else None)
    save_language_model(build_language_model(tiny_config(), tiny_catalog().vocabulary), tmp_path / "model", tokenizer=str(tmp_path / "model.gguf"))
    monkeypatch.undo()
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("Heat") == original("Heat")


def test_weights_without_a_tokenizer_are_saved_with_a_warning(tmp_path, caplog):
    save_language_model(build_language_model(tiny_config(), tiny_catalog().vocabulary), tmp_path / "model", tokenizer=str(tmp_path / "gone"))
    assert (tmp_path / "model/model.safetensors").is_file()
    assert "model is saved without a tokenizer" in caplog.text


def test_stored_buffers_are_saved(tmp_path):
    """DeepSeek keeps a correction of its router in a buffer; what is no parameter is part of the model, too."""
    settings = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_attention_heads": 2}
    settings |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1}
    settings |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 16, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **settings, pad_token_id=0)).eval()
    stored = set(dict(model.named_buffers())) & set(model.state_dict())
    assert stored
    with torch.no_grad():
        for name in stored:
            model.get_buffer(name).add_(torch.randn(4))
        save_language_model(model, tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)


def test_a_generation_configuration_that_contradicts_itself(tmp_path):
    """Llama 2 was published with a temperature beside do_sample=False; transformers refuses to save that."""
    model = build_language_model(tiny_config(), tiny_catalog().vocabulary)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    save_language_model(model, tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").temperature == 0.6


def test_given_weights_replace_those_in_memory(tmp_path):
    model = build_language_model(tiny_config(), tiny_catalog().vocabulary)
    name, parameter = next(iter(model.named_parameters()))
    save_language_model(model, tmp_path / "model", weights={name: torch.full(parameter.shape, 7.0, dtype=torch.float64)})
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
    assert (again[name] == 7).all()
    assert again[name].dtype == torch.float32
    assert not (parameter == 7).any()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_after_a_kill_the_old_or_the_new_folder_is_complete(tmp_path, moment):
    """The process ends right before or after the new folder takes the old one's place."""
    model = build_language_model(tiny_config(), tiny_catalog().vocabulary)
    save_language_model(model, tmp_path / "model")
    old = (tmp_path / "model/model.safetensors").read_bytes()
    child = os.fork()
    if not child:
        replace = files._replace
        files._replace = lambda *paths: (replace(*paths) if moment == "after" else None, os._exit(9))
        with torch.no_grad():
            next(model.parameters()).add_(1)
        save_language_model(model, tmp_path / "model")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert ((tmp_path / "model/model.safetensors").read_bytes() == old) == (moment == "before")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 16


def test_weights_sharded_by_fsdp_are_saved_completely(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = build_language_model(tiny_config(), tiny_catalog().vocabulary)
        expected = {name: value.clone() for name, value in model.named_parameters()}
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        state = gathered_state(model)
    finally:
        destroy_process_group()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


# --- vLLM: what its loaders check before they load, restated, since it needs a GPU to be installed ---

_LORA_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_(A|B|embedding_A|embedding_B)(\.weight)?$")


def vllm_refuses_model(folder: Path) -> list[str]:
    """What vLLM's registry and weight loader would refuse in the folder of a model."""
    config = json.loads((folder / "config.json").read_text())
    problems = [] if len(config.get("architectures") or []) == 1 else ["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if config["architectures"] != [type(model).__name__]:
        problems.append("another class")
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    keys = {key for file in files for key in safe_open(folder / file, "pt").keys()}  # noqa: SIM118
    problems += [f"unknown {key}" for key in keys - set(model.state_dict())]
    return problems + [name for name in ("generation_config.json", "tokenizer_config.json") if not (folder / name).is_file()]


def vllm_refuses_adapter(folder: Path, max_rank: int = 16) -> list[str]:
    """What vLLM's PEFT helper and adapter loader would refuse in the folder of an adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    problems = [name for name in ("modules_to_save", "use_dora", "trainable_token_indices") if config.get(name)]
    problems += ["bias"] if config.get("bias", "none") != "none" else []
    problems += ["r"] if not 0 < config["r"] <= max_rank else []
    problems += ["lora_alpha"] if "lora_alpha" not in config else []
    problems += ["target_modules"] if not isinstance(config["target_modules"], (str, list)) else []
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        problems += [key for key in tensors.keys() if not _LORA_KEY.match(key)]  # noqa: SIM118
    return problems


def test_vllm_accepts_what_we_export(published, tmp_path):
    save_language_model(build_language_model(LanguageModelConfig(name=published), tiny_catalog().vocabulary), tmp_path / "model", tokenizer=published)
    assert vllm_refuses_model(tmp_path / "model") == []
    for name, layers in (("default", None), ("head", ["q_proj", "lm_head"]), ("embeddings", ["embed_tokens", "v_proj"])):
        config = lora(published)
        config.lora.target_modules = layers
        save_language_model(build_language_model(config, tiny_catalog().vocabulary), tmp_path / name, tokenizer=published)
        assert vllm_refuses_adapter(tmp_path / name) == [], name


def test_the_restated_checks_refuse_what_vllm_refuses(published, tmp_path):
    """An adapter with a head trained whole: PEFT loads it, vLLM does not."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(published), settings).save_pretrained(tmp_path / "theirs")
    model = build_language_model(LanguageModelConfig(name=published, adapter=str(tmp_path / "theirs")), tiny_catalog().vocabulary)
    save_language_model(model, tmp_path / "adapter")
    assert "modules_to_save" in vllm_refuses_adapter(tmp_path / "adapter")
