"""Whole sequences run without an attention mask, by causal kernels, and compute what masked rows do."""

from unittest import mock

import pytest
import torch
from architectures import tiny_model
from tiny import batch_of
from torch.nn.functional import scaled_dot_product_attention

from malleable import SFT, CausalLM
from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.logps import answer_token_logps, packed_token_logps, separate_logps, shared_logps
from malleable.lightning_modules.functional.language.pass_forms import pass_forms
from malleable.lightning_modules.functional.language.whole_rows import separate_answers
from malleable.lightning_modules.language.config import LanguageModelConfig, Scratch

ROWS = [{"sample_id": n, "prompt": [5, 6, 7][: n + 1] * 3, "answers": [[8, 9, 10, 2][3 - n :]]} for n in range(3)]
DOCUMENTS = [{"sample_id": n, "input_ids": [5, 6, 7, 8, 9, 10][: 4 + n], "document_ids": [1] * (4 + n)} for n in range(3)]


class Kernels:
    """Records how SDPA is called."""

    def __init__(self):
        self.calls = []

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        self.calls.append((attn_mask is None, is_causal))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)

    @property
    def causal(self):
        return bool(self.calls) and all(call == (True, True) for call in self.calls)


@pytest.fixture
def kernels():
    found = Kernels()
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", found):
        yield found


def parts(batch):
    return batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask


PASSES = {
    "one answer": lambda model: answer_token_logps(model, *parts(batch_of(ROWS))),
    "separate answers": lambda model: answer_token_logps(
        model, *parts(batch_of([{**row, "answers": [*row["answers"], [9, 2]]} for row in ROWS])), shared_prompt=False
    ),
    "packed rows of one document": lambda model: packed_token_logps(model, **documents(), one_document=True)[0],
    "embedding": lambda model: embed_texts(model, [row["prompt"] for row in ROWS]),
}


def documents():
    batch = batch_of(DOCUMENTS)
    return {name: getattr(batch, name) for name in ("input_ids", "document_ids", "position_ids")}


@pytest.mark.parametrize("name", PASSES)
def test_whole_sequences_use_causal_kernels(name, kernels):
    model = tiny_model("llama")
    pass_forms(model)
    kernels.calls.clear()
    PASSES[name](model)
    assert kernels.causal, kernels.calls


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda c: SFT(c, Catalog(("A",), ((5, 2),), vocabulary=Vocabulary(40, 2))), ROWS),
        (lambda c: CausalLM(c, Vocabulary(40, 2)), DOCUMENTS),
    ],
    ids=["SFT", "CausalLM"],
)
def test_modules_train_with_causal_kernels(make, rows, kernels):
    module = make(LanguageModelConfig(scratch=Scratch(hidden_size=16, num_layers=2, num_heads=2)))
    module.configure_model()
    kernels.calls.clear()
    module.train().compute_loss(batch_of(rows)).loss.backward()
    assert kernels.causal, kernels.calls


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_answers_and_gradients_equal_those_under_masks(kind):
    batch, found = batch_of(ROWS), []
    for masked in (True, False):
        model = tiny_model(kind)
        logps = shared_logps(model, *parts(batch), plan=pass_forms(model).shared.plan) if masked else answer_token_logps(model, *parts(batch))
        (logps.square().sum() / 100).backward()
        found.append([logps.detach(), *(parameter.grad for parameter in model.parameters())])
    for masked, plain in zip(*found, strict=True):
        torch.testing.assert_close(plain, masked, atol=1e-5, rtol=1e-5)


def test_packed_rows_of_one_document_equal_those_under_masks():
    found = []
    for one_document in (True, False):
        model = tiny_model("llama")
        logps, _ = packed_token_logps(model, **documents(), one_document=one_document)
        (logps.square().sum() / 100).backward()
        found.append([logps.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, masked in zip(*found, strict=True):
        torch.testing.assert_close(plain, masked, atol=1e-5, rtol=1e-5)


def test_batches_have_the_flag_one_document():
    row = {"sample_id": 0, "input_ids": [5, 6, 7, 8]}
    assert batch_of(DOCUMENTS).one_document
    assert not batch_of([*DOCUMENTS, {**row, "document_ids": [1, 1, 2, 2]}]).one_document
    assert not batch_of([{**row, "document_ids": [1, 1, 1, 0]}]).one_document


def test_the_last_token_of_an_answer_is_not_an_input():
    batch = batch_of(ROWS, pad_to_multiple_of=1)
    tokens, lengths, starts = separate_answers(*parts(batch))
    assert [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)] == [row["prompt"] + row["answers"][0][:-1] for row in ROWS]
    assert tokens.shape[1] == batch.prompt_ids.shape[1] + batch.answer_ids.shape[2] - 1
    assert starts.tolist() == [3, 6, 9]


def test_rows_without_answers():
    batch = batch_of([{"sample_id": n, "prompt": [5] * (n + 1), "answers": [[]]} for n in range(2)])
    assert separate_logps(tiny_model("llama"), *parts(batch)).shape == (2, 1, 0)
