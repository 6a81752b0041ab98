import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import malleable
from malleable.argument_checks import COMMANDS, PREDICT_OPTIONS, SECTIONS, check_arguments, config_names
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


NO_ROWS = "has no data for prediction: "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "sprec/tiny.yaml"], f"RecommendationDataModule {NO_ROWS}add --data.predict_file FILE, or --data.predict_users all"),
        (["--config=nfe/tiny"], f"KnowledgeGraphDataModule {NO_ROWS}add --data.predict_file FILE"),
        (["-c", "alpha_edit/tiny.yaml", "--data.init_args.seed=1"], f"EditingDataModule {NO_ROWS}use `test`"),
        (["--data", "RecommendationDataModule", "--ckpt_path", "last"], f"RecommendationDataModule {NO_ROWS}add "),
        (["--config", "{data: {class_path: malleable.KnowledgeGraphDataModule}}"], f"KnowledgeGraphDataModule {NO_ROWS}add "),
    ],
)
def test_predict_without_rows_is_reported_without_torch(words, message):
    code = "import sys, malleable.main; sys.modules['torch'] = None; malleable.main.main()"
    done = subprocess.run([sys.executable, "-c", code, "predict", *words], capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    assert done.stderr.startswith(f"malleable: error: {message}"), done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--config", "sprec/tiny.yaml", "--data.predict_users", "all"],
        ["predict", "--config", "sprec/tiny.yaml", "--data.init_args.predict_file=x.csv"],
        ["predict", "--config", "sprec/tiny.yaml", "--config", "{data: {init_args: {predict_users: all}}}"],
        ["predict", "--config", "sprec/tiny.yaml", "--data", "{class_path: RecommendationDataModule, init_args: {predict_users: all}}"],
        ["predict", "--config", "sprec/tiny.yaml", "--data", "mine.RecommendationDataModule"],
        ["predict", "--config", "sprec/tiny.yaml", "--print_config"],
        ["predict", "--config", "sprec/tiny.yaml", "--data.split.help"],
        ["predict", "--config", "sprec/tiny.yaml", "--data.split", "{a: [", "--data.predict_users=all"],
        ["predict", "--data.predict_users"],
        ["test", "--config", "sprec/tiny.yaml"],
    ],
)
def test_predict_with_rows_is_accepted(words):
    check_arguments(words)


def test_the_known_prediction_options_are_those_of_the_data_modules():
    modules = {name: getattr(malleable, name) for name in dir(malleable) if name.endswith("DataModule") and name != "BaseDataModule"}
    found = {name: {key for key in inspect.signature(kind).parameters if key.startswith("predict_")} for name, kind in modules.items()}
    assert found == {name: {option.split()[0] for option in options} for name, options in PREDICT_OPTIONS.items()}
