"""Sources of two small tables in CSV, one of which a test writes."""

from pathlib import Path

from malleable.datamodules.sources.recommendation.tables import Tables

EVENTS_HEAD = "user_id,item_id,timestamp,rating"


def events_csv(tmp_path: Path, text: str, **options) -> Tables:
    (tmp_path / "events.csv").write_text(text)
    (tmp_path / "items.csv").write_text("item_id,title\na,Heat\nb,Alien\n")
    return Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"), **options)


def items_csv(tmp_path: Path, text: str, **options) -> Tables:
    source = events_csv(tmp_path, "user_id,item_id,timestamp\nu,a,1\n", **options)
    (tmp_path / "items.csv").write_text(text)
    return source
