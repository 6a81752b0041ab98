"""Search for recipes by name: ``sprec/movielens.yaml`` is searched in the working directory, then in the package."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files("malleable.configs")))


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, without the fragments in ``base/``."""
    return sorted(name for name in _packaged() if not name.startswith("base/"))


def summary(name: str) -> str:
    """Return the first comment line of a recipe."""
    first = (FOLDER / name).read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()


def find_recipe(name: str) -> Path:
    """Return the file of a recipe or fragment.

    Args:
        name: A path, or the name of a packaged recipe with or without ``.yaml``.

    Raises:
        FileNotFoundError: If the file does not exist. The message contains similar names.
    """
    for path in (Path(name), FOLDER / name, FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    matches = get_close_matches(name.removesuffix(".yaml"), [known.removesuffix(".yaml") for known in _packaged()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'{match}.yaml' for match in matches)}? " if matches else ""
    raise FileNotFoundError(f"no recipe {name!r} in {Path.cwd()} or in the package; {hint}`malleable recipes` lists all")


def recipe_name(path: Path) -> str | None:
    """Return the name of the run folders of a configuration file; ``None`` for a fragment such as ``base/ddp.yaml``."""
    path = path.resolve()
    for folder in (FOLDER.resolve(), Path.cwd()):
        if path.is_relative_to(folder):
            name = path.relative_to(folder).with_suffix("").as_posix()
            return None if name.startswith("base/") else name
    return path.stem


def similar(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Return a hint with known names that are similar to ``name``, each with ``prefix``; empty if there are none."""
    matches = get_close_matches(name, known, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(prefix + match for match in matches)}?)" if matches else ""


def _packaged() -> list[str]:
    return [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml")]
