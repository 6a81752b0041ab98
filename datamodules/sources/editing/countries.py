"""Facts about countries and territories, in ``countries.csv`` beside this file.

Origin: npm ``countries-list`` 3.4.1 (https://github.com/annexare/Countries), with 252 entries. The table contains the English names of
country, capital, continent, first currency and first language. The licence:

The MIT License (MIT). Copyright (c) 2014 Annexare Studio. Permission is hereby granted, free of charge, to any person obtaining a copy of this
software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions: The above copyright notice and this permission notice shall be included in all copies
or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from malleable.datamodules.files.table_files import read_table
from malleable.datamodules.sources.editing.facts import FactSource, FactTables, Relation, Triple

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
    """Capitals, continents, currencies and languages of countries, and the countries of capitals: about 1,130 facts with five templates each.

    The table is part of this package. Your own table must be a CSV file with the columns ``country``, ``capital``, ``continent``, ``currency`` and
    ``language``.
    """

    packaged: ClassVar[Path | None] = Path(__file__).with_name("countries.csv")

    def tables(self) -> FactTables:
        """Read the facts, in the order of the table.

        Raises:
            FileNotFoundError: If the table does not exist.
            ValueError: If a column is missing.
        """
        names = [relation.name for relation in RELATIONS]
        facts: dict[tuple[int, str], Triple] = {}
        header, _, columns = read_table(self.path, ",")
        table = dict(zip(header, columns, strict=True))
        needed = {"country", "capital", "continent", "currency", "language"}
        if missing := needed - table.keys():
            raise ValueError(f"{self.path} has no column {', '.join(sorted(missing))}; it needs {', '.join(sorted(needed))}")
        for row in (dict(zip(header, cells, strict=True)) for cells in zip(*columns, strict=True)):
            facts_of_country = [(relation, row["country"], row[relation]) for relation in ("capital", "continent", "currency", "language")]
            for relation, subject, object_ in [*facts_of_country, ("country", row["capital"], row["country"])]:
                if subject and object_:
                    number = names.index(relation)
                    facts.setdefault((number, subject), Triple(number, subject, object_))
        return FactTables(list(RELATIONS), list(facts.values()))
