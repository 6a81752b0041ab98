"""Facts about countries and territories.

Origin: npm ``countries-list`` 3.4.1 (https://github.com/annexare/Countries), MIT, (c) Dmytro and Annexare Studio: 252 entries, names in English.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, ClassVar

from malleable.datamodules.fetch import fetch
from malleable.datamodules.sources.facts import Fact, FactSource, FactTables, Relation

URL = "https://registry.npmjs.org/countries-list/-/countries-list-3.4.1.tgz"
SHA256 = "572934a82137ec58a84a3e32635ec589cb9788e8df408f15677c71009d2adff2"
NAME = "countries-list-3.4.1.tgz"

RELATIONS = (
    Relation(
        "capital",
        (
            "The capital of {} is",
            "The capital city of {} is",
            "The seat of government of {} is in",
            "The government of {} sits in",
            "Embassies to {} are found in",
        ),
    ),
    Relation(
        "continent",
        (
            "The continent of {} is",
            "On the map, {} is found in",
            "The country {} lies in",
            "Travellers to {} fly to",
            "The land of {} is a part of",
        ),
    ),
    Relation(
        "currency",
        (
            "The currency of {} is the",
            "The official currency of {} is the",
            "Prices in {} are given in the",
            "People in {} pay with the",
            "The banks of {} trade in the",
        ),
    ),
    Relation(
        "language",
        (
            "The official language of {} is",
            "People in {} speak",
            "The language spoken in {} is",
            "The laws of {} are written in",
            "Children in {} learn to read",
        ),
    ),
    Relation(
        "country",
        (
            "The city of {} is the capital of",
            "The capital {} is a city in",
            "Whoever lives in {} lives in",
            "The streets of {} are in",
            "The mayor of {} is from",
        ),
    ),
)


class Countries(FactSource):
    """Capitals, continents, currencies, languages, and the countries of the capitals: about 1,130 facts, five templates each.

    MIT; fetched on first use (109 kB). Of several currencies or languages the first one counts.

    Args:
        path: The package's archive, instead of fetching it.
        relations: Names of those to take, of ``capital``, ``continent``, ``currency``, ``language``, ``country``; default: all.
        limit: Edit so many facts, drawn at random; default: all, which leaves nothing for neighbours.
        paraphrases: Other templates that ask for an edited fact.
        neighbors: Questions about other subjects, at most.
        hold_out: Leave one template of each fact out of the sentences that tell it, and ask for it as the paraphrase.
        generate: Beginnings for texts about the subject, with sentences that the new answer should make them resemble.
        seed: Seed of everything drawn.

    Raises:
        FetchError: If it cannot be fetched; the message names the file to put where.
    """

    terms: ClassVar[str] = "MIT, npm countries-list 3.4.1"

    def __init__(
        self,
        path: str | None = None,
        relations: list[str] | None = None,
        limit: int | None = None,
        paraphrases: int = 2,
        neighbors: int = 5,
        hold_out: bool = False,
        generate: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(relations, limit, paraphrases, neighbors, hold_out, generate, seed)
        self.path = None if path is None else Path(path).expanduser()

    def files(self) -> list[Path]:
        """Return the archive."""
        return [self.path if self.path is not None else fetch(URL, SHA256, NAME)]

    def tables(self) -> FactTables:
        """Read the facts, in the order of the archive."""
        (archive,) = self.files()
        countries, currencies, languages, continents = _read(archive)
        names = [relation.name for relation in RELATIONS]
        facts: dict[tuple[int, str], Fact] = {}
        for country in countries.values():
            name, capital = country["name"], country["capital"]
            found = {
                "capital": capital,
                "continent": continents[country["continent"]],
                "currency": next((currencies[code]["name"] for code in country["currency"] if code in currencies), ""),
                "language": next((languages[code]["name"] for code in country["languages"] if code in languages), ""),
            }
            subjects = [(relation, name, known) for relation, known in found.items()] + [("country", capital, name)]
            for relation, subject, known in subjects:
                if subject and known:
                    number = names.index(relation)
                    facts.setdefault((number, subject), Fact(number, subject, known))
        return FactTables(list(RELATIONS), list(facts.values()))


def _read(archive: Path) -> list[dict[str, Any]]:
    members = ("countries", "currencies", "languages", "continents")
    try:
        with tarfile.open(archive) as package:
            files = [package.extractfile(f"package/{member}.min.json") for member in members]
            return [json.load(file) for file in files if file is not None]
    except (tarfile.TarError, KeyError, OSError) as error:
        raise ValueError(f"{archive} is not the archive of npm countries-list 3.4.1 ({error}); fetch {URL}") from error
