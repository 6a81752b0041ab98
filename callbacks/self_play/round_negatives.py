"""Choice of rejected answers for the rows of a self-play round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Trainer

from malleable.callbacks.row_pass import apply_to_rows, rows_per_pass
from malleable.callbacks.self_play.round_file import RoundFile, answer_statistics
from malleable.datamodules.batch import Catalog
from malleable.datamodules.loading import PhasedLoader, RowView
from malleable.datamodules.negative_samplers import Mixture, NegativeSampler, RowItems, SelfPlay, round_seed
from malleable.lightning_modules.language.language_model import LanguageModel

Rejected = tuple[list[list[int]], list[list[list[int]]]]


def choose_negatives(
    trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], sampler: NegativeSampler, seed: tuple[int, int], label: str
) -> Rejected:
    """Choose the rejected answers of a round.

    Args:
        trainer: Trainer, which distributes the rows over the ranks.
        module: The recommender.
        rows: Rows of the round.
        loader: Loader with the collate function, and with the batch size if the data module has no ``eval_batch_size``.
        sampler: Sampler of the answers.
        seed: Seed and number of the round.
        label: Prefix of the progress messages.

    Returns:
        A pair of lists with one element for each row: the items of its answers (-1 for an answer that is not an item), and the token ids of its
        answers (a list for each answer).
    """
    catalog = module.catalog
    assert catalog is not None
    number = round_seed(*seed)
    if isinstance(sampler, Mixture):
        return _mixed(trainer, module, rows, loader, sampler, seed, label)
    if not sampler.needs_model:
        choose = sampler.bind(len(catalog), catalog.popularity, number)
        items = [choose(row_items(rows[index])) for index in range(len(rows))]
        return items, titles(items, catalog)
    if not isinstance(sampler, SelfPlay):
        # Exclude all earlier items of the user, also if they may be recommended again.
        rows = RowView(rows, range(len(rows)), [{"seen": sorted(row_items(rows[index]).exclude)} for index in range(len(rows))])
    generate = partial(module.generate_negatives, sampler=sampler, seed=number)
    table = apply_to_rows(trainer, module, rows, loader.collate_fn, rows_per_pass(trainer, loader), generate, f"{label}: negatives")
    if isinstance(sampler, SelfPlay) and sampler.grounding == "none":
        # (rows, 1 + tokens): the item or -1, followed by the tokens of the free text padded with -1.
        return table[:, :1].tolist(), [[[token for token in row if token >= 0]] for row in table[:, 1:].tolist()]
    return table.tolist(), titles(table.tolist(), catalog)


def _mixed(
    trainer: Trainer, module: LanguageModel, rows: Any, loader: PhasedLoader[Any], mixture: Mixture, seed: tuple[int, int], label: str
) -> Rejected:
    """Assign each row to a sampler of the mixture, and choose its answers with this sampler."""
    parts = [mixture.choose(int(rows[index]["sample_id"]), round_seed(*seed)) for index in range(len(rows))]
    items: list[list[int]] = [[]] * len(rows)
    answers: list[list[list[int]]] = [[]] * len(rows)
    for part, sampler in enumerate(mixture.parts):
        positions = [index for index, chosen in enumerate(parts) if chosen == part]
        if not positions:
            continue
        found = choose_negatives(trainer, module, RowView(rows, positions), loader, sampler, seed, f"{label}, {type(sampler).__name__}")
        for position, own_items, own_answers in zip(positions, *found, strict=True):
            items[position], answers[position] = own_items, own_answers
    return items, answers


def compare_decoding(
    trainer: Trainer,
    module: LanguageModel,
    loader: PhasedLoader[Any],
    file: RoundFile,
    count: int,
    sampler: SelfPlay,
    seed: tuple[int, int],
    label: str,
) -> dict[str, dict[str, float]]:
    """Compare the concentration of greedy answers, sampled answers and true titles.

    Args:
        trainer: Trainer, which distributes the rows over the ranks.
        module: The recommender.
        loader: Loader with the pool of rows and the collate function.
        file: File of the round, with its answers.
        count: Number of rows of the round to compare, from the first one.
        sampler: Sampler of the answers in the file. The decoding mode that it does not use needs an additional pass.
        seed: Seed and number of the round.
        label: Prefix of the progress messages.

    Returns:
        Output of :func:`answer_statistics` for each kind of titles: ``true``, ``greedy`` and ``sample``.
    """
    assert file.items is not None
    assert module.catalog is not None
    rows = RowView(loader.pool, file.positions[:count])
    answers = {"true": [list(rows[index]["item_ids"])[:1] for index in range(len(rows))]}
    modes: tuple[Literal["greedy", "sample"], ...] = ("greedy", "sample")
    for mode in modes:
        other = replace(sampler, decode=mode, num_negatives=1)
        same = other == sampler
        answers[mode] = file.items[: len(rows)] if same else choose_negatives(trainer, module, rows, loader, other, seed, f"{label}, {mode}")[0]
    popularity = module.catalog.popularity
    return {name: answer_statistics([item for row in table for item in row], popularity) for name, table in answers.items()}


def row_items(row: Mapping[str, Any]) -> RowItems:
    """Return the fields of a row on which its negatives depend: id, excluded items and candidates."""
    own = (row.get(name, ()) for name in ("item_ids", "history", "earlier", "seen"))
    return RowItems(int(row["sample_id"]), {int(item) for items in own for item in items}, row.get("candidates", ()))


def titles(items: list[list[int]], catalog: Catalog) -> list[list[list[int]]]:
    """Return, for each row, the token ids of the title of each of its items; an empty list for -1."""
    return [[list(catalog.token_ids[item]) if item >= 0 else [] for item in row] for row in items]
