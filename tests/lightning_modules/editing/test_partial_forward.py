"""Partial forward passes: captured activations, skipped blocks, models that cannot be edited."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_editing import decoder

from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.partial_forward import block_output, capture_until, check_additive

TEXT = torch.arange(1, 9)[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gpt_neox", "gpt2", "gptj"])
def test_blocks_add_the_output_of_the_projection(family):
    model = decoder(family)
    check_additive(model, find_layout(model), 1, TEXT)


def test_check_additive_with_an_adapter():
    wrapped = get_peft_model(decoder(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)).eval()
    check_additive(wrapped, find_layout(wrapped), 1, TEXT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_orientation_of_square_matrices(family):
    model = decoder(family, width=32, inner=32)
    layout = find_layout(model)
    found = layout.projection_of(model, 1)
    update = torch.randn(32, 32)
    with capture_until(model, layout, 1, [1]) as captured:
        captured.run(input_ids=TEXT)
    key, before = captured.keys[1], captured.output
    with torch.no_grad():
        found.weight.add_(found.oriented(update))
    torch.testing.assert_close(block_output(model, layout, 1, TEXT), before + key @ update.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite"])
def test_norm_or_factor_after_the_projection_raises(family):
    model = decoder(family)
    with pytest.raises(ValueError, match="they contain a norm or a factor after the MLP"):
        check_additive(model, find_layout(model), 1, TEXT)


def test_later_blocks_do_not_run_and_hooks_are_removed():
    model = decoder()
    layout = find_layout(model)
    ran = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    assert block_output(model, layout, 1, TEXT).shape == (1, 8, 32)
    handle.remove()
    assert not ran
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
