"""Items per second of the trie beam search against ``generate(prefix_allowed_tokens_fn=...)``, at equal outputs.

    python tests/benchmarks/decoding.py [--items ITEMS.tsv] [--json RESULT.json]

Both sides decode the same prompts in the same batches with the same model, whose weights are random. Titles are made up
unless a tab-separated file with a title and a year in its second and third column (MovieLens-100K's item file) is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from malleable.lightning_modules.functional.decoding import Decoded, beam_search
from malleable.lightning_modules.functional.trie import Trie

log = logging.getLogger("decoding")

EOS, PAD = 0, 1


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    num_beams: int
    k: int = 10
    batch_size: int = 16
    num_prompts: int = 64
    layers: int = 4
    width: int = 128
    vocab_size: int = 2048
    num_items: int = 1600


def made_up_titles(count: int, rng: random.Random) -> list[str]:
    """Make distinct titles of a few words, with series that share their beginnings."""
    syllables = ["ba", "der", "ko", "lin", "mar", "no", "pel", "ra", "sin", "tor", "ul", "ve"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))).capitalize() for _ in range(700)]
    titles: dict[str, None] = {}
    while len(titles) < count:
        base = (
            rng.choice(list(titles)[-40:]).rsplit(" (", 1)[0] if titles and rng.random() < 0.2 else " ".join(rng.choices(words, k=rng.randint(1, 4)))
        )
        titles[f"{base} ({rng.randint(1930, 1998)})"] = None
    return list(titles)


def read_titles(path: Path) -> list[str]:
    """Read distinct titles with their year."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return list(dict.fromkeys(f"{row[1]} ({row[2]})" for row in rows))


def tokenize(titles: list[str], vocab_size: int) -> list[list[int]]:
    """Train byte pairs on the titles and encode them, each with its end-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 2048), special_tokens=["</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(titles, trainer)
    return [[*tokenizer.encode(title).ids, EOS] for title in titles]


def make_prompts(titles: list[list[int]], count: int, rng: random.Random) -> list[list[int]]:
    """Make histories of 60 to 80 tokens."""
    prompts = []
    for _ in range(count):
        length = rng.randint(60, 80)
        prompt: list[int] = []
        while len(prompt) < length:
            prompt += rng.choice(titles)
        prompts.append(prompt[-length:])
    return prompts


def batches(prompts: list[list[int]], size: int) -> list[tuple[Tensor, Tensor]]:
    """Pad on the left."""
    result = []
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        result.append((ids, torch.arange(width) >= width - lengths[:, None]))
    return result


def generate(model: LlamaForCausalLM, titles: list[list[int]], prompt_ids: Tensor, prompt_mask: Tensor, setting: Setting) -> Decoded:
    """Decode with the library's own constrained beam search."""
    children: dict[tuple[int, ...], list[int]] = defaultdict(list)
    items = {tuple(title): item for item, title in reversed(list(enumerate(titles)))}
    for title in items:
        for depth in range(len(title)):
            if title[depth] not in children[title[:depth]]:
                children[title[:depth]].append(title[depth])
    start = prompt_ids.shape[1]
    output = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        num_beams=setting.num_beams,
        num_return_sequences=setting.k,
        length_penalty=0.0,
        early_stopping=False,
        do_sample=False,
        max_new_tokens=max(map(len, titles)),
        prefix_allowed_tokens_fn=lambda _, sent: children.get(tuple(sent[start:].tolist()), [EOS]),
        eos_token_id=EOS,
        pad_token_id=PAD,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found = []
    for sequence in output.sequences[:, start:].tolist():
        end = sequence.index(EOS) + 1 if EOS in sequence else len(sequence)
        found.append(items.get(tuple(sequence[:end]), -1))
    return Decoded(torch.tensor(found).reshape(-1, setting.k), output.sequences_scores.reshape(-1, setting.k))


def timed(decode: Callable[[Tensor, Tensor], Decoded], data: list[tuple[Tensor, Tensor]], repeats: int) -> tuple[float, Decoded]:
    """Return the best time over all batches in seconds, and the outputs."""
    best = float("inf")
    decode(*data[0])
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = [decode(*batch) for batch in data]
        best = min(best, time.perf_counter() - start)
    return best, Decoded(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


def agreement(ours: Decoded, theirs: Decoded) -> float:
    """Return the share of rows with the same items, up to the order of scores that are equal to 1e-4.

    Raises:
        AssertionError: If the scores of a row differ by more than 1e-3 nats.
    """
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-3, rtol=1e-4)
    same = 0
    for items, others, scores in zip(ours.item_ids.tolist(), theirs.item_ids.tolist(), ours.scores.tolist(), strict=True):
        ties = {item for item, score in zip(items, scores, strict=True) if abs(score - scores[-1]) < 1e-4}
        same += set(items) - ties == set(others) - ties - (set(others) - set(items))
    return same / len(ours.item_ids)


def measure(setting: Setting, items: Path | None, repeats: int) -> dict[str, float | str]:
    """Measure one setting."""
    torch.manual_seed(0)
    rng = random.Random(0)
    titles = tokenize(read_titles(items)[: setting.num_items] if items else made_up_titles(setting.num_items, rng), setting.vocab_size)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=setting.vocab_size,
            hidden_size=setting.width,
            intermediate_size=setting.width * 8 // 3,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    ).eval()
    trie = Trie.build(titles)
    data = batches(make_prompts(titles, setting.num_prompts, rng), setting.batch_size)
    ours_s, ours = timed(lambda ids, mask: beam_search(model, trie, ids, mask, num_beams=setting.num_beams, k=setting.k), data, repeats)
    with torch.no_grad():
        theirs_s, theirs = timed(lambda ids, mask: generate(model, titles, ids, mask, setting), data, repeats)
    count = setting.num_prompts * setting.k
    return {
        **asdict(setting),
        "tokens_per_title": sum(map(len, titles)) / len(titles),
        "ours_items_per_s": count / ours_s,
        "generate_items_per_s": count / theirs_s,
        "ratio": theirs_s / ours_s,
        "identical": agreement(ours, theirs),
    }


def main() -> None:
    """Measure all settings; the last line is the smallest ratio of the first two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, help="tab-separated item file; default: made-up titles")
    parser.add_argument("--json", type=Path, default=Path(tempfile.gettempdir()) / "decoding.json", help="where to write the figures")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", help="name of one setting")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    settings = [
        Setting("beam 10", 10),
        Setting("beam 30", 30),
        Setting("vocabulary 32k", 10, vocab_size=32_000, layers=2, num_prompts=32),
    ]
    results = []
    for setting in settings:
        if arguments.only in (None, setting.name):
            results.append(measure(setting, arguments.items, arguments.repeats))
            log.info(
                "%-16s ours %8.1f items/s, generate %8.1f items/s, ratio %5.2f, identical lists %.3f",
                setting.name,
                *(results[-1][key] for key in ("ours_items_per_s", "generate_items_per_s", "ratio", "identical")),
            )
    arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    log.info("figures in %s", arguments.json)
    log.info("ratio: %.2f", min(float(result["ratio"]) for result in results[:2]))


if __name__ == "__main__":
    main()
