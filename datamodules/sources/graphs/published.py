"""Base classes of sources of published graphs, with checksums of their files.

Their subclasses are in ``wn18rr.py``, ``fb15k237.py``, ``codex.py``, ``yago310.py`` and ``small_graphs.py``.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from malleable.datamodules.files.fetch import FetchError, fetch, fetch_package_files
from malleable.datamodules.graphs.triple_files import read_labels
from malleable.datamodules.sources.graphs.base import GraphSource, GraphTables, number
from malleable.datamodules.sources.graphs.triples import split_files

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")


class PublishedGraph(GraphSource):
    """Graph with a fixed split, which is downloaded on first use.

    Args:
        path: Folder with ``train.txt``, ``valid.txt`` and ``test.txt`` (or ``.tsv``, ``.gz``) to read instead. There is a warning if the files differ
            from the published ones.

    Raises:
        FileNotFoundError: If a file is missing in ``path``.
        FetchError: If the files cannot be downloaded.
    """

    terms: ClassVar[str]
    """Terms of use, which are logged once."""
    checksums: ClassVar[tuple[str, str, str]]
    """SHA-256 of the plain files of training, validation and test."""

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()

    @abstractmethod
    def fetched(self) -> list[Path]:
        """Return the files of training, validation and test, and download them if needed."""

    def files(self) -> list[Path]:
        """Return the files of the splits."""
        return list(self._splits().values())

    def load(self) -> GraphTables:
        """Read the triples."""
        return number({split: read_labels(path) for split, path in self._splits().items()})

    def _splits(self) -> Mapping[str, Path]:
        name = type(self).__name__
        _log_once(f"{name}: {self.terms}")
        if self.path is None:
            try:
                return dict(zip(SPLITS, self.fetched(), strict=True))
            except FetchError as error:
                raise FetchError(f"{error}\nor pass {name}(path=...) a folder with train.txt, valid.txt and test.txt") from error
        found = split_files(self.path)
        if missing := [split for split in SPLITS if split not in found]:
            raise FileNotFoundError(f"{self.path} has no file of the {missing[0]} split; {name} needs train.txt, valid.txt and test.txt")
        for split, expected in zip(SPLITS, self.checksums, strict=True):
            if _plain_sha256(found[split]) != expected:
                _warn_once(f"{found[split]} differs from the published {split} split of {name}: figures are not comparable with published ones")
        return found


class DownloadedGraph(PublishedGraph):
    """Graph that is downloaded from a URL. A subclass defines ``terms``, ``address`` and ``checksums``."""

    address: ClassVar[str]
    """URL of the folder with ``train.txt``, ``valid.txt`` and ``test.txt``."""

    def fetched(self) -> list[Path]:
        """Return the files in the cache, and download them if needed."""
        home = f"graphs/{type(self).__name__.lower()}"
        names = ("train.txt", "valid.txt", "test.txt")
        return [fetch(f"{self.address}/{name}", sha256, f"{home}/{name}") for name, sha256 in zip(names, self.checksums, strict=True)]


class PackagedGraph(PublishedGraph):
    """Graph in a package on the package index, which is opened as an archive and never installed or imported.

    A subclass defines ``terms``, ``package``, ``folder`` and ``checksums``.
    """

    package: ClassVar[str]
    """Exact requirement, e.g. ``pykeen==1.11.1``."""
    folder: ClassVar[str]
    """Folder inside the package."""

    def fetched(self) -> list[Path]:
        """Return the files in the cache, and extract them from the wheel if needed."""
        members = [f"{self.folder}/{name}.txt" for name in ("train", "valid", "test")]
        return fetch_package_files(self.package, dict(zip(members, self.checksums, strict=True)))


@functools.cache
def _log_once(text: str) -> None:
    log.info(text)


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _plain_sha256(path: Path) -> str:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
