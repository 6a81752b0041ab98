"""Readers of interactions, items, rows of prompts, histories and users."""

import json

from readers.registry import lines, reader, write_table

EVENTS = [{"user_id": f"u{n % 4}", "item_id": f"i{n % 3}", "timestamp": 1000.0 + n, "rating": n % 5 + 1.0} for n in range(12)]
ITEMS = [{"item_id": f"i{n}", "title": f"Film, {n} (1999)", "genres": ["Crime", "Drama"][: n % 3]} for n in range(4)]


def tables(kind: str) -> None:
    @reader(f"tables {kind}", f"events.{kind}", f"items.{kind}")
    class _:
        def make(folder):
            write_table(folder / f"events.{kind}", EVENTS)
            write_table(folder / f"items.{kind}", ITEMS)

        def read(folder):
            from malleable.datamodules.recommendation.splits import Split, prepare
            from malleable.datamodules.sources.recommendation.tables import Tables

            loaded = Tables(str(folder / f"events.{kind}"), str(folder / f"items.{kind}")).load()
            try:
                return prepare(loaded, Split(min_user_events=1))
            except ValueError as error:  # of the filters, which know no file
                if not str(error).startswith("no row remains"):
                    raise


for kind in ("csv", "tsv", "jsonl", "json", "parquet", "csv.gz"):
    tables(kind)


def movielens(name: str, *files: str) -> None:
    @reader(f"movielens {name}", *files)
    class _:
        def make(folder):
            from malleable.datamodules.sources.recommendation.movielens import GENRES_100K

            ratings = "".join(f"{n % 3}\t{n % 2 + 10}\t{n % 5 + 1}\t88125094{n}\n" for n in range(8))
            contents = {
                "u.data": ratings,
                "u.item": "".join(f"{n}|Heat {n} (1995)|01-Jan-1995||http://x|{'|'.join('01'[n % 2] for _ in GENRES_100K)}\n" for n in (10, 11)),
                "ratings.dat": ratings.replace("\t", "::"),
                "movies.dat": "10::Heat (1995)::Action|Comedy\n11::Alien (1979)::unknown\n",
                "a.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ratings,
                "a.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n10\tHeat\t1995\tAction\n11\tAlien\t1979\tX\n",
            }
            for file in files:
                (folder / file).write_text(contents[file])

        def read(folder):
            from malleable.datamodules.sources.recommendation.movielens import MovieLens

            return MovieLens(path=str(folder)).load()


movielens("100k", "u.data", "u.item")
movielens("1m", "ratings.dat", "movies.dat")
movielens("atomic", "a.inter", "a.item")


@reader("instruction rows", "train.json", "test.jsonl", "id2name.json", "name2genre.json", "genre_dict.json")
class _Instruction:
    def make(folder):
        rows = [{"instruction": "x", "input": '"Heat", "Alien"', "output": '"Brazil"'}] * 3
        (folder / "train.json").write_text(json.dumps(rows))
        (folder / "test.jsonl").write_text(lines(rows))
        (folder / "id2name.json").write_text(json.dumps({"0": "Heat", "1": "Alien", "2": "Brazil"}))
        (folder / "name2genre.json").write_text(json.dumps({"Heat": ["Crime"], "Alien": []}))
        (folder / "genre_dict.json").write_text(json.dumps(["Crime"]))

    def read(folder):
        from malleable.datamodules.sources.recommendation.instruction import InstructionRows

        return InstructionRows(str(folder)).load()


@reader("candidate rows", "train.jsonl", "val.json", "id2name.txt")
class _Candidates:
    def make(folder):
        rows = [{"historyList": ["Heat", "Alien"], "itemList": ["Brazil", "Dune"], "trueSelection": "Dune"}, {"history": [0, 1], "next": 2}]
        (folder / "train.jsonl").write_text(lines(rows))
        (folder / "val.json").write_text(json.dumps(rows))
        (folder / "id2name.txt").write_text("0::Heat\n1::Alien\n2::Brazil\n3::Dune\n")

    def read(folder):
        from malleable.datamodules.sources.recommendation.candidates import CandidateRows

        return CandidateRows(str(folder)).load()


def histories(name: str, text: str) -> None:
    @reader(f"histories {name}", f"h.{name}")
    class _:
        def make(folder):
            (folder / f"h.{name}").write_text(text)

        def read(folder):
            from malleable.datamodules.recommendation.histories import ItemLookup, read_histories

            return read_histories(folder / f"h.{name}", ItemLookup(["Heat (1995)", "Alien (1979)", "Dune"], [["1"], ["2"], ["3"]]))


histories("csv", "user_id,item_id\nu1,1,2\nu2,3\n")
histories("jsonl", lines([[1, 2], {"user_id": "u", "history": ["Heat", {"id": 3}]}]))
histories("json", json.dumps([[1, 2], {"user_id": "u", "history": ["Heat", {"title": "Dune"}]}]))


def users(kind: str, text: str) -> None:
    @reader(f"users {kind}", f"u.{kind}")
    class _:
        def make(folder):
            (folder / f"u.{kind}").write_text(text)

        def read(folder):
            from malleable.datamodules.recommendation.histories import read_users

            return read_users(folder / f"u.{kind}", {"u1", "u2", "7"})


users("csv", "name,user_id\nAnna,u1\nTom,u2\nIda,u9\n")
users("tsv", "u1\tAnna\nu2\tTom\n")
users("txt", "u1\n\nu2\n")
users("jsonl", lines(["u1", {"user_id": "u2"}, 7]))
users("json", json.dumps(["u1", {"user_id": "u2"}, 7]))
