import pytest
import torch
from small_lm import EOS, PAD, prompts, real, small_lm

from malleable.lightning_modules.functional.language.free_text import generate_text

PROMPTS, MASK = prompts()
SEEDS = torch.arange(len(PROMPTS)) + 100


def test_greedy_text_equals_generate():
    for kind in ("llama", "gpt2"):
        model = small_lm(kind)
        expected = model.generate(PROMPTS, attention_mask=MASK.long(), do_sample=False, max_new_tokens=12)[:, PROMPTS.shape[1] :]
        text = generate_text(model, PROMPTS, MASK, max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD)
        assert text.tolist() == expected.tolist()


def test_rows_end_at_any_of_the_given_tokens():
    model = small_lm()
    free = generate_text(model, PROMPTS, MASK, max_new_tokens=8, eos_token_id=EOS)
    stops = [int(free[0, 2]), int(free[1, 4])]
    text = generate_text(model, PROMPTS, MASK, max_new_tokens=8, eos_token_id=stops, pad_token_id=PAD)
    for row, whole in zip(text.tolist(), free.tolist(), strict=True):
        length = next((place + 1 for place, token in enumerate(whole) if token in stops), 8)
        assert row == whole[:length] + [PAD] * (text.shape[1] - length)
    default = generate_text(model, PROMPTS[:2], MASK[:2], max_new_tokens=8, eos_token_id=stops)
    assert default.shape[1] <= 5
    assert default[0, -1] in (stops[0], free[0, default.shape[1] - 1])


def test_sampled_tokens_have_the_probabilities_of_the_model():
    model, count = small_lm(), 3000
    ids, mask = PROMPTS[:1].expand(count, -1), MASK[:1].expand(count, -1)
    text = generate_text(model, ids, mask, max_new_tokens=1, eos_token_id=EOS, temperature=2.0, seeds=torch.arange(count))
    expected = count * (model(PROMPTS[:1]).logits[0, -1] / 2).softmax(-1)
    counts = torch.bincount(text[:, 0], minlength=len(expected))
    common = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic < common.sum() + 4 * (2 * common.sum()) ** 0.5


def test_top_p_cuts_the_tail():
    probabilities, order = (small_lm()(PROMPTS[:1]).logits[0, -1] / 2).softmax(-1).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1]
    ids, mask = PROMPTS[:1].expand(200, -1), MASK[:1].expand(200, -1)
    text = generate_text(small_lm(), ids, mask, max_new_tokens=1, eos_token_id=EOS, temperature=2.0, top_p=0.5, seeds=torch.arange(200))
    assert set(text[:, 0].tolist()) == set(nucleus.tolist())


def test_a_row_gives_the_same_text_in_any_batch():
    settings = {"max_new_tokens": 6, "eos_token_id": EOS, "temperature": 1.5, "top_p": 0.9}
    batch = generate_text(small_lm(), PROMPTS, MASK, seeds=SEEDS, **settings)
    for row, prompt in enumerate(real(PROMPTS, MASK)):
        alone = generate_text(
            small_lm(), torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool), seeds=SEEDS[row : row + 1], **settings
        )
        assert batch[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_ranks_that_finish_early_run_equally_many_passes():
    model, forwards, asked = small_lm(), [], []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def another_rank_needs_five_steps(mine):
        asked.append(mine)
        return mine or len(asked) <= 5

    free = generate_text(model, PROMPTS[:1], MASK[:1], max_new_tokens=8, eos_token_id=EOS)
    forwards.clear()
    stop = int(free[0, 1])
    text = generate_text(model, PROMPTS[:1], MASK[:1], max_new_tokens=8, eos_token_id=stop, sync_any=another_rank_needs_five_steps)
    assert text.tolist() == [free[0, : free[0].tolist().index(stop) + 1].tolist()]
    assert len(forwards) == 5
    asked.clear()
    generate_text(model, PROMPTS[:1], MASK[:1], max_new_tokens=3, eos_token_id=stop, sync_any=another_rank_needs_five_steps)
    assert len(forwards) == 5 + 3


def test_settings_out_of_range_are_an_error():
    for setting in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="generation needs temperature >= 0, 0 < top_p <= 1, top_k >= 1 and max_new_tokens >= 1, got"):
            generate_text(small_lm(), PROMPTS, MASK, **{"max_new_tokens": 3, "eos_token_id": EOS, **setting})
    for seeds, shape in ((None, "None"), (SEEDS[:1], r"\(1,\)")):
        with pytest.raises(ValueError, match=f"seeds must contain one number for each of the 4 rows, got shape {shape}"):
            generate_text(small_lm(), PROMPTS, MASK, max_new_tokens=3, eos_token_id=EOS, temperature=1.0, seeds=seeds)
