"""Rejected answers for a round: the model's own, or drawn items."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer

from malleable.callbacks.self_play.round_file import RoundFile, answer_statistics
from malleable.callbacks.sweep import rows_per_pass, sweep
from malleable.datamodules.batch import Catalog
from malleable.datamodules.loading import PhasedLoader, RowView
from malleable.datamodules.recommendation.sampling import ItemSampler
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.language.negatives import SelfPlay


def negatives(
    trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], source: str, play: SelfPlay, seed: tuple[int, int], label: str
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Make the rejected answers of a round.

    Args:
        trainer: Shares the rows among the ranks.
        module: The recommender.
        rows: The round's rows.
        loader: Collates rows; its batch size serves where the data module has no ``eval_batch_size``.
        source: ``pre_round`` and ``post_sft`` ask the module; ``random`` and ``popularity`` draw items.
        play: How the module answers.
        seed: Seed and round.
        label: What the progress lines say.

    Returns:
        For each row the items, -1 where an answer is none, and the answers' tokens.
    """
    catalog = module.catalog
    assert catalog is not None
    number = (seed[0] << 16) + seed[1]
    if source in ("random", "popularity"):
        sampler = ItemSampler(range(len(catalog)), None if source == "random" else catalog.popularity, seed=number)
        items = [draw(sampler, rows[index], play.num_negatives) for index in range(len(rows))]
        return items, titles(items, catalog)
    ask = partial(module.generate_negatives, settings=play, seed=number)
    table = sweep(trainer, module, rows, loader.collate_fn, rows_per_pass(trainer, loader), ask, f"{label}: own answers")
    if play.grounding == "none":
        # (rows, 1 + tokens): the item or -1, then the free text padded with -1.
        return table[:, :1].tolist(), [[[token for token in row if token >= 0]] for row in table[:, 1:].tolist()]
    return table.tolist(), titles(table.tolist(), catalog)


def compare_decoding(
    trainer: Trainer,
    module: LanguageModel,
    loader: PhasedLoader[Any],
    file: RoundFile,
    count: int,
    source: str,
    play: SelfPlay,
    seed: tuple[int, int],
    label: str,
) -> dict[str, dict[str, float]]:
    """Describe how concentrated greedy and sampled answers of the module are, beside the true titles.

    Args:
        trainer: Shares the rows among the ranks.
        module: The recommender.
        loader: Has the rows of the round, and collates them.
        file: The round, with its answers.
        count: Number of rows to compare on, the first of the round.
        source: As of :func:`negatives`, ``pre_round`` or ``post_sft``.
        play: How the round's answers were made. The mode that it does not use needs another pass.
        seed: Seed and round.
        label: Prefix of the progress lines.

    Returns:
        :func:`answer_statistics` of ``true``, ``greedy`` and ``sample`` titles.
    """
    assert file.items is not None
    assert module.catalog is not None
    rows = RowView(loader.pool, file.positions[:count])
    answers = {"true": [list(rows[index]["item_ids"])[:1] for index in range(len(rows))]}
    modes: tuple[Literal["greedy", "sample"], ...] = ("greedy", "sample")
    for mode in modes:
        other = replace(play, decode=mode, num_negatives=1)
        same = other == play
        answers[mode] = file.items[: len(rows)] if same else negatives(trainer, module, rows, loader, source, other, seed, f"{label}, {mode}")[0]
    popularity = module.catalog.popularity
    return {name: answer_statistics([item for row in table for item in row], popularity) for name, table in answers.items()}


def draw(sampler: ItemSampler, row: Any, count: int) -> list[int]:
    """Draw items for a row: among its candidates where it has some, never the true one nor any earlier item of the user.

    Items that the user meets after the target may be drawn: leaving them out would tell training of validation and test items.
    """
    own = (row.get(name, ()) for name in ("item_ids", "history", "earlier", "seen"))
    candidates = row.get("candidates", ())
    source = sampler.among(candidates) if len(candidates) else sampler
    return source.draw(int(row["sample_id"]), count, {int(item) for items in own for item in items})


def titles(items: list[list[int]], catalog: Catalog) -> list[list[list[int]]]:
    """Answer tokens of each row's items; an empty answer where there is no item."""
    return [[list(catalog.token_ids[item]) if item >= 0 else [] for item in row] for row in items]
