"""36 facts, a decoder that is trained on them in seconds, and its accuracy."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from small_editing import decoder, tokenizer
from torch.nn import functional as F

from malleable.lightning_modules.editing.prompts import PromptEncoder
from malleable.lightning_modules.editing.targets import Fact, TargetSettings
from malleable.lightning_modules.functional.editing.null_space_threshold import Threshold

FIRST = ("Andes", "Bordeaux", "Danielle", "Darrieux", "French", "Lima")
LAST = ("Peru", "Tom", "Zürich", "capital", "coast", "dog")
ANSWERS = ("house", "man", "mother", "park", "old", "sad")
SUBJECTS = [f"{first} {last}" for first in FIRST for last in LAST]
# Prompts end with the subject: elsewhere, such a small model processes the subject in layers before the edited ones.
PROMPT, PARAPHRASE = "the capital of {}", "because I know {}"
DRAWN = random.Random(0).choices(ANSWERS, k=len(SUBJECTS))
KNOWN = [Fact(PROMPT, subject, answer) for subject, answer in zip(SUBJECTS, DRAWN, strict=True)]
NEW = [Fact(PROMPT, fact.subject, ANSWERS[(ANSWERS.index(fact.target) + 2) % 6]) for fact in KNOWN[::7]]
EDITED = {fact.subject for fact in NEW}
OTHERS = [fact for fact in KNOWN if fact.subject not in EDITED]
TEXTS = [f"{prompt.format(fact.subject)} {fact.target}" for fact in OTHERS for prompt in (PROMPT, PARAPHRASE)]
SETTINGS = {
    "layers": (0, 1),
    "ridge": 0.05,
    "threshold": Threshold("relative_energy", 0.001),
    "targets": TargetSettings(lr=0.5, steps=60, clamp=4.0, decay=0.01),
    "contexts": 0,
}


def paraphrased(facts: Sequence[Fact]) -> list[Fact]:
    """Return the same facts with the paraphrase as the prompt."""
    return [fact._replace(prompt=PARAPHRASE) for fact in facts]


def lessons() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inputs and labels of all facts with prompt and paraphrase."""
    encoder = PromptEncoder(tokenizer("bos"))
    rows = [encoder.encode_prompt(fact.prompt, fact.subject, answer=encoder.encode_answer(fact.target)) for fact in KNOWN + paraphrased(KNOWN)]
    batch = encoder.collate(rows)
    return batch.inputs(), batch.input_ids.masked_fill(batch.attention_mask == 0, -100)


def lesson_loss(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy over all tokens."""
    logits = model(**inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def learnt_decoder() -> Any:
    """Return a decoder that answers all facts correctly, with prompt and paraphrase."""
    return copy.deepcopy(_learnt())


@cache
def _learnt() -> Any:
    model = decoder(width=64, inner=256, spread=0.02)
    inputs, labels = lessons()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(300):
        lesson_loss(model, inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 and share(model, KNOWN + paraphrased(KNOWN)) == 1:
            break
    assert share(model, KNOWN + paraphrased(KNOWN)) == 1
    return model.eval()


@torch.no_grad()
def share(model: Any, facts: Sequence[Fact]) -> float:
    """Return the share of facts for which every token of the answer is the most probable one."""
    encoder = PromptEncoder(tokenizer("bos"))
    right = 0
    for fact in facts:
        answer = encoder.encode_answer(fact.target)
        row = encoder.encode_prompt(fact.prompt, fact.subject, answer=answer)
        best = model(torch.tensor([row.ids])).logits[0].argmax(-1)
        right += best[-len(answer) - 1 : -1].tolist() == answer
    return right / len(facts)
