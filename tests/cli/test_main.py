import gzip
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import zipfile

import pyarrow
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelSummary
from safetensors import SafetensorError

import malleable
from malleable.main import main

HEAVY = ("torch", "lightning", "jsonargparse", "transformers", "pandas")


def python(*arguments, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_contains_every_command(capsys, words):
    main(words)
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("fit", "validate", "test", "predict", "recipes", "patch"))


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"malleable {malleable.__version__}\n"


@pytest.mark.parametrize("command", ["--help", "recipes"])
def test_light_commands_do_not_import_torch(command):
    code = f"import sys; from malleable.main import main; main([{command!r}]); sys.exit(' '.join({HEAVY!r} & sys.modules.keys()) or 0)"
    done = python("-c", code.replace(f"{HEAVY!r}", f"set({HEAVY!r})"))
    assert done.returncode == 0, done.stderr


def test_python_m_malleable():
    done = python("-m", "malleable", "recipes")
    assert (done.returncode, done.stderr) == (0, "")


def test_classes_in_the_working_directory_are_found_by_path(boring):
    # Run as a module, the defining file must not be loaded a second time under another name (pitfall B1).
    (boring / "mine.py").write_text("from boring import BoringModule\n\n\nclass Mine(BoringModule):\n    pass\n")
    words = ["fit", "--config", "boring.yaml", "--model", "mine.Mine", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    done = python("-m", "malleable", *words, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr


def test_error_of_this_package_is_printed_as_one_message(monkeypatch, boring, capsys):
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "nothing.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("malleable: error: no recipe 'nothing.yaml'")
    assert "Traceback" not in text


def test_constructor_error_is_printed_as_one_message(monkeypatch, boring, capsys):
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "boring.yaml", "--data.batch_size", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "malleable: error: batch_size must be >= 1, got 0\n" in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch, boring):
    monkeypatch.setenv("MALLEABLE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "nothing.yaml"])
    with pytest.raises(FileNotFoundError, match="no recipe"):
        main()


def test_bug_is_shown_with_its_traceback(monkeypatch, boring):
    # The module is not of this package: its ValueError is not known to be meant for the reader.
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "boring.yaml", "--model.width", "0"])
    with pytest.raises(ValueError, match="width must be >= 1"):
        main()


def test_called_from_python_errors_are_raised():
    with pytest.raises(FileNotFoundError, match="no recipe"):
        main(["fit", "--config", "nothing.yaml"])


def test_an_unknown_option_is_named(boring, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "boring.yaml", "--model.goall", "1"])
    text = capsys.readouterr().err
    assert ended.value.code == 2
    assert "error: --model.goall: BoringModule has no option 'goall' (did you mean goal?); its options are " in text
    assert text.count("\n") <= 3


def test_only_the_first_process_logs_messages(capsys, monkeypatch):
    log = logging.getLogger("malleable.some.where")
    for rank, expected in (("0", "a message\na warning\n"), ("1", "a warning\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("malleable.main._run", lambda words: (log.info("a message"), log.warning("a warning")))
        main([])
        assert capsys.readouterr().err == expected
    log.info("no longer shown")
    assert capsys.readouterr().err == ""


def test_advertisements_of_libraries_are_suppressed(monkeypatch):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    shown = []
    monkeypatch.setattr(logger, "handle", lambda record: shown.append(record.msg) if logger.filter(record) else None)
    tip, added = "Tip: try installing [litlogger]", "Trainer already configured with model summary callbacks"
    monkeypatch.setattr("malleable.main._run", lambda words: (logger.warning(tip), logger.warning(added), logger.warning("no tip")))
    main([])
    logger.warning(tip)
    assert shown == ["no tip", tip]


def test_the_summary_has_no_line_of_unknown_flops(monkeypatch, caplog):
    def summarize(words):
        ModelSummary.summarize([("Name", ["layer"]), ("FLOPs", ["0"])], 10, 10, 0.1, {"train": 1, "eval": 0}, 0)

    monkeypatch.setattr("malleable.main._run", summarize)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        main([])
        assert caplog.messages[-1].splitlines()[-1].endswith("Modules in eval mode")
        summarize([])
        assert caplog.messages[-1].splitlines()[-1].split() == ["0", "Total", "Flops"]


def test_libraries_show_progress_bars_on_terminals_only(monkeypatch):
    shown = []
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr("malleable.main._run", lambda words: shown.append(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")))
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        main([])
    assert shown == [None, "1"]
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("TensorBoardLogger", "tensorboard")])
def test_a_logger_without_its_package_is_one_message(monkeypatch, boring, capsys, logger, package):
    monkeypatch.setattr("malleable.cli.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "boring.yaml", "--trainer.logger", logger, "--trainer.logger.save_dir", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    text = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert text == f"malleable: error: {logger} needs the package {package}, which is not installed: pip install {package}"


def raising(error):
    def fail(words):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/x/runs"), "/x/runs: permission denied: change the permissions, or give another path"),
        (OSError(28, "No space left on device"), "the disk is full: free some space, or write elsewhere"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), "a.csv: the file or folder does not exist"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a file is damaged, or not text"),
        (zipfile.BadZipFile("File is not a zip file"), "a file is damaged, or not zip"),
        (gzip.BadGzipFile("Not a gzipped file"), "a file is damaged, or not gzip"),
        (pickle.UnpicklingError("x"), "a file is damaged, or not a checkpoint of plain data"),
        (json.JSONDecodeError("Expecting value", "", 0), "a file is damaged, or not JSON"),
        (yaml.YAMLError("x"), "a file is damaged, or not YAML"),
        (pyarrow.ArrowInvalid("x"), "a file is damaged, or not Arrow or Parquet"),
        (SafetensorError("x"), "a file is damaged, or not safetensors"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory on the device (CUDA out of memory.): lower data.batch_size"),
    ],
)
def test_errors_of_the_system_and_of_parsers_are_one_message(monkeypatch, capsys, error, message):
    monkeypatch.setattr("malleable.main._run", raising(error))
    monkeypatch.setattr(sys, "argv", ["malleable", "fit"])
    with pytest.raises(SystemExit) as ended:
        main()
    text = capsys.readouterr().err
    assert (ended.value.code, text.count("\n")) == (1, 1)
    assert text.startswith(f"malleable: error: {message}")
    monkeypatch.setenv("MALLEABLE_DEBUG", "1")
    with pytest.raises(type(error)):
        main()


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AttributeError("x"), IndexError("x"), AssertionError("x"), RecursionError("x")])
def test_programming_errors_are_shown_with_their_traceback(monkeypatch, error):
    monkeypatch.setattr("malleable.main._run", raising(error))
    monkeypatch.setattr(sys, "argv", ["malleable", "fit"])
    with pytest.raises(type(error)):
        main()


def test_a_run_folder_that_cannot_be_written_is_one_message(monkeypatch, boring, capsys):
    (boring / "runs").write_text("a file in the place of the folder")
    words = ["--trainer.fast_dev_run", "false", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "boring.yaml", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "runs" in capsys.readouterr().err.splitlines()[-1]


def test_a_segmentation_fault_is_reported():
    code = "import ctypes, sys; from malleable.main import main; sys.argv = ['malleable', '--version']; main(); ctypes.string_at(0)"
    done = python("-c", code)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_closed_output_pipe_is_not_an_error():
    command = f"{sys.executable} -c 'from malleable.main import main; main()' recipes | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
