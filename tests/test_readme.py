"""What the README says is true: its commands are there, its recipes exist, and its marked blocks run.

A block runs if ``<!-- run -->`` stands on the line before its fence.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shared import ROOT

import malleable
from malleable.recipes import find_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCK = re.compile(r"^<!-- run -->\n```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, text) for language, text in BLOCK.findall(README)]
METHODS = [
    name
    for name in malleable.__all__
    if inspect.isclass(found := getattr(malleable, name)) and issubclass(found, malleable.BaseModule) and not inspect.isabstract(found)
]
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


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
