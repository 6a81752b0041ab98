"""Likelihood of given answers, generated answers and texts, perplexity, and the metrics of edit requests.

Shapes: N answers, B rows, P tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.partial_forward import logits_at
from malleable.lightning_modules.editing.prompts import PromptEncoder, Row
from malleable.lightning_modules.functional.editing.answer_match import contains_answer
from malleable.lightning_modules.functional.editing.word_statistics import Tfidf
from malleable.lightning_modules.functional.language.free_text import generate_text
from malleable.lightning_modules.functional.ranks import merge_over_ranks, shard, sum_over_ranks
from malleable.lightning_modules.metrics.editing import Consistency, Fluency, RequestFigures


class AnswerScores(NamedTuple):
    """Scores of given answers under teacher forcing.

    Attributes:
        nll: ``(N,)`` mean negative log-likelihood of the answer's tokens, in nats.
        accuracy: ``(N,)`` share of the answer's tokens that have the highest probability, given the tokens before.
    """

    nll: Tensor
    accuracy: Tensor

    @property
    def exact(self) -> Tensor:
        """``(N,)`` whether every token of the answer has the highest probability."""
        return self.accuracy == 1


@torch.no_grad()
def evaluate_answers(model: Any, encoder: PromptEncoder, questions: Sequence[tuple[str, str]], max_rows: int = 64) -> AnswerScores:
    """Score answers under teacher forcing.

    In a distributed run every rank must call this function: each scores a shard of the questions, and all return all scores.

    Args:
        model: Model in evaluation mode.
        encoder: Encodes prompts.
        questions: Pairs of prompt and answer; a space is inserted between them.
        max_rows: Rows of a forward pass.
    """
    answers = [encoder.encode_answer(answer) for _, answer in questions]
    rows = [encoder.encode_text(text, answer[:-1]) for (text, _), answer in zip(questions, answers, strict=True)]
    # Rows of similar length share a forward pass, which saves padding.
    order = shard(sorted(range(len(rows)), key=lambda number: len(rows[number].ids)))
    scores = torch.zeros(2, len(rows))
    for start in range(0, len(order), max_rows):
        chosen = order[start : start + max_rows]
        part = score_answers(model, encoder, [rows[number] for number in chosen], [answers[number] for number in chosen])
        scores[:, chosen] = torch.stack(part).cpu()
    return AnswerScores(*sum_over_ranks(scores, next(model.parameters()).device))


def score_answers(model: Any, encoder: PromptEncoder, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> AnswerScores:
    """Score answers in one forward pass, with gradients.

    Args:
        model: Model in evaluation mode.
        encoder: Pads rows to a batch.
        rows: Prompts, each followed by its answer without the last token.
        answers: Token ids of the answers.
    """
    device = next(model.parameters()).device
    batch = encoder.collate(rows, device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    row = torch.arange(len(rows), device=device).repeat_interleave(lengths)
    first = torch.tensor([len(one.ids) - len(answer) for one, answer in zip(rows, answers, strict=True)], device=device)
    within = torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[row]
    token = torch.tensor([token for answer in answers for token in answer], device=device)
    with logits_at(model, row, first[row] + within):
        logps = model(**batch.inputs(), use_cache=False).logits[0].float().log_softmax(-1)
    own = logps[torch.arange(len(token), device=device), token]
    correct = (logps.detach().argmax(-1) == token).float()
    return AnswerScores(*(values.new_zeros(len(rows)).index_add(0, row, values) / lengths for values in (-own, correct)))


MAX_LOGITS = 1 << 26
"""Maximum number of logits of a forward pass for perplexity: 256 MiB in float32."""


def evaluate_requests(model: Any, encoder: PromptEncoder, requests: Sequence[EditRequest], max_rows: int = 64) -> list[RequestFigures]:
    """Compute efficacy, generalization and specificity of each request under teacher forcing.

    Args:
        model: Model in evaluation mode.
        encoder: Encodes prompts.
        requests: Edit requests, with or without paraphrases and neighbours.
        max_rows: Rows of a forward pass.

    Source:
        Meng et al. (2022), Locating and Editing Factual Associations in GPT, arXiv:2202.05262, section 3.3 (CounterFact); the exact shares as in
        its authors' code.
        Differs: without an old answer, efficacy and generalization equal ``efficacy_exact`` and ``generalization_exact``.
    """
    questions: list[tuple[str, str]] = []
    for request in requests:
        texts = [request.prompt.replace(PLACEHOLDER, request.subject), *request.paraphrases]
        questions += [(text, request.target) for text in texts]
        questions += [(text, request.true) for text in texts if request.true is not None]
        questions += [(probe.prompt, probe.answer) for probe in request.neighbors]
        questions += [(probe.prompt, request.target) for probe in request.neighbors]
    answers = evaluate_answers(model, encoder, questions, max_rows)
    figures, start = [], 0
    for request in requests:
        num_prompts, num_neighbors = 1 + len(request.paraphrases), len(request.neighbors)
        sizes = [num_prompts, num_prompts if request.true is not None else 0, num_neighbors, num_neighbors]
        columns = (answers.nll, answers.exact.float(), answers.accuracy)
        nll, exact, accuracy = (torch.split(values[start : start + sum(sizes)], sizes) for values in columns)
        better = (nll[1] > nll[0]).float() if request.true is not None else exact[0]
        # A neighbour whose answer equals the new target does not count for specificity.
        other_answer = torch.tensor([probe.answer.strip() != request.target.strip() for probe in request.neighbors], dtype=torch.bool)
        kept = (nll[2] < nll[3]).float()[other_answer]
        shares = [better[:1], better[1:], kept]
        shares += [part for share in (exact, accuracy) for part in (share[0][:1], share[0][1:], share[2])]
        figures.append(RequestFigures(*(float(share.mean()) for share in shares)))
        start += sum(sizes)
    return figures


def perplexity(model: Any, encoder: PromptEncoder, texts: Sequence[str], max_length: int = 512, max_logits: int = MAX_LOGITS) -> float:
    """Compute the perplexity over all tokens of texts.

    Texts of similar length share a forward pass, padded on the right. In a distributed run every rank must call this function: each processes a
    shard of the texts.

    Args:
        model: Model in evaluation mode.
        encoder: Pads rows to a batch.
        texts: Texts.
        max_length: Maximum length of a text in tokens; the rest is truncated.
        max_logits: Maximum number of logits of a forward pass, which bounds memory.

    Raises:
        ValueError: If no text has two tokens.
    """
    encoded = [list(ids[:max_length]) for ids in encoder.tokenizer(list(texts))["input_ids"]]
    order = sorted((number for number, ids in enumerate(encoded) if len(ids) > 1), key=lambda number: len(encoded[number]))
    if not order:
        raise ValueError(f"perplexity needs a text of at least two tokens, got {len(encoded)} shorter texts; give longer texts")
    # One sum for each text, so that the total does not depend on the number of ranks.
    sums = torch.zeros(len(encoded), dtype=torch.double)
    size = max(1, max_logits // model.get_output_embeddings().weight.shape[0])
    for chosen in _split_into_passes(shard(order), [len(ids) for ids in encoded], size):
        rows = [Row(encoded[number][:-1], 0) for number in chosen]
        answers = [encoded[number][1:] for number in chosen]
        with torch.no_grad():
            mean = score_answers(model, encoder, rows, answers).nll.double().cpu()
        sums[chosen] = mean * torch.tensor([len(answer) for answer in answers], dtype=torch.double)
    total = sum_over_ranks(sums, next(model.parameters()).device).sum()
    return math.exp(float(total) / sum(len(encoded[number]) - 1 for number in order))


def _split_into_passes(order: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split rows, sorted by length, into forward passes of at most ``size`` tokens with padding, or one row."""
    part: list[int] = []
    for number in order:
        if part and (len(part) + 1) * lengths[number] > size:
            yield part
            part = []
        part.append(number)
    if part:
        yield part


def generate_texts(
    model: Any, tokenizer: Any, prompts: Sequence[str], length: int = 100, top_k: int = 5, seed: int = 0, max_rows: int = 32
) -> list[str]:
    """Continue prompts with top-k sampling.

    In a distributed run every rank must call this function: each generates a shard of the texts, and all return all texts.

    Args:
        model: Model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Prompts.
        length: Length of a text in tokens, with the prompt.
        top_k: Number of most probable tokens to sample from.
        seed: Seed of the sampling; a text depends on its prompt, the seed and its position in the list only.
        max_rows: Rows of a forward pass.

    Returns:
        The prompts with their continuations.
    """
    encoder = PromptEncoder(tokenizer)
    end = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    texts: dict[int, str] = {}
    own = shard(range(len(prompts)))
    for start in range(0, len(own), max_rows):
        places = own[start : start + max_rows]
        encoded = [encoder.encode_text(prompts[place]).ids for place in places]
        ids, mask = _left_padded(encoded, encoder.pad_token_id, model)
        written = generate_text(
            model,
            ids,
            mask,
            max_new_tokens=max(1, length - min(len(row) for row in encoded)),
            eos_token_id=end,
            pad_token_id=encoder.pad_token_id,
            temperature=1.0,
            top_k=top_k,
            seeds=torch.tensor(places, device=ids.device) + (seed << 32),
        )
        for place, row, new in zip(places, encoded, written.tolist(), strict=True):
            texts[place] = prompts[place] + tokenizer.decode(new[: max(1, length - len(row))], skip_special_tokens=True)
    return merge_over_ranks(texts)


def _left_padded(rows: Sequence[Sequence[int]], pad: int, model: Any) -> tuple[Tensor, Tensor]:
    """Return token ids ``(B, P)`` and their mask, on the device of the model."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    device = next(model.parameters()).device
    return ids.to(device), mask.to(device)


def evaluate_generated_texts(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], length: int = 100, seed: int = 0, max_rows: int = 32
) -> dict[str, float]:
    """Compute fluency and consistency of texts generated after ``generation_prompts``; empty if the requests have none.

    Args:
        model: Model in evaluation mode.
        tokenizer: Its tokenizer.
        requests: Edit requests, with ``references`` for consistency.
        length: Length of a text in tokens.
        seed: Seed of the sampling.
        max_rows: Rows of a forward pass.

    Source:
        Meng et al. (2022), arXiv:2202.05262, section 3.3.
        Differs: the TF-IDF weights come from the references of these requests, not from all of CounterFact.
    """
    owners = [(number, prompt) for number, request in enumerate(requests) for prompt in request.generation_prompts]
    if not owners:
        return {}
    texts = generate_texts(model, tokenizer, [prompt for _, prompt in owners], length, seed=seed, max_rows=max_rows)
    # Every rank has all texts. The states are on the CPU, and NCCL cannot synchronise CPU tensors.
    fluency = Fluency(sync_on_compute=False)
    fluency.update(texts)
    figures = fluency.compute()
    with_references = [number for number, request in enumerate(requests) if request.generation_prompts and request.references]
    if with_references:
        tfidf = Tfidf(dict.fromkeys(text for number in with_references for text in requests[number].references))
        consistency = Consistency(tfidf, sync_on_compute=False)
        for number in with_references:
            generated = [text for (owner, _), text in zip(owners, texts, strict=True) if owner == number]
            consistency.update(generated, requests[number].references)
        figures |= consistency.compute()
    return {name: float(value) for name, value in figures.items()}


def generate_answers(
    model: Any, encoder: PromptEncoder, prompts: Sequence[str], lengths: Sequence[int], max_rows: int = 64, stops: Sequence[int] = (-1,)
) -> list[str]:
    """Generate answers with greedy decoding.

    In a distributed run every rank must call this function: each generates a shard of the answers, and all return all answers.

    Args:
        model: Model in evaluation mode.
        encoder: Encodes prompts.
        prompts: Prompts.
        lengths: Maximum number of new tokens for each prompt.
        max_rows: Rows of a forward pass.
        stops: Token ids that end an answer. Default: none.
    """
    texts: dict[int, str] = {}
    own = shard(range(len(prompts)))
    for start in range(0, len(own), max_rows):
        places = own[start : start + max_rows]
        ids, mask = _left_padded([encoder.encode_text(prompts[place]).ids for place in places], encoder.pad_token_id, model)
        longest = max(lengths[place] for place in places)
        written = generate_text(model, ids, mask, max_new_tokens=longest, eos_token_id=stops, pad_token_id=encoder.pad_token_id).tolist()
        for place, row in zip(places, written, strict=True):
            end = next((number for number, token in enumerate(row) if token in stops), len(row))
            texts[place] = encoder.tokenizer.decode(row[: min(end, lengths[place])]).strip()
    return merge_over_ranks(texts)


def stop_tokens(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that end a generated answer: end of sequence and every token with a line break; ``[-1]`` if there is none."""
    breaks = ("\n", "Ċ", "<0x0A>")  # plain, in byte-level BPE, and as a byte token
    stops = [number for token, number in tokenizer.get_vocab().items() if any(part in token for part in breaks)]
    end = tokenizer.eos_token_id
    return sorted({*stops, *([] if end is None else [end])}) or [-1]


def evaluate_generated_answers(
    model: Any, encoder: PromptEncoder, requests: Sequence[EditRequest], tokens: int = 20, all_prompts: bool = False, max_rows: int = 64
) -> tuple[list[tuple[float, float, float]], list[str]]:
    """Compare generated answers with the expected ones. Generation does not depend on the tokens or the length of the expected answer.

    Args:
        model: Model in evaluation mode.
        encoder: Encodes prompts.
        requests: Edit requests.
        tokens: Maximum length of an answer in tokens; it ends earlier at the end-of-sequence token or a line break.
        all_prompts: Also generate answers after paraphrases and neighbours.
        max_rows: Rows of a forward pass.

    Returns:
        Two lists with one element for each request: tuples ``(efficacy, generalization, specificity)``, ``nan`` where not measured, and the texts
        generated after the prompts of the requests.

    Source:
        Yang et al. (2025), The Mirage of Model Editing: Revisiting Evaluation in the Wild, arXiv:2502.11177.
        Differs: the first sentence must contain the answer
        (:func:`~malleable.lightning_modules.functional.editing.answer_match.contains_answer`); the authors use a language model as the judge.
    """
    questions: list[tuple[str, str]] = []
    sizes = []
    for request in requests:
        parts = [[(request.prompt.replace(PLACEHOLDER, request.subject), request.target)], [], []]
        if all_prompts:
            parts[1] = [(text, request.target) for text in request.paraphrases]
            parts[2] = [(probe.prompt, probe.answer) for probe in request.neighbors]
        questions += [question for part in parts for question in part]
        sizes += [len(part) for part in parts]
    texts = generate_answers(model, encoder, [prompt for prompt, _ in questions], [tokens] * len(questions), max_rows, stop_tokens(encoder.tokenizer))
    correct = torch.tensor([float(contains_answer(text, answer)) for text, (_, answer) in zip(texts, questions, strict=True)])
    shares = torch.stack([part.mean() for part in torch.split(correct, sizes)]).view(-1, 3).tolist() if questions else []
    firsts = torch.tensor([0, *sizes]).cumsum(0)[:-1:3].tolist()
    return [(efficacy, generalization, specificity) for efficacy, generalization, specificity in shares], [texts[first] for first in firsts]
