"""What an edited model says: of the facts themselves, in other words, of their neighbours, and when it writes freely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from malleable.datamodules.requests import PLACEHOLDER, EditRequest
from malleable.lightning_modules.editing.answers import take_answers
from malleable.lightning_modules.editing.prompts import Reader
from malleable.lightning_modules.functional.free_text import generate_text
from malleable.lightning_modules.functional.word_statistics import Tfidf
from malleable.lightning_modules.metrics.editing import Consistency, Fluency, RequestFigures


def measure(model: Any, reader: Reader, requests: Sequence[EditRequest], max_rows: int = 64) -> list[RequestFigures]:
    """Ask a model all that requests ask for.

    Args:
        model: In evaluation mode.
        reader: Makes rows of texts.
        requests: With paraphrases and neighbours as far as they have any.
        max_rows: Rows of a pass.

    Source:
        Meng et al. (2022), Locating and Editing Factual Associations in GPT, arXiv:2202.05262, section 3.3 (CounterFact); the exact shares as in
        its authors' code.
        Differs: without an old answer, efficacy and generalization are the exact ones.
    """
    questions: list[tuple[str, str]] = []
    for request in requests:
        texts = [request.prompt.replace(PLACEHOLDER, request.subject), *request.paraphrases]
        questions += [(text, request.target) for text in texts]
        questions += [(text, request.true) for text in texts if request.true is not None]
        questions += [(probe.prompt, probe.answer) for probe in request.neighbors]
        questions += [(probe.prompt, request.target) for probe in request.neighbors]
    answers = take_answers(model, reader, questions, max_rows)
    figures, start = [], 0
    for request in requests:
        asked, beside = 1 + len(request.paraphrases), len(request.neighbors)
        sizes = [asked, asked if request.true is not None else 0, beside, beside]
        columns = (answers.nll, answers.exact.float(), answers.accuracy)
        nll, exact, accuracy = (torch.split(values[start : start + sum(sizes)], sizes) for values in columns)
        better = (nll[1] > nll[0]).float() if request.true is not None else exact[0]
        # A neighbour whose own answer is the new one cannot lose it to that.
        rivals = torch.tensor([probe.answer.strip() != request.target.strip() for probe in request.neighbors], dtype=torch.bool)
        kept = (nll[2] < nll[3]).float()[rivals]
        shares = [better[:1], better[1:], kept]
        shares += [part for share in (exact, accuracy) for part in (share[0][:1], share[0][1:], share[2])]
        figures.append(RequestFigures(*(float(share.mean()) for share in shares)))
        start += sum(sizes)
    return figures


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int = 512) -> float:
    """Perplexity of texts, a token's mean over all of them; each is read from its beginning.

    Raises:
        ValueError: If no text has two tokens.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]], device=device)
        if ids.shape[1] < 2:
            continue
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        total -= float(logps.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    if not count:
        raise ValueError("perplexity needs texts of at least two tokens")
    return math.exp(total / count)


def write(model: Any, tokenizer: Any, prompts: Sequence[str], length: int = 100, top_k: int = 5, seed: int = 0, max_rows: int = 32) -> list[str]:
    """Let a model write on, a draw among its likeliest tokens at a time.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Beginnings.
        length: Tokens of a text, the beginning among them.
        top_k: Tokens to draw among.
        seed: Of the drawing; what is written after a beginning depends on that, the seed and its place in the list only.
        max_rows: Rows of a pass.

    Returns:
        Beginnings with what was written after them.
    """
    device = next(model.parameters()).device
    reader = Reader(tokenizer)
    encoded, pad = [reader.question(prompt).ids for prompt in prompts], reader.pad
    end = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    texts = []
    for start in range(0, len(encoded), max_rows):
        part = encoded[start : start + max_rows]
        width, shortest = max(len(ids) for ids in part), min(len(ids) for ids in part)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in part], device=device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in part], device=device)
        seeds = torch.arange(start, start + len(part), device=device) + (seed << 32)
        written = generate_text(
            model,
            ids,
            mask,
            max_new_tokens=max(1, length - shortest),
            eos_token_id=end,
            pad_token_id=pad,
            temperature=1.0,
            top_k=top_k,
            seeds=seeds,
        )
        for prompt, own, row in zip(prompts[start : start + max_rows], part, written.tolist(), strict=True):
            texts.append(prompt + tokenizer.decode(row[: max(1, length - len(own))], skip_special_tokens=True))
    return texts


def measure_writing(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], length: int = 100, seed: int = 0, max_rows: int = 32
) -> dict[str, float]:
    """Fluency and consistency of what a model writes after the requests' beginnings; empty where they have none.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        requests: With ``generation_prompts``, and ``references`` for consistency.
        length: Tokens of a text.
        seed: Of the drawing.
        max_rows: Rows of a pass.

    Source:
        Meng et al. (2022), arXiv:2202.05262, section 3.3.
        Differs: words are weighted after the requests' references, not after all of CounterFact's.
    """
    owners = [(number, prompt) for number, request in enumerate(requests) for prompt in request.generation_prompts]
    if not owners:
        return {}
    texts = write(model, tokenizer, [prompt for _, prompt in owners], length, seed=seed, max_rows=max_rows)
    fluent = Fluency()
    fluent.update(texts)
    figures = fluent.compute()
    referred = [number for number, request in enumerate(requests) if request.generation_prompts and request.references]
    if referred:
        consistent = Consistency(Tfidf(dict.fromkeys(text for number in referred for text in requests[number].references)))
        for number in referred:
            written = [text for (owner, _), text in zip(owners, texts, strict=True) if owner == number]
            consistent.update(written, requests[number].references)
        figures |= consistent.compute()
    return {name: float(value) for name, value in figures.items()}


def say(model: Any, reader: Reader, prompts: Sequence[str], lengths: Sequence[int], max_rows: int = 64) -> list[str]:
    """Write out what a model finds likeliest after prompts.

    Args:
        model: In evaluation mode.
        reader: Makes rows of texts.
        prompts: Questions.
        lengths: Tokens to write after each.
        max_rows: Rows of a pass.
    """
    device = next(model.parameters()).device
    texts = []
    for start in range(0, len(prompts), max_rows):
        rows = [reader.question(prompt).ids for prompt in prompts[start : start + max_rows]]
        width = max(len(row) for row in rows)
        ids = torch.tensor([[reader.pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
        part = lengths[start : start + max_rows]
        written = generate_text(model, ids, mask, max_new_tokens=max(part), eos_token_id=-1, pad_token_id=reader.pad).tolist()
        texts += [reader.tokenizer.decode(row[:length]).strip() for row, length in zip(written, part, strict=True)]
    return texts
