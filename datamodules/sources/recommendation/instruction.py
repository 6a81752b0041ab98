"""Rows of ``{instruction, input, output}`` with titles in quotes, and the side files of their catalogue.

Origin of the format: SPRec (https://github.com/RegionCh/SPRec, no licence stated) after BIGRec (https://github.com/SAI990323/Grounding4Rec).
The Goodreads rows published there stem from the UCSD Book Graph (Wan and McAuley, 2018 and 2019): academic use, to be cited, not to be
redistributed. Nothing is fetched: give the folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from malleable.datamodules.files.text_files import id_text, read_json, text_of, texts_of
from malleable.datamodules.sources.recommendation.base import ReadyRow, ReadyRows, Source, items_table
from malleable.datamodules.sources.recommendation.ready import TitleIndex, at, read_object, read_rows, split_files

SIDE_FILES = ("id2name.json", "name2id.json", "name2genre.json", "genre_dict.json")
# A closing quote stands before a comma, a line's end or the end.
_CLOSING = re.compile(r'"(?=\s*(?:,|\n|$|\.\s|\.$))')


class InstructionRows(Source):
    """Instruction rows whose ``input`` lists quoted titles, oldest first, and whose ``output`` is the quoted next title.

    Only the titles are taken; the prompt is made anew from the template, so that training and evaluation read the same text.

    Args:
        path: Folder with ``train``, ``valid`` and ``test`` as ``.json`` or ``.jsonl``, with ``id2name.json`` or ``name2id.json``, and, where
            genres are known, ``name2genre.json`` and ``genre_dict.json`` (the genres that count).

    Raises:
        FileNotFoundError: If the folder has no rows or no catalogue.
        ValueError: If a file is no JSON or a row misses a field.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()

    def files(self) -> list[Path]:
        """Return rows and side files."""
        return [*split_files(self.path).values(), *(self.path / name for name in SIDE_FILES if (self.path / name).is_file())]

    def load(self) -> ReadyRows:
        """Read the rows and find the titles in them."""
        names = self._names()
        genres = self._genres()
        finder = TitleFinder(list(names.values()))
        rows = {}
        for split, path in split_files(self.path).items():
            rows[split] = [
                ReadyRow(finder.find_all(at(place, text_of, row, "input")), finder.find(at(place, text_of, row, "output")))
                for place, row in read_rows(path)
            ]
        return ReadyRows(items_table(list(names), list(names.values()), [genres.get(name, ()) for name in names.values()]), rows)

    def _names(self) -> dict[str, str]:
        if (path := self.path / "id2name.json").is_file():
            return {key: at(str(path), text_of, names, key) for names in [read_object(path)] for key in names}
        if (path := self.path / "name2id.json").is_file():
            return {id_text(key, f"{path}, {name!r}"): name for name, key in read_object(path).items()}
        raise FileNotFoundError(f"{self.path} holds no catalogue; expected id2name.json or name2id.json")

    def _genres(self) -> dict[str, tuple[str, ...]]:
        path, counted = self.path / "name2genre.json", self.path / "genre_dict.json"
        if not path.is_file():
            return {}
        allowed = _names_in(counted) if counted.is_file() else None
        genres = read_object(path)
        own = {name: at(str(path), texts_of, genres, name) for name in genres}
        return {name: tuple(genre for genre in found if allowed is None or genre in allowed) for name, found in own.items()}


def _names_in(path: Path) -> set[str]:
    """Return the texts of a list, or the keys of an object."""
    content = read_json(path)
    if not isinstance(content, (list, dict)) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected a list of genres, or an object with genres as keys, got {content!r:.80}")
    return set(content)


class TitleFinder:
    """Finds the titles of a catalogue in text; a title may itself contain quotes.

    Args:
        names: Titles; what is found is their position.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.index = TitleIndex(names)

    def find(self, text: str) -> int:
        """Return the title that a text consists of, with or without quotes around it; -1 if it is none."""
        text = text.strip()
        bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
        return self.index.position(bare)

    def find_all(self, text: str) -> list[int]:
        """Return the quoted titles of a text in order, -1 for one that is not in the catalogue."""
        found = []
        start = text.find('"')
        while start >= 0:
            # The first closing quote after which the text in between is a title; else the first closing quote.
            ends = [match.start() for match in _CLOSING.finditer(text, start + 1)]
            known = ((end, position) for end in ends if (position := self.index.position(text[start + 1 : end])) >= 0)
            end, position = next(known, (ends[0] if ends else len(text), -1))
            found.append(position)
            start = text.find('"', end + 1)
        return found
