"""Tables of a small shop on disk, in variants that a model trained on the first meets later, and its data module."""

from pathlib import Path
from typing import Any

from malleable.datamodules import Tables
from malleable.datamodules.recommendation.datamodule import RecommendationDataModule
from malleable.datamodules.recommendation.splits import Split

COLOURS, PLACES = ("Silver", "Broken", "Golden", "Hollow"), ("River", "Garden", "Winter")
TITLES = {f"f{number}": f"The {colour} {place}" for number, (colour, place) in enumerate((c, p) for c in COLOURS for p in PLACES)}


def events(users: int = 16) -> list[tuple[str, str]]:
    """User and item in order of time: each user reads six items in a row."""
    keys = list(TITLES)
    return [(f"u{user}", keys[(user + step) % len(keys)]) for user in range(users) for step in range(6)]


def write(folder: Path, items: dict[str, str] | None = None, rows: list[tuple[str, str]] | None = None) -> Tables:
    """Write the shop's tables."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key},{title}\n" for key, title in (items or TITLES).items()]
    (folder / "items.csv").write_text("item_id,title\n" + "".join(lines))
    ordered = [f"{user},{item},{time}\n" for time, (user, item) in enumerate(rows or events())]
    (folder / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(ordered))
    return Tables(str(folder / "events.csv"), str(folder / "items.csv"))


def shop(folder: Path, items: dict[str, str] | None = None, rows: list[tuple[str, str]] | None = None, **options: Any) -> RecommendationDataModule:
    """The data module of a shop."""
    return RecommendationDataModule(write(folder, items, rows), **{"vocab_size": 300, "batch_size": 16, "split": Split(history_length=3), **options})


def reordered(folder: Path, **options: Any) -> RecommendationDataModule:
    """The same shop, its items listed in another order."""
    return shop(folder, dict(reversed(TITLES.items())), **options)


def more_users(folder: Path, **options: Any) -> RecommendationDataModule:
    """The same items with four more users, who like what is rarely liked."""
    keys = list(TITLES)
    return shop(
        folder, rows=events() + [(f"new{user}", keys[(5 * user + 7 * step) % len(keys)]) for user in range(4) for step in range(6)], **options
    )


def more_items(folder: Path, **options: Any) -> RecommendationDataModule:
    """The same shop with two new items, listed first."""
    new = {"n1": "A Quiet Mirror", "n2": "A Quiet Harbor"}
    return shop(folder, new | TITLES, events() + [(f"u{user}", "n1") for user in range(8)], **options)


def fewer_items(folder: Path, **options: Any) -> RecommendationDataModule:
    """The shop without its second item."""
    return shop(folder, {key: title for key, title in TITLES.items() if key != "f1"}, [row for row in events() if row[1] != "f1"], **options)
