"""Blocks and projections of decoder families; models that cannot be edited raise."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_editing import decoder

from malleable.lightning_modules.editing.layout import Layout, find_layout

EDITABLE = {
    "llama": ("model.layers.{}", "mlp.down_proj"),
    "qwen2": ("model.layers.{}", "mlp.down_proj"),
    "qwen3": ("model.layers.{}", "mlp.down_proj"),
    "mistral": ("model.layers.{}", "mlp.down_proj"),
    "phi": ("model.layers.{}", "mlp.fc2"),
    "phi3": ("model.layers.{}", "mlp.down_proj"),
    "gemma": ("model.layers.{}", "mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers.{}", "mlp.dense_4h_to_h"),
    "gpt2": ("transformer.h.{}", "mlp.c_proj"),
    "gptj": ("transformer.h.{}", "mlp.fc_out"),
    "qwen3_5": ("model.layers.{}", "mlp.down_proj"),
    "lfm2": ("model.layers.{}", "feed_forward.w2"),
}


@pytest.mark.parametrize("family", EDITABLE)
def test_blocks_and_projections_are_found(family):
    model = decoder(family)
    layout = find_layout(model)
    block, projection = EDITABLE[family]
    assert layout == Layout(block, f"{block}.{projection}")
    assert layout.num_layers(model) == 4
    found = layout.projection_of(model, 2)
    assert found.transposed == (family == "gpt2")
    assert found.width == 48
    assert found.oriented(torch.zeros(32, 48)).shape == found.weight.shape


def test_mixture_of_experts_raises():
    with pytest.raises(ValueError, match="mixtures of experts"):
        find_layout(decoder("mixtral"))


def test_layers_with_experts_raise_and_name_editable_layers():
    model = decoder("deepseek_v3")
    layout = find_layout(model)
    assert layout.editable_layers(model) == [0]
    assert layout.projection_of(model, 0).width == 48
    with pytest.raises(ValueError, match=r"layer 1 of DeepseekV3ForCausalLM has no .*mixture of experts.*can be edited: \[0\]"):
        layout.projection_of(model, 1)


def test_image_encoders_are_ignored():
    model = decoder()
    model.model.vision_tower = torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 4) for _ in range(9))
    assert find_layout(model).block == "model.layers.{}"
    model.model.vision_tower = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 4)
    assert find_layout(model).block == "model.layers.{}"


def test_unknown_names_raise_and_list_modules():
    with pytest.raises(ValueError, match="names no module"):
        find_layout(decoder(), block="model.blocks.{}")
    model = decoder()
    for layer in model.model.layers:
        layer.mlp.out = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(ValueError, match=r"it has .*mlp\.out"):
        find_layout(model)
    assert find_layout(model, projection="model.layers.{}.mlp.out").projection == "model.layers.{}.mlp.out"


def test_quantised_matrix_raises():
    model = decoder()
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="without quantization"):
        find_layout(model).projection_of(model, 1)


def test_frozen_matrix_of_an_adapter():
    model = decoder()
    plain = model.model.layers[1].mlp.down_proj.weight
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    layout = find_layout(wrapped)
    found = layout.projection_of(wrapped, 1)
    assert found.weight is plain
    assert found.name.endswith("layers.1.mlp.down_proj")
