"""What the README says is true: its commands are there, its recipes exist, and its marked blocks run.

A block runs if ``<!-- run -->`` stands on the line before its fence.
"""

import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from shared import ROOT

import malleable
from malleable.main import main
from malleable.recipes import find_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCK = re.compile(r"^<!-- run -->\n```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, text) for language, text in BLOCK.findall(README)]
METHODS = [
    name
    for name in malleable.__all__
    if inspect.isclass(found := getattr(malleable, name)) and issubclass(found, malleable.BaseModule) and not inspect.isabstract(found)
]
SETTINGS = (
    "callbacks.self_play.phases",
    "lightning_modules.editing.settings",
    "lightning_modules.editing.targets",
    "lightning_modules.functional.editing.null_space",
    "lightning_modules.graphs.nfe",
    "lightning_modules.graphs.settings",
    "lightning_modules.recommendation.sequence_settings",
)
SET_UP = (
    "pip install -c configs/constraints.txt -e . && malleable fit --config sprec/movielens.yaml",
    "pip install -c configs/constraints.txt -e '.[test]' && pytest",
)


@pytest.mark.parametrize("command", SET_UP)
def test_the_set_up_commands_are_there(command):
    assert command in README


def test_a_plug_in_example_is_run():
    assert any(language == "python" and "Trainer(" in text for language, text in BLOCKS)


@pytest.mark.parametrize(("language", "text"), BLOCKS, ids=[f"{language}-{number}" for number, (language, _) in enumerate(BLOCKS)])
def test_a_marked_block_runs(language, text, tmp_path):
    (tmp_path / "block").write_text(text)
    program = [sys.executable, "block"] if language == "python" else ["bash", "-euo", "pipefail", "block"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_row(name):
    rows = [line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line]
    assert rows, f"add a row to the README's table of methods: | `{name}` | paper | recipe | figure |"


def test_the_recipes_that_it_names_exist():
    named = re.findall(r"--config[ =]([\w./-]+\.yaml)", README)
    assert named
    for name in {name for name in named if "/" in name and not name.startswith(("runs/", "configs/"))}:
        find_recipe(name)


PAGES = sorted(path for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / ".github").glob("*.md"), *(ROOT / "configs").rglob("*.md")))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MAX_LINES = 220


def anchors(page):
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not target.startswith("https://") and (not file.exists() or (anchor and anchor not in anchors(file))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    assert not list(broken_links(page))


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](#three) [c](other.md) [d](page.md#one-two)\n```\n[e](in_code.md)\n```\n")
    assert list(broken_links(page)) == ["#three", "other.md"]


def test_it_is_short():
    assert len(README.splitlines()) <= MAX_LINES, "results and options belong on the method pages, configs/<method>/README.md"


METHOD_PAGES = sorted((ROOT / "configs").glob("*/README.md"))
OPTION = re.compile(r"^\| ((?:`\w+\.\w+`(?:, )?)+) \|(.*)\|$", re.MULTILINE)


def defaults(name):
    """Return the default values of the options of a public or a settings class."""
    owners = [malleable, *(import_module(f"malleable.{module}") for module in SETTINGS)]
    kind = next(getattr(owner, name) for owner in owners if hasattr(owner, name))
    factories = {field.name: field.default_factory() for field in fields(kind) if field.default_factory is not MISSING} if is_dataclass(kind) else {}
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()} | factories


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.parent.name)
def test_a_method_page_has_its_options_and_limits(page):
    text = page.read_text(encoding="utf-8")
    assert {"## Options", "## Limits"} <= set(re.findall(r"^## .*$", text, re.MULTILINE))
    rows = OPTION.findall(text)
    assert rows
    for options, rest in rows:
        cells = [cell.strip() for cell in rest.split("|")]
        default = cells[-2]
        for kind, option in re.findall(r"`(\w+)\.(\w+)`", options):
            values = defaults(kind)
            assert option in values, f"{kind} has no option {option}"
            assert default in ("", str(values[option])), f"{kind}.{option} has the default {values[option]}, the page says {default}"


@pytest.mark.parametrize("line", re.findall(r"^malleable (fit .* --trainer\.logger .*)$", README, re.MULTILINE))
def test_commands_with_loggers_are_parsed_without_their_packages(line, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(line), "--print_config"])
    assert ended.value.code == 0, capsys.readouterr().err
    assert f"class_path: lightning.pytorch.loggers.{line.split('--trainer.logger ')[1].split()[0]}\n" in capsys.readouterr().out
