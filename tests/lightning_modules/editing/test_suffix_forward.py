"""Passes over the ends of rows with cached keys and values equal full forward passes."""

import pytest
import torch
from small_editing import decoder

from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.prompts import RowBatch
from malleable.lightning_modules.editing.suffix_forward import FullForward, SuffixForward, choose_forward

LAYER = 1
POSITIONS = {"apart": (0, 3, 9, 5), "first": (0, 0, 0, 0), "one row": (4,)}
LENGTHS = (7, 4, 12, 6)


def rows_of(positions):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 400, (len(positions), max(LENGTHS[: len(positions)])), generator=generator)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS[: len(positions)])[:, None]).long()
    return RowBatch(ids, mask, torch.tensor(positions))


def full_logits(model, layout, rows, change):
    """Logits of every row by itself, the change added behind the block."""

    def add(position, own):
        def hook(_, __, output):
            states = output[0] if isinstance(output, tuple) else output
            changed = states.clone()
            changed[0, position] += own
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    logits = []
    for ids, mask, position, own in zip(rows.input_ids, rows.attention_mask, rows.position, change, strict=True):
        handle = layout.block_of(model, LAYER).register_forward_hook(add(position, own))
        logits.append(model(ids[None, : mask.sum()], use_cache=False).logits[0])
        handle.remove()
    return logits


# Attention within a window shorter than the rows, and recurrent layers.
NEEDS_FULL_FORWARD = ["mistral_window", "qwen3_5", "lfm2"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gpt_neox", "gpt2", "gptj", *NEEDS_FULL_FORWARD])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_logits_and_gradients_equal_full_passes(family, positions):
    model = decoder(family).double()
    layout, rows = find_layout(model), rows_of(positions)
    change = torch.randn(len(positions), 32, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = full_logits(model, layout, rows, change)
    forward = choose_forward(model, layout, LAYER, rows)
    if family not in NEEDS_FULL_FORWARD or positions == POSITIONS["apart"]:
        assert isinstance(forward, FullForward if family in NEEDS_FULL_FORWARD else SuffixForward)
    requested = [(row, token) for row, (position, one) in enumerate(zip(positions, expected, strict=True)) for token in range(len(one) - position)]
    number, token = torch.tensor(requested).T
    found = forward.logits(change, number, token)
    behind = torch.cat([one[position:] for position, one in zip(positions, expected, strict=True)])
    torch.testing.assert_close(found, behind, rtol=1e-5, atol=1e-5)  # norms of some families compute in single precision
    ours, theirs = (torch.autograd.grad(logits.square().mean(), change)[0] for logits in (found, behind))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("forward_class", [SuffixForward, FullForward])
def test_selected_rows_give_the_same_logits(forward_class):
    model = decoder().double()
    layout, rows = find_layout(model), rows_of(POSITIONS["apart"])
    change = torch.randn(4, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    forward, chosen = forward_class(model, layout, LAYER, rows), torch.tensor([1, 3])
    before = forward.logits(change, chosen, torch.zeros(2, dtype=torch.long))
    part = forward.select(chosen)
    assert forward_class is FullForward or part.prefix_cache[0][0].shape[2] == 5
    after = part.logits(change[chosen], torch.arange(2), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("forward_class", [choose_forward, FullForward])
def test_model_is_restored(forward_class):
    model = decoder()
    forward = forward_class(model, find_layout(model), LAYER, rows_of((2, 3)))
    forward.logits(torch.zeros(2, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert all("forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
