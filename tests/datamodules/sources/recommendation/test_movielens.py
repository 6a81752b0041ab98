import zipfile
from pathlib import Path

import pytest
from shared import shared_data

from malleable.datamodules.files.fetch import FetchError
from malleable.datamodules.sources.recommendation import movielens as module
from malleable.datamodules.sources.recommendation.movielens import MovieLens

RATINGS = "1\t10\t5\t881250949\n2\t20\t3\t891717742\n"
FLAGS = {"Action": 1, "Comedy": 5}
ITEMS_100K = "10|Heat (1995)|01-Jan-1995||http://x|{}\n20|Misérables, Les (1995)|01-Jan-1995||http://y|{}\n".format(
    "|".join("1" if genre in FLAGS else "0" for genre in module.GENRES_100K),
    "|".join("1" if genre == "unknown" else "0" for genre in module.GENRES_100K),
)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The same two ratings in the three forms."""
    files = {
        "100k": {"u.data": RATINGS, "u.item": ITEMS_100K},
        "1m": {"ratings.dat": RATINGS.replace("\t", "::"), "movies.dat": "10::Heat (1995)::Action|Comedy\n20::Misérables, Les (1995)::unknown\n"},
        "atomic": {
            "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + RATINGS,
            "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "10\tHeat\t1995\tAction Comedy\n20\tMisérables, Les\t1995\tunknown\n",
        },
    }
    for form, contents in files.items():
        (tmp_path / form).mkdir()
        for name, text in contents.items():
            (tmp_path / form / name).write_bytes(text.encode("utf-8" if form == "atomic" else "latin-1"))
    return {form: tmp_path / form for form in files}


@pytest.mark.parametrize("form", ["100k", "1m", "atomic"])
def test_the_three_formats_give_the_same_tables(folders, form):
    tables = MovieLens(path=str(folders[form])).load()
    assert tables.interactions.to_dict("list") == {
        "user_id": ["1", "2"],
        "item_id": ["10", "20"],
        "timestamp": [881250949.0, 891717742.0],
        "rating": [5.0, 3.0],
    }
    assert tables.items.to_dict("list") == {
        "item_id": ["10", "20"],
        "title": ["Heat (1995)", "Misérables, Les (1995)"],
        "genres": [("Action", "Comedy"), ()],
    }


def test_ids_are_not_changed(folders):
    ids = ["007", "NA", "1.0", '"a']
    (folders["100k"] / "u.data").write_text("".join(f"{key}\t{key}\t5\t1\n" for key in ids))
    tables = MovieLens(path=str(folders["100k"])).load()
    assert tables.interactions["user_id"].tolist() == tables.interactions["item_id"].tolist() == ids


def test_an_archive_is_read(folders, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        for path in folders["1m"].iterdir():
            archive.write(path, f"ml-1m/{path.name}")
        archive.writestr("ml-1m/README", "terms")
    monkeypatch.setattr(module, "fetch", lambda *_: tmp_path / "ml-1m.zip")
    assert len(MovieLens("1m").load().interactions) == 2


def test_100k_uses_the_package_if_the_download_fails(folders, monkeypatch):
    def refuse(*_: object) -> Path:
        raise FetchError("no network")

    monkeypatch.setattr(module, "fetch", refuse)
    monkeypatch.setattr(module, "fetch_package_files", lambda *_: sorted(folders["atomic"].iterdir()))
    assert len(MovieLens().load().interactions) == 2
    with pytest.raises(FetchError, match="no network"):
        MovieLens("1m").load()


def test_the_error_without_network_contains_both_remedies(monkeypatch):
    def refuse(name: object, *_: object) -> Path:
        raise FetchError(f"cannot download {name}; put it at there")

    monkeypatch.setattr(module, "fetch", refuse)
    monkeypatch.setattr(module, "fetch_package_files", refuse)
    with pytest.raises(FetchError, match=r"ml-100k.zip; put it at there\ncannot download recbole==1.2.1.*\nor give a folder with u.data"):
        MovieLens().files()


def test_a_folder_without_the_files_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contains no MovieLens files; expected u.data and u.item"):
        MovieLens(path=str(tmp_path)).files()


def test_the_terms_are_logged_once(folders, caplog):
    module._log_terms.cache_clear()
    for _ in range(2):
        MovieLens(path=str(folders["1m"])).files()
    assert caplog.text.count("research use only") == 1


def test_counts_of_the_published_files():
    tables = MovieLens(path=str(shared_data("rec/ml100k"))).load()
    assert len(tables.interactions) == 100_000
    assert (tables.interactions["rating"] >= 4).sum() == 55_375
    assert tables.interactions["user_id"].nunique() == 943
    assert len(tables.items) == 1682
    assert tables.items["title"].nunique() == 1664
    assert len({genre for genres in tables.items["genres"] for genre in genres}) == 18


@pytest.mark.parametrize(
    ("form", "name", "change", "message"),
    [
        ("100k", "u.data", ("\t881250949", ""), r"u.data, line 1: 3 fields, expected 4"),
        ("100k", "u.data", ("881250949", "inf"), r"u.data, line 1, field timestamp: 'inf' is not a finite number"),
        ("1m", "ratings.dat", ("::3::", "::good::"), r"ratings.dat, line 2, field rating: 'good' is not a finite number"),
        ("1m", "movies.dat", ("::unknown", ""), r"movies.dat, line 2: 2 fields, expected 3"),
        ("100k", "u.item", ("|1|", "|"), r"u.item, line 1: 23 fields, expected 24"),
        ("atomic", "ml-100k.inter", ("user_id:token\titem_id:token\trating:float\ttimestamp:float\n", ""), r"inter, line 1: expected the names"),
    ],
)
def test_malformed_lines_are_an_error(folders, form, name, change, message):
    path = folders[form] / name
    path.write_text(path.read_text("latin-1").replace(*change, 1), "latin-1")
    with pytest.raises(ValueError, match=message):
        MovieLens(path=str(folders[form])).load()
