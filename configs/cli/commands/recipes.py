"""Command ``malleable recipes``: list, print and copy the packaged recipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from malleable.recipes import find_recipe, recipe_names, summary


def run_recipes(argv: Sequence[str]) -> None:
    """Run ``malleable recipes [show NAME | copy NAME [FILE]]``.

    Args:
        argv: Arguments after ``recipes``. Without arguments, all recipes are listed. ``show`` prints a recipe, ``copy`` copies it to a file. By
            default, the file is in the working directory.

    Raises:
        ValueError: If there are other arguments.
        FileNotFoundError: If the recipe does not exist.
        FileExistsError: If the file to write already exists.
    """
    match list(argv):
        case []:
            names = recipe_names()
            width = max(map(len, names), default=0)
            sys.stdout.writelines(f"{name:<{width}}  {summary(name)}\n" for name in names)
        case ["show", name]:
            sys.stdout.write(find_recipe(name).read_text(encoding="utf-8"))
        case ["copy", name, *target] if len(target) <= 1:
            source = find_recipe(name)
            file = Path(target[0] if target else source.name)
            if file.is_dir():
                file = file / source.name
            if file.exists():
                raise FileExistsError(f"{file} exists; give another name: malleable recipes copy {name} FILE")
            file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
            sys.stdout.write(f"copied {source} to {file}; run it with: malleable fit --config {file}\n")
        case _:
            raise ValueError(f"malleable recipes {' '.join(argv)}: expected no arguments, `show NAME` or `copy NAME [FILE]`")
