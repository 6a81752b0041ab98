"""Interactions of new data under the catalogue that a model was trained with."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from malleable.datamodules.batch import Catalog
from malleable.datamodules.recommendation.splits import Interactions, Ints

log = logging.getLogger(__name__)

SHOWN = 3


def align(data: Interactions, catalog: Catalog, extend: bool = False) -> Interactions:
    """Number the items of data as a stored catalogue does; stored items that the data lacks keep their places.

    Args:
        data: Whose items have places of their own; found in the catalogue by title.
        catalog: What the model was trained with.
        extend: Append items that the catalogue lacks, instead of refusing them.

    Raises:
        ValueError: If an item has another title than the stored one of the same id, or is new and ``extend`` is not set.
    """
    places = {title: item for item, title in enumerate(catalog.titles)}
    new = [item for item, title in enumerate(data.titles) if title not in places]
    _refuse_renamed(data, catalog, new)
    if new and not extend:
        raise ValueError(
            f"{len(new)} items of the data are not in the catalogue of {len(catalog)} items that the checkpoint stores: "
            f"{', '.join(f'{data.titles[item]!r} (id {data.keys[item][0]})' for item in new[:SHOWN])}{', ...' if len(new) > SHOWN else ''}; "
            "give --extend_catalog (in Python, the data module's extend_catalog=True) to add them behind the stored ones, or leave them out"
        )
    _warn_of_other_ids(data, catalog)
    titles = [*catalog.titles, *(data.titles[item] for item in new)]
    places |= {data.titles[item]: len(catalog) + number for number, item in enumerate(new)}
    place = np.array([places[title] for title in data.titles], dtype=np.int64)
    known = {place: item for item, place in enumerate(place.tolist())}
    keys = [data.keys[known[item]] if item in known else list(catalog.keys[item : item + 1]) for item in range(len(titles))]
    genres = [data.genres[known[item]] if item in known else catalog.genres[item] if catalog.genres else () for item in range(len(titles))]
    if missing := len(titles) - len(known):
        log.info("%d of the %d stored items are not in the data: they keep their places and are not recommended by predict", missing, len(catalog))
    if new:
        log.info("%d new items are added behind the %d stored ones", len(new), len(catalog))
    rows = {
        name: replace(index, candidates=None if index.candidates is None else [_renumber(place, row) for row in index.candidates])
        for name, index in data.rows.items()
    }
    listed = np.zeros(len(titles), dtype=bool)
    listed[place] = True
    events = None if data.events is None else data.events.renumbered(place)
    sequences = [_renumber(place, items) for items in data.sequences]
    return replace(data, titles=titles, genres=genres, keys=keys, sequences=sequences, rows=rows, events=events, listed=listed)


def _renumber(place: Ints, items: Ints) -> Ints:
    return place[items]


def _refuse_renamed(data: Interactions, catalog: Catalog, new: list[int]) -> None:
    """Refuse an item of a stored id whose stored title is gone: the title is what weights know it by."""
    stored = dict(zip(catalog.keys, catalog.titles, strict=False))
    titles = set(data.titles)
    renamed = [(key, stored[key], data.titles[item]) for item in new for key in data.keys[item] if key in stored and stored[key] not in titles]
    if renamed:
        examples = ", ".join(f"{key}: {old!r} in the checkpoint, {now!r} in the data" for key, old, now in renamed[:SHOWN])
        more = ", ..." if len(renamed) > SHOWN else ""
        raise ValueError(
            f"{len(renamed)} items have another title than the checkpoint stores for the same id ({examples}{more}); "
            "give them their stored titles, or new ids"
        )


def _warn_of_other_ids(data: Interactions, catalog: Catalog) -> None:
    """Warn of titles whose stored id now belongs to another title, as where the titles of two items were swapped."""
    stored = dict(zip(catalog.titles, catalog.keys, strict=False))
    now = {key: title for title, own in zip(data.titles, data.keys, strict=True) for key in own}
    moved = [(title, stored[title], now[stored[title]]) for title in data.titles if title in stored and now.get(stored[title], title) != title]
    if moved:
        examples = "; ".join(f"id {key}: {title!r} in the checkpoint, {other!r} in the data" for title, key, other in moved[:SHOWN])
        log.warning(
            "%d ids have another title than in the checkpoint (%s%s). Items are identified by title, and predictions have the ids of the data. "
            "If the titles were swapped by mistake, correct the items table", len(moved), examples, "; ..." if len(moved) > SHOWN else "",
        )  # fmt: skip
