"""A shared row equals separate rows, and the head runs only where answers are predicted."""

import random

import pytest
import torch
from tiny import batch_of
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from malleable.lightning_modules.functional.language.logps import answer_logps, answer_token_logps, packed_token_logps, shared_row

EXAMPLES = [
    {"sample_id": 0, "prompt": [5, 6, 7, 8, 9], "answers": [[10, 11, 1], [12, 1], [13, 14, 15, 1]]},
    {"sample_id": 1, "prompt": [20], "answers": [[21, 1], [22, 23, 24, 25, 1], [1]]},
]


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=attention)).eval()


def gpt2(attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=64, attn_implementation=attention)).eval()


def one_by_one(model, example) -> list[float]:
    """Each answer behind its prompt alone: no padding, no mask, no shared anything."""
    sums = []
    for answer in example["answers"]:
        tokens = torch.tensor([list(example["prompt"]) + list(answer)])
        logps = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        sums.append(logps[len(example["prompt"]) - 1 :].sum().item())
    return sums


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_equals_one_row_per_answer(make, attention, shared_prompt):
    model = make(attention)
    with torch.no_grad():
        found = answer_logps(model, batch_of(EXAMPLES), shared_prompt=shared_prompt)
        expected = torch.tensor([one_by_one(model, example) for example in EXAMPLES])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_gradients_equal_separate_rows():
    batch, grads = batch_of(EXAMPLES), []
    for shared in (True, False):
        model = llama()
        answer_logps(model, batch, shared_prompt=shared).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_row_layout_by_hand():
    """Prompt of 5, answers of 3, 2 and 4 tokens: the last token of each is not fed, so the row has 5 + 2 + 1 + 3 columns."""
    batch = batch_of(EXAMPLES[:1], pad_to_multiple_of=1)
    row = shared_row(batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask, batch.answer_columns)
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 5, 6, 7]]
    assert row.num_kept == 7
    # Kept column 0 is the prompt's last token, which predicts every answer's first.
    assert row.predictors.tolist() == [[[0, 1, 2, 0], [0, 3, 0, 0], [0, 4, 5, 6]]]
    assert row.allowed[0, 8].tolist() == [True] * 5 + [False] * 3 + [True] + [False] * 2


def test_padding_to_a_longer_row_does_not_change_results():
    model = llama()
    with torch.no_grad():
        together = answer_logps(model, batch_of(EXAMPLES))[1]
        alone = answer_logps(model, batch_of(EXAMPLES[1:]))[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_packed_documents_are_independent():
    model = llama()
    documents = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    row = {"sample_id": 0, "input_ids": [t for d in documents for t in d], "document_ids": [1] * 4 + [2] * 2 + [3] * 3}
    short = {"sample_id": 1, "input_ids": [3, 4], "document_ids": [1, 1]}
    batch = batch_of([row, short])
    with torch.no_grad():
        logps, targets = packed_token_logps(model, batch.input_ids, batch.document_ids, batch.position_ids)
        expected = sum(model(torch.tensor([d])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(d)[1:, None]).sum() for d in documents)
    assert targets.sum(1).tolist() == [3 + 1 + 2, 1]
    torch.testing.assert_close(logps[0].sum(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("multiple", [1, 8, 32])
@pytest.mark.parametrize("by_hand", [False, True])
def test_padding_does_not_change_results(multiple, by_hand):
    """Also in a batch made by hand, which does not say how many columns its answers need."""
    model, batch = llama(), batch_of(EXAMPLES, pad_to_multiple_of=multiple)
    if by_hand:
        batch = batch.replace(answer_columns=None)
    with torch.no_grad():
        expected = torch.tensor([one_by_one(model, example) for example in EXAMPLES])
        torch.testing.assert_close(answer_logps(model, batch), expected, atol=2e-5, rtol=0)


def test_the_width_of_rows_does_not_depend_on_answers():
    """So that kernels are not planned again for each shape: the widths of 20 random batches are multiples of 8, and few."""
    rng = random.Random(0)
    widths = set()
    for _ in range(20):
        answers = [[[3] * rng.randint(1, 12) for _ in range(3)] for _ in range(4)]
        batch = batch_of([{"sample_id": 0, "prompt": [2] * rng.randint(20, 30), "answers": row} for row in answers])
        row = shared_row(batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask, batch.answer_columns)
        widths.add(row.input_ids.shape[1])
    assert all(width % 8 == 0 for width in widths)
    assert len(widths) <= 4


def test_empty_prompt_is_refused():
    batch = batch_of([EXAMPLES[0], EXAMPLES[1]])
    mask = batch.prompt_mask & (batch.sample_id == 0)[:, None]
    with pytest.raises(ValueError, match="every row needs at least one prompt token"):
        answer_token_logps(llama(), batch.prompt_ids, mask, batch.answer_ids, batch.answer_mask)


def test_answers_longer_than_num_columns_are_an_error():
    batch, longer = batch_of([EXAMPLES[0]], pad_to_multiple_of=1), batch_of([EXAMPLES[1]], pad_to_multiple_of=1)
    batch = batch.replace(answer_ids=longer.answer_ids.repeat(1, 3, 1), answer_mask=longer.answer_mask.repeat(1, 3, 1))
    with pytest.raises(ValueError, match="create the batch with `collate`"):
        answer_logps(llama(), batch)


def test_unknown_attention_is_refused():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not compute a prompt shared by its answers exactly .* not accept a custom mask"):
        answer_logps(model, batch_of(EXAMPLES), shared_prompt=True)


def test_low_precision_is_summed_in_float32():
    model = llama().bfloat16()
    with torch.no_grad():
        assert answer_logps(model, batch_of(EXAMPLES)).dtype == torch.float32
