import os
import subprocess
import sys
from pathlib import Path

import pytest

from malleable.argument_checks import COMMANDS, SECTIONS, check_arguments, config_names
from malleable.main import main


def test_mistyped_command_is_reported_without_torch():
    code = "import sys, malleable.main; sys.argv[1:] = ['fot']; sys.modules['torch'] = None; malleable.main.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    assert done.stderr == f"malleable: error: unknown command 'fot' (did you mean fit?); the commands are {', '.join(COMMANDS)}\n"
    assert done.returncode == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_known_keys_are_those_of_the_parser(boring, resolved, command):
    parsed = resolved(command, "--config", "boring.yaml")
    assert parsed.keys() <= set(SECTIONS)


def test_every_known_key_exists_somewhere(boring, resolved):
    keys = set().union(*(resolved(command, "--config", "boring.yaml") for command in ("fit", "validate", "test", "predict")))
    assert keys == set(SECTIONS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tset", "--config", "boring.yaml"], r"unknown command 'tset' \(did you mean test\?\)"),
        (["fit", "--config", "borring.yaml"], "no recipe 'borring.yaml'"),
        (["fit", "--config=boring.yaml", "--trianer.max_epochs", "3"], r"unknown option --trianer\.max_epochs \(did you mean --trainer\?\)"),
        (["fit", "-c", "boring.yaml", "--sede_everything=3"], r"unknown option --sede_everything \(did you mean --seed_everything\?\)"),
    ],
)
def test_typing_error_has_similar_names(boring, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_arguments(words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"modle: x\n", r"own\.yaml has unknown keys: 'modle' \(did you mean model\?\)"),
        (b"model: [\n", r"own\.yaml, line 2, column 1: not YAML"),
        (b"model: \xff\n", r"own\.yaml, line 1, byte 8: not text in UTF-8"),
        (b"- model\n", r"own\.yaml contains a list; a configuration must be a mapping"),
    ],
)
def test_damaged_file_error_contains_file_and_line(content, message):
    Path("own.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_arguments(["fit", "--config", "own.yaml"])


@pytest.mark.parametrize("content", [b"", b"# Nothing yet.\n", b"\xef\xbb\xbftrainer: {max_epochs: 1}\n", b"trainer+: {max_epochs: 1}\n"])
def test_valid_files_are_accepted(content):
    Path("own.yaml").write_bytes(content)
    check_arguments(["fit", "--config", "own.yaml", "--config", '{"model": 1}', "--model.suffix=--x", "--trainer.callbacks+=RunReport"])


def test_config_names_in_all_spellings():
    assert config_names(["--config", "a", "-c", "b", "--config=c", "--other", "d"]) == ["a", "b", "c"]


def test_options_are_not_abbreviated(boring, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "boring.yaml", "--trainer.max_epoch", "3"])
    assert "max_epoch" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["fit"], ["fit", "--config"], ["--print_shtab=bash"]])
def test_missing_options_and_values_are_accepted(words):
    check_arguments(words)
