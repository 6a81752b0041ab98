import pytest
import torch
from small_lm import prompts, real, small_lm
from torch import nn

from malleable.lightning_modules.functional.language.attention import mask_plans
from malleable.lightning_modules.functional.language.tree_attention import TreeDecoder, evaluating

# four tokens after the prompt: 5 and 6, then 7 below 6 and 8 below 5, then 9 below 8
STEPS = ([[5, 6]], [[0, 0]]), ([[7, 8]], [[1, 0]]), ([[9]], [[1]])
PATHS = {0: [[5], [6]], 1: [[6, 7], [5, 8]], 2: [[5, 8, 9]]}


def feed(decoder, rows):
    for depth, (tokens, parent) in enumerate(STEPS):
        yield decoder.extend(torch.tensor(tokens).expand(rows, -1), torch.tensor(parent).expand(rows, -1), depth)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral"])
def test_each_token_equals_its_own_sequence(kind, attention):
    model = small_lm(kind, attention)
    ids, mask = prompts()
    with torch.no_grad():
        decoder = TreeDecoder(model, ids, mask)
        for depth, logits in enumerate(feed(decoder, len(ids))):
            for row, prompt in enumerate(real(ids, mask)):
                for slot, path in enumerate(PATHS[depth]):
                    expected = model(torch.tensor([prompt + path])).logits[0, -1]
                    torch.testing.assert_close(logits[row, slot], expected, atol=1e-4, rtol=1e-4)


def test_rows_can_be_removed():
    model = small_lm()
    ids, mask = prompts()
    with torch.no_grad():
        whole = list(feed(TreeDecoder(model, ids, mask), len(ids)))
        decoder = TreeDecoder(model, ids, mask)
        steps = [(torch.tensor(tokens), torch.tensor(parent)) for tokens, parent in STEPS]
        decoder.extend(*(part.expand(4, -1) for part in steps[0]), 0)
        decoder.select(torch.tensor([3, 1]))
        logits = decoder.extend(*(part.expand(2, -1) for part in steps[1]), 1)
    torch.testing.assert_close(logits, whole[1][[3, 1]], atol=1e-5, rtol=1e-5)


def test_several_tokens_of_a_path_at_once():
    model = small_lm()
    ids, mask = prompts((4, 2))
    with torch.no_grad():
        decoder = TreeDecoder(model, ids, mask)
        within = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, -1, -1)
        logits = decoder.extend(torch.tensor([[5, 8, 9]]).expand(2, -1), torch.zeros(2, 3, dtype=torch.long), torch.arange(3).expand(2, -1), within)
        expected = model(torch.tensor([real(ids, mask)[1] + [5, 8, 9]])).logits[0, -3:]
    torch.testing.assert_close(logits[1], expected, atol=1e-4, rtol=1e-4)


def test_keys_outside_a_window_are_masked():
    ids, mask = prompts((6, 2))
    model = small_lm("mistral", sliding_window=3)
    (plan, *_) = mask_plans(model.config)
    with torch.no_grad():
        decoder = TreeDecoder(model, ids, mask, plan)
        for depth, logits in enumerate(feed(decoder, 2)):
            expected = model(torch.tensor([real(ids, mask)[0] + PATHS[depth][0]])).logits[0, -1]
            torch.testing.assert_close(logits[0, 0], expected, atol=1e-4, rtol=1e-4)
    assert decoder.cache.get_seq_length() == 6 + 2 + 2 + 1


def test_the_cache_returns_its_length():
    ids, mask = prompts((6, 2))
    with torch.no_grad():
        decoder = TreeDecoder(small_lm(), ids, mask)
        next(feed(decoder, 2))
    assert decoder.cache.get_seq_length() == 8
    assert decoder.cache.get_mask_sizes(3) == (11, 0)


def test_evaluating_restores_each_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]
