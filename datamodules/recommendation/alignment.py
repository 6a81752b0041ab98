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
    titles = [*catalog.titles, *(data.titles[item] for item in new)]
    places |= {data.titles[item]: len(catalog) + number for number, item in enumerate(new)}
    place = np.array([places[title] for title in data.titles], dtype=np.int64)
    known = {place: item for item, place in enumerate(place.tolist())}
    keys = [data.keys[known[item]] if item in known else list(catalog.keys[item : item + 1]) for item in range(len(titles))]
    genres = [data.genres[known[item]] if item in known else catalog.genres[item] if catalog.genres else () for item in range(len(titles))]
    if missing := len(titles) - len(known):
        log.info("%d of the %d stored items do not occur in the data and keep their places", missing, len(catalog))
    if new:
        log.info("%d new items are added behind the %d stored ones", len(new), len(catalog))
    rows = {
        name: replace(index, candidates=None if index.candidates is None else [_renumber(place, row) for row in index.candidates])
        for name, index in data.rows.items()
    }
    return replace(data, titles=titles, genres=genres, keys=keys, sequences=[place[items] for items in data.sequences], rows=rows)


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
