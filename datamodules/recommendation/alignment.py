"""Alignment of new data with the catalogue that a model was trained with."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from malleable.datamodules.batch import Catalog
from malleable.datamodules.recommendation.splits import Interactions, Ints

log = logging.getLogger(__name__)

SHOWN = 3


def align(data: Interactions, catalog: Catalog, extend: bool = False) -> Interactions:
    """Change the item numbers of data to those of a stored catalogue.

    Items with equal titles are the same item. Stored items that are not in the data keep their numbers.

    Args:
        data: Data with their own numbers of items.
        catalog: Catalogue that the model was trained with.
        extend: Append items that are not in the catalogue; otherwise they are an error.

    Raises:
        ValueError: If the catalogue has the source id of an item with a different title, or if an item is new and ``extend`` is false.
    """
    number_of = {title: item for item, title in enumerate(catalog.titles)}
    new = [item for item, title in enumerate(data.titles) if title not in number_of]
    _check_titles(data, catalog, new)
    if new and not extend:
        raise ValueError(
            f"{len(new)} items of the data are not in the catalogue of {len(catalog)} items that the checkpoint stores: "
            f"{', '.join(f'{data.titles[item]!r} (id {data.keys[item][0]})' for item in new[:SHOWN])}{', ...' if len(new) > SHOWN else ''}; "
            "give --extend_catalog (in Python, extend_catalog=True of the data module) to append them to the stored items, or remove them"
        )
    _warn_of_moved_ids(data, catalog)
    titles = [*catalog.titles, *(data.titles[item] for item in new)]
    number_of |= {data.titles[item]: len(catalog) + number for number, item in enumerate(new)}
    new_numbers: Ints = np.array([number_of[title] for title in data.titles], dtype=np.int64)
    old_number = {number: item for item, number in enumerate(new_numbers.tolist())}
    keys = [data.keys[old_number[item]] if item in old_number else list(catalog.keys[item : item + 1]) for item in range(len(titles))]
    genres = [data.genres[old_number[item]] if item in old_number else catalog.genres[item] if catalog.genres else () for item in range(len(titles))]
    if missing := len(titles) - len(old_number):
        log.info("%d of the %d stored items are not in the data: they keep their numbers, and predict does not recommend them", missing, len(catalog))
    rows = {
        name: replace(index, candidates=None if index.candidates is None else [_lookup(new_numbers, row) for row in index.candidates])
        for name, index in data.rows.items()
    }
    listed = np.zeros(len(titles), dtype=bool)
    listed[new_numbers] = True
    events = None if data.events is None else data.events.renumber_items(new_numbers)
    sequences = [_lookup(new_numbers, items) for items in data.sequences]
    return replace(data, titles=titles, genres=genres, keys=keys, sequences=sequences, rows=rows, events=events, listed=listed)


def _lookup(new_numbers: Ints, items: Ints) -> Ints:
    return new_numbers[items]


def _check_titles(data: Interactions, catalog: Catalog, new: list[int]) -> None:
    """Raise an error if the title of a stored item was changed in the data; models identify items by title.

    Raises:
        ValueError: If an item has a stored source id, but another title, and the stored title is not in the data.
    """
    stored = dict(zip(catalog.keys, catalog.titles, strict=False))
    titles = set(data.titles)
    renamed = [(key, stored[key], data.titles[item]) for item in new for key in data.keys[item] if key in stored and stored[key] not in titles]
    if renamed:
        examples = ", ".join(f"{key}: {old!r} in the checkpoint, {now!r} in the data" for key, old, now in renamed[:SHOWN])
        more = ", ..." if len(renamed) > SHOWN else ""
        raise ValueError(
            f"{len(renamed)} items have another title than the items with the same id in the checkpoint ({examples}{more}); "
            "use the stored titles, or new ids"
        )


def _warn_of_moved_ids(data: Interactions, catalog: Catalog) -> None:
    """Log a warning if the stored id of a title belongs to another title in the data, e.g. because the titles of two items were swapped."""
    stored = dict(zip(catalog.titles, catalog.keys, strict=False))
    now = {key: title for title, own in zip(data.titles, data.keys, strict=True) for key in own}
    moved = [(title, stored[title], now[stored[title]]) for title in data.titles if title in stored and now.get(stored[title], title) != title]
    if moved:
        examples = "; ".join(f"id {key}: {title!r} in the checkpoint, {other!r} in the data" for title, key, other in moved[:SHOWN])
        log.warning(
            "%d ids have another title than in the checkpoint (%s%s). Items are identified by title, and predictions have the ids of the data. "
            "If the titles were swapped by mistake, correct the items table", len(moved), examples, "; ..." if len(moved) > SHOWN else "",
        )  # fmt: skip
