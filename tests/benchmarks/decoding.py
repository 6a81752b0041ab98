"""Measure items per second of the trie beam search against ``generate(prefix_allowed_tokens_fn=...)``, at equal outputs.

    python tests/benchmarks/decoding.py [--items ITEMS.tsv] [--device cuda --dtype bfloat16] [--json RESULT.json]

Both sides decode the same prompts in the same batches with the same model, which has random weights. ``--items`` is a tab-separated file with a title
and a year in its second and third column (the item file of MovieLens-100K). Without it, titles are generated.
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from devices import DTYPES, add_device_arguments, synchronize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search
from malleable.lightning_modules.functional.language.trie_search_base import Decoded

log = logging.getLogger("decoding")

EOS, PAD = 0, 1
Search = Callable[[Tensor, Tensor], Decoded]


@dataclass(frozen=True)
class Setting:
    """Model, data and search of one measurement."""

    name: str
    num_beams: int
    k: int = 10
    batch_size: int = 16
    num_prompts: int = 64
    layers: int = 4
    width: int = 128
    heads: int = 4
    key_value_heads: int = 4
    intermediate: int | None = None
    vocab_size: int = 2048
    num_items: int = 1600
    device: str = "cpu"
    dtype: str = "float32"


def made_up_titles(count: int, rng: random.Random) -> list[str]:
    """Generate distinct titles of a few words. Titles of a series start with the same words."""
    syllables = ["ba", "der", "ko", "lin", "mar", "no", "pel", "ra", "sin", "tor", "ul", "ve"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))).capitalize() for _ in range(700)]
    titles: dict[str, None] = {}
    while len(titles) < count:
        base = " ".join(rng.choices(words, k=rng.randint(1, 4)))
        if titles and rng.random() < 0.2:  # a sequel, or the same title of another year
            base = rng.choice(list(titles)[-40:]).rsplit(" (", 1)[0] + rng.choice(["", " II", " III"])
        titles[f"{base} ({rng.randint(1930, 1998)})"] = None
    return list(titles)


def read_titles(path: Path) -> list[str]:
    """Read distinct titles with their years from a file."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return list(dict.fromkeys(f"{row[1]} ({row[2]})" for row in rows))


def tokenize(titles: list[str], vocab_size: int) -> list[list[int]]:
    """Train a BPE tokenizer on the titles, and return the token ids of each title with the end-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 2048), special_tokens=["</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(titles, trainer)
    return [[*tokenizer.encode(title).ids, EOS] for title in titles]


def make_prompts(titles: list[list[int]], count: int, rng: random.Random) -> list[list[int]]:
    """Generate prompts of 60 to 80 tokens, which consist of random titles."""
    prompts = []
    for _ in range(count):
        length = rng.randint(60, 80)
        prompt: list[int] = []
        while len(prompt) < length:
            prompt += rng.choice(titles)
        prompts.append(prompt[-length:])
    return prompts


def batches(prompts: list[list[int]], size: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of token ids and attention masks, ``(B, T)``, padded on the left."""
    result = []
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        result.append((ids, torch.arange(width) >= width - lengths[:, None]))
    return result


class Generate:
    """Beam search of transformers, constrained by a dictionary with the allowed next tokens of each prefix of a title.

    Args:
        model: The model.
        titles: Token ids of each title.
        setting: Setting with the number of beams and of returned items.
        constrained: Whether to allow only titles. Otherwise all tokens are allowed, and the found items are not valid.
    """

    def __init__(self, model: LlamaForCausalLM, titles: list[list[int]], setting: Setting, constrained: bool = True) -> None:
        self.model = model
        self.setting = setting
        self.constrained = constrained
        self.items = {tuple(title): item for item, title in reversed(list(enumerate(titles)))}
        children: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for title in self.items:
            for depth, token in enumerate(title):
                children[title[:depth]].add(token)
        self.children = {prefix: sorted(tokens) for prefix, tokens in children.items()}
        self.longest = max(map(len, titles))

    def __call__(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Decoded:
        """Decode a batch."""
        setting = self.setting
        start = prompt_ids.shape[1]
        output = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            num_beams=setting.num_beams,
            num_return_sequences=setting.k,
            length_penalty=0.0,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=self.longest,
            prefix_allowed_tokens_fn=(lambda _, sent: self.children.get(tuple(sent[start:].tolist()), [EOS])) if self.constrained else None,
            eos_token_id=EOS,
            pad_token_id=PAD,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found = []
        for sequence in output.sequences[:, start:].tolist():
            end = sequence.index(EOS) + 1 if EOS in sequence else len(sequence)
            found.append(self.items.get(tuple(sequence[:end]), -1))
        return Decoded(torch.tensor(found).reshape(-1, setting.k), output.sequences_scores.reshape(-1, setting.k).float().cpu())


class Timed(NamedTuple):
    """Outputs, and the wall time and processor time of the search in seconds."""

    decoded: Decoded
    wall_s: float
    cpu_s: float


def timed(decode: Callable[[], Decoded], device: str = "cpu") -> Timed:
    """Measure the time of one call."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    decoded = Decoded(*(part.cpu() for part in decode()))
    return Timed(decoded, time.perf_counter() - wall, time.process_time() - cpu)


def side_by_side(searches: tuple[Search, ...], data: list[tuple[Tensor, Tensor]], device: str = "cpu") -> list[Timed]:
    """Measure all searches alternately on each batch, so that other load affects all of them. The first call of each search is not counted."""
    for search in searches:
        search(*data[0])
    runs = [[timed(partial(search, *batch), device) for search in searches] for batch in data]
    totals = []
    for parts in zip(*runs, strict=True):
        decoded, wall, cpu = zip(*parts, strict=True)
        totals.append(Timed(Decoded(*(torch.cat(column) for column in zip(*decoded, strict=True))), sum(wall), sum(cpu)))
    return totals


def agreement(ours: Decoded, theirs: Decoded, exact: bool = True) -> float:
    """Return the share of rows with the same items in the same order. With ``exact`` (float32), scores must be equal up to rounding.

    Raises:
        AssertionError: If ``exact`` is set, and scores differ or more than 5 % of the lists differ (near-ties can change a few lists).
    """
    same = (ours.item_ids == theirs.item_ids).all(1).float().mean().item()
    if exact:
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-3, rtol=1e-4)
        assert same > 0.95, f"only {same:.3f} of the lists are the same"
    return same


def prepare(setting: Setting, items: Path | None) -> tuple[LlamaForCausalLM, list[list[int]], list[tuple[Tensor, Tensor]]]:
    """Return the model, the token ids of the titles, and the batches of prompts (ids and masks)."""
    torch.manual_seed(0)
    rng = random.Random(0)
    titles = tokenize(read_titles(items)[: setting.num_items] if items else made_up_titles(setting.num_items, rng), setting.vocab_size)
    config = LlamaConfig(
        vocab_size=setting.vocab_size,
        hidden_size=setting.width,
        intermediate_size=setting.intermediate or setting.width * 8 // 3,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.key_value_heads,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.device(setting.device):
        model = LlamaForCausalLM(config).eval()
    model.to(DTYPES[setting.dtype])
    prompts = batches(make_prompts(titles, setting.num_prompts, rng), setting.batch_size)
    return model, titles, [(ids.to(setting.device), mask.to(setting.device)) for ids, mask in prompts]


def measure(setting: Setting, items: Path | None) -> dict[str, float | str]:
    """Measure one setting, and return its figures by name."""
    model, titles, data = prepare(setting, items)
    search = partial(beam_search, model, Trie.build(titles).to(setting.device), num_beams=setting.num_beams, k=setting.k)
    with torch.no_grad():
        ours, theirs = side_by_side((search, Generate(model, titles, setting)), data, setting.device)
    count = setting.num_prompts * setting.k
    return {
        **asdict(setting),
        "threads": torch.get_num_threads(),
        "tokens_per_title": sum(map(len, titles)) / len(titles),
        "ours_items_per_s": count / ours.wall_s,
        "generate_items_per_s": count / theirs.wall_s,
        "ratio": theirs.wall_s / ours.wall_s,
        "cpu_ratio": theirs.cpu_s / ours.cpu_s,
        "identical": agreement(ours.decoded, theirs.decoded, exact=setting.dtype == "float32"),
    }


def main() -> None:
    """Measure all settings; the last line is the smallest ratio of the first two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, help="tab-separated item file; default: generated titles")
    parser.add_argument("--json", type=Path, default=Path(tempfile.gettempdir()) / "decoding.json", help="output file")
    parser.add_argument("--only", help="name of the only setting to measure")
    add_device_arguments(parser)
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
            results.append(measure(replace(setting, device=arguments.device, dtype=arguments.dtype), arguments.items))
            log.info(
                "%-16s ours %8.1f items/s, generate %8.1f items/s, ratio %5.2f (of processor time %5.2f), identical lists %.3f",
                setting.name,
                *(results[-1][key] for key in ("ours_items_per_s", "generate_items_per_s", "ratio", "cpu_ratio", "identical")),
            )
    arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    log.info("wrote the figures to %s", arguments.json)
    log.info("ratio: %.2f", min(float(result["ratio"]) for result in results[:2]))


if __name__ == "__main__":
    main()
