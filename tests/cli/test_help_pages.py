import re
import subprocess
import sys

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule

import malleable
from malleable.argument_checks import COMMANDS, TRAINER_COMMANDS
from malleable.help_pages import CALLBACKS, DATA, HELP, MODELS, command_help
from malleable.main import main


def public(kind):
    classes = [value for name in malleable.__all__ if isinstance(value := getattr(malleable, name), type) and issubclass(value, kind)]
    return {value.__name__ for value in classes}


def test_all_commands_are_in_the_help():
    assert all(f"\n  {command} " in HELP for command in COMMANDS)


@pytest.mark.parametrize(
    ("listed", "kind", "bases"),
    [
        (MODELS, LightningModule, {"BaseModule", "LanguageModel", "Baseline"}),
        (DATA, LightningDataModule, {"BaseDataModule"}),
        (CALLBACKS, Callback, {"PostFitEdit"}),
    ],
)
def test_every_public_class_is_listed(listed, kind, bases):
    assert set(listed) == public(kind) - bases


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_command_help_does_not_import_torch(command, flag):
    code = f"import sys, malleable.main; sys.modules['torch'] = None; malleable.main.main([{command!r}, {flag!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, command_help(command), "")
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_the_options_of_the_page_exist(resolved):
    examples = re.findall(r"^  (--(?:trainer|data|model|checkpoint)\.\S+) (\S+) ", command_help("fit"), re.MULTILINE)
    assert len(examples) == 6
    (of_callback,) = ([name, value] for name, value in examples if "callbacks" in name)
    assert any("SelfPlayLoop" in each["class_path"] for each in resolved("fit", "--config", "sprec/tiny.yaml", *of_callback)["trainer"]["callbacks"])
    options = [word.replace("FILE", "graph.csv") for name, value in examples if name not in of_callback for word in (name, value)]
    config = resolved("fit", "--config", "nfe/tiny.yaml", "--data.source", "Triples", *options)
    assert config["model"]["init_args"]["tuning"]["lr"] == 1e-4
    assert config["data"]["init_args"]["source"]["init_args"]["path"] == "graph.csv"


def test_all_options_can_be_listed(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help", "all"])
    text = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in text
    assert "--checkpoint.monitor" in text
