"""Runs of a part of a decoder: what they see, where they stop, which decoders they refuse."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_editing import decoder

from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.passes import check_additive, read_block, stopping

TEXT = torch.arange(1, 9)[None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gpt_neox", "gpt2", "gptj"])
def test_what_a_projection_gives_is_what_its_block_adds(family):
    model = decoder(family)
    check_additive(model, find_layout(model), 1, TEXT)


def test_behind_an_adapter_too():
    wrapped = get_peft_model(decoder(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)).eval()
    check_additive(wrapped, find_layout(wrapped), 1, TEXT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_square_matrices_keep_their_orientation(family):
    model = decoder(family, width=32, inner=32)
    layout = find_layout(model)
    found = layout.projection_of(model, 1)
    update = torch.randn(32, 32)
    with stopping(model, layout, 1, [1]) as seen:
        seen.run(input_ids=TEXT)
    key, before = seen.keys[1], seen.output
    with torch.no_grad():
        found.weight.add_(found.oriented(update))
    torch.testing.assert_close(read_block(model, layout, 1, TEXT), before + key @ update.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite"])
def test_a_norm_or_factor_behind_the_projection_is_refused(family):
    model = decoder(family)
    with pytest.raises(ValueError, match="a norm or a factor lies between"):
        check_additive(model, find_layout(model), 1, TEXT)


def test_a_pass_stops_where_it_has_seen_enough_and_leaves_no_hooks():
    model = decoder()
    layout = find_layout(model)
    ran = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    assert read_block(model, layout, 1, TEXT).shape == (1, 8, 32)
    handle.remove()
    assert not ran
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
