"""Masks for rows that hold more than one sequence, written out."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_catalog, tiny_config
from torch import nn

from malleable import SFT
from malleable.lightning_modules.functional.language.attention import document_mask, model_mask

ALLOWED = torch.tensor([[[True, False], [True, True]]])


def decoder(implementation: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Linear(2, 2, dtype=dtype)
    model.config = SimpleNamespace(_attn_implementation=implementation)
    return model


def test_attention_is_causal_within_documents():
    """Two documents and padding; padding sees itself, or its softmax would be over nothing."""
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert document_mask(torch.tensor([[1, 1, 2, 2, 0]])).int().tolist() == [expected]


def test_a_row_of_padding_has_no_empty_row():
    mask = document_mask(torch.tensor([[0, 0, 0]]))
    assert torch.equal(mask[0], torch.eye(3, dtype=torch.bool))


def test_sdpa_uses_the_boolean_mask():
    mask = model_mask(decoder("sdpa"), ALLOWED)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, ALLOWED[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_adds_the_mask(dtype):
    """Zero where a query may look, the smallest finite number of the weights' format where not."""
    mask = model_mask(decoder("eager", dtype), ALLOWED)
    assert mask.dtype == dtype
    assert mask.shape == (1, 1, 2, 2)
    assert mask.tolist() == [[[[0.0, torch.finfo(dtype).min], [0.0, 0.0]]]]


def test_other_implementations_are_refused():
    with pytest.raises(ValueError, match="'flash_attention_2' does not accept a custom mask; load the model with attn_implementation='sdpa'"):
        model_mask(decoder("flash_attention_2"), ALLOWED)


def test_cudnn_kernels_are_disabled_for_a_built_model():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        SFT(tiny_config(), tiny_catalog()).configure_model()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
