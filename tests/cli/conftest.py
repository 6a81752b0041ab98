import pytest
import yaml

from malleable.main import main

CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
QUIET = [*CPU, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]

BORING = """\
# The smallest run.
model:
  class_path: boring.BoringModule
  init_args:
    goal: 2.0
data:
  class_path: boring.BoringDataModule
trainer:
  max_epochs: 1
  num_sanity_val_steps: 0
"""


@pytest.fixture
def boring(tmp_path):
    """A recipe ``boring.yaml`` in the working directory."""
    (tmp_path / "boring.yaml").write_text(BORING)
    return tmp_path


@pytest.fixture
def run(boring):
    """Run a command on that recipe, quietly on one CPU process, and return the command line object."""
    from malleable.cli import run

    def command(name, *words):
        return run([name, "--config", "boring.yaml", *QUIET, *map(str, words)])

    return command


@pytest.fixture
def resolved(capsys):
    """Return the configuration that a command line comes to."""

    def command(name, *words):
        with pytest.raises(SystemExit) as ended:
            main([name, *map(str, words), "--print_config"])
        assert ended.value.code == 0, capsys.readouterr().err
        return yaml.safe_load(capsys.readouterr().out)

    return command
