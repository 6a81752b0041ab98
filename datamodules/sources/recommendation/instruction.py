"""Rows of ``{instruction, input, output}`` with titles in quotes, and the files of their catalogue.

Origin of the format: SPRec (https://github.com/RegionCh/SPRec, no licence stated) after BIGRec (https://github.com/SAI990323/Grounding4Rec).
The Goodreads rows in these repositories are from the UCSD Book Graph (Wan and McAuley, 2018 and 2019): academic use, with citation, without
redistribution. Nothing is downloaded: give the folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import id_text, read_json, text_of, texts_of
from malleable.datamodules.sources.recommendation.base import ReadyRow, ReadyRows, Source, items_table
from malleable.datamodules.sources.recommendation.ready_rows import TitleIndex, read_field, read_object, read_rows, split_files

SIDE_FILES = ("id2name.json", "name2id.json", "name2genre.json", "genre_dict.json")
# A closing quote is followed by a comma, the end of the line, or the end of the text (optionally after a full stop).
_CLOSING = re.compile(r'"(?=\s*(?:,|\n|$|\.\s|\.$))')


class InstructionRows(Source):
    """Instruction rows: ``input`` lists quoted titles, oldest first, and ``output`` is the quoted next title.

    Only the titles are used. Prompts are created from the template, so that training and evaluation use the same text.

    Args:
        path: Folder with ``train``, ``valid`` and ``test`` as ``.json`` or ``.jsonl``, with ``id2name.json`` or ``name2id.json``, and optionally
            ``name2genre.json`` and ``genre_dict.json`` (the genres to use).

    Raises:
        FileNotFoundError: If the folder has no rows or no catalogue.
        ValueError: If a file is not JSON, or if a field is missing in a row.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()

    def files(self) -> list[Path]:
        """Return the files of the rows and of the catalogue."""
        return [*split_files(self.path).values(), *(self.path / name for name in SIDE_FILES if (self.path / name).is_file())]

    def load(self) -> ReadyRows:
        """Read the rows, and find their titles."""
        names = self._names()
        genres = self._genres()
        finder = TitleFinder(list(names.values()))
        rows = {}
        for split, path in split_files(self.path).items():
            rows[split] = [
                ReadyRow(finder.find_all(read_field(place, text_of, row, "input")), finder.find(read_field(place, text_of, row, "output")))
                for place, row in read_rows(path)
            ]
        return ReadyRows(items_table(list(names), list(names.values()), [genres.get(name, ()) for name in names.values()]), rows)

    def _names(self) -> dict[str, str]:
        if (path := self.path / "id2name.json").is_file():
            return {key: read_field(str(path), text_of, names, key) for names in [read_object(path)] for key in names}
        if (path := self.path / "name2id.json").is_file():
            return {id_text(key, f"{path}, {name!r}"): name for name, key in read_object(path).items()}
        raise FileNotFoundError(f"{self.path} contains no catalogue; expected id2name.json or name2id.json")

    def _genres(self) -> dict[str, tuple[str, ...]]:
        path, counted = self.path / "name2genre.json", self.path / "genre_dict.json"
        if not path.is_file():
            return {}
        allowed = _names_in(counted) if counted.is_file() else None
        genres = read_object(path)
        own = {name: read_field(str(path), texts_of, genres, name) for name in genres}
        return {name: tuple(genre for genre in found if allowed is None or genre in allowed) for name, found in own.items()}


def _names_in(path: Path) -> set[str]:
    """Return the strings of a list, or the keys of an object."""
    content = read_json(path)
    if not isinstance(content, (list, dict)) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: expected a list of genres, or an object with genres as keys, got {brief_repr(content)}")
    return set(content)


class TitleFinder:
    """Search for titles of a catalogue in texts; titles may contain quotes.

    Args:
        names: Titles; the methods return their positions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.index = TitleIndex(names)

    def find(self, text: str) -> int:
        """Return the position of the title that equals a text, with or without quotes around it; -1 if there is none."""
        text = text.strip()
        bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
        return self.index.position(bare)

    def find_all(self, text: str) -> list[int]:
        """Return the positions of the quoted titles of a text, in order; -1 for titles that are not in the catalogue."""
        found = []
        start = text.find('"')
        while start >= 0:
            # Use the first closing quote for which the quoted text is a title, otherwise the first closing quote.
            ends = [match.start() for match in _CLOSING.finditer(text, start + 1)]
            known = ((end, position) for end in ends if (position := self.index.position(text[start + 1 : end])) >= 0)
            end, position = next(known, (ends[0] if ends else len(text), -1))
            found.append(position)
            start = text.find('"', end + 1)
        return found
