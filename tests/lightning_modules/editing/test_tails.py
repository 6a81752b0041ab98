"""What follows a change at one token, by keys and values of what lies before, equals the whole model's pass."""

import pytest
import torch
from small_editing import decoder

from malleable.lightning_modules.editing.layout import find_layout
from malleable.lightning_modules.editing.prompts import Rows
from malleable.lightning_modules.editing.tails import Tails, WholeRows, follow

LAYER = 1
POSITIONS = {"apart": (0, 3, 9, 5), "first": (0, 0, 0, 0), "one row": (4,)}
LENGTHS = (7, 4, 12, 6)


def rows_of(positions):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 400, (len(positions), max(LENGTHS[: len(positions)])), generator=generator)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS[: len(positions)])[:, None]).long()
    return Rows(ids, mask, torch.tensor(positions))


def whole(model, layout, rows, change):
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
WHOLE = ["mistral_window", "qwen3_5", "lfm2"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "gemma", "gpt_neox", "gpt2", "gptj", *WHOLE])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_tails_equal_whole_passes(family, positions):
    model = decoder(family).double()
    layout, rows = find_layout(model), rows_of(positions)
    change = torch.randn(len(positions), 32, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = whole(model, layout, rows, change)
    tails = follow(model, layout, LAYER, rows)
    if family not in WHOLE or positions == POSITIONS["apart"]:
        assert isinstance(tails, WholeRows if family in WHOLE else Tails)
    wanted = [(row, token) for row, (position, one) in enumerate(zip(positions, expected, strict=True)) for token in range(len(one) - position)]
    number, token = torch.tensor(wanted).T
    found = tails.logits(change, number, token)
    behind = torch.cat([one[position:] for position, one in zip(positions, expected, strict=True)])
    torch.testing.assert_close(found, behind, rtol=1e-5, atol=1e-5)  # norms of some families compute in single precision
    ours, theirs = (torch.autograd.grad(logits.square().mean(), change)[0] for logits in (found, behind))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", [Tails, WholeRows])
def test_some_of_the_rows_are_as_they_were_among_all(way):
    model = decoder().double()
    layout, rows = find_layout(model), rows_of(POSITIONS["apart"])
    change = torch.randn(4, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    tails, chosen = way(model, layout, LAYER, rows), torch.tensor([1, 3])
    before = tails.logits(change, chosen, torch.zeros(2, dtype=torch.long))
    part = tails.take(chosen)
    assert way is WholeRows or part.memory[0][0].shape[2] == 5
    after = part.logits(change[chosen], torch.arange(2), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("way", [follow, WholeRows])
def test_the_model_is_left_as_it_was(way):
    model = decoder()
    tails = way(model, find_layout(model), LAYER, rows_of((2, 3)))
    tails.logits(torch.zeros(2, 32), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert all("forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
