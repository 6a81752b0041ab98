import logging
import os
import subprocess
import sys

import pytest

import malleable
from malleable.main import main

HEAVY = ("torch", "lightning", "jsonargparse", "transformers", "pandas")


def python(*arguments, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_names_every_command(capsys, words):
    main(words)
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("fit", "validate", "test", "predict", "recipes", "patch"))


def test_the_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"malleable {malleable.__version__}\n"


@pytest.mark.parametrize("command", ["--help", "recipes"])
def test_light_commands_import_nothing_heavy(command):
    code = f"import sys; from malleable.main import main; main([{command!r}]); sys.exit(' '.join({HEAVY!r} & sys.modules.keys()) or 0)"
    done = python("-c", code.replace(f"{HEAVY!r}", f"set({HEAVY!r})"))
    assert done.returncode == 0, done.stderr


def test_the_module_runs_too():
    done = python("-m", "malleable", "recipes")
    assert (done.returncode, done.stderr) == (0, "")


def test_classes_in_the_working_directory_are_found_by_path(boring):
    # Run as a module, the defining file must not be loaded a second time under another name (pitfall B1).
    (boring / "mine.py").write_text("from boring import BoringModule\n\n\nclass Mine(BoringModule):\n    pass\n")
    words = ["fit", "--config", "boring.yaml", "--model", "mine.Mine", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    done = python("-m", "malleable", *words, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr


def test_an_error_of_ours_is_one_message(monkeypatch, boring, capsys):
    monkeypatch.setattr(sys, "argv", ["malleable", "fit", "--config", "nothing.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("malleable: error: no recipe 'nothing.yaml'")
    assert "Traceback" not in text


def test_a_value_a_class_refuses_is_one_message(monkeypatch, boring, capsys):
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


def test_a_bug_keeps_its_traceback(monkeypatch, boring):
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


def test_messages_reach_the_reader_of_the_first_process_only(capsys, monkeypatch):
    log = logging.getLogger("malleable.some.where")
    for rank, expected in (("0", "a message\na warning\n"), ("1", "a warning\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("malleable.main._run", lambda words: (log.info("a message"), log.warning("a warning")))
        main([])
        assert capsys.readouterr().err == expected
    log.info("no longer shown")
    assert capsys.readouterr().err == ""


def test_advertisements_of_libraries_are_left_out(monkeypatch):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    shown = []
    monkeypatch.setattr(logger, "handle", lambda record: shown.append(record.msg) if logger.filter(record) else None)
    tip = "Tip: try installing [litlogger]"
    monkeypatch.setattr("malleable.main._run", lambda words: (logger.warning(tip), logger.warning("no tip")))
    main([])
    logger.warning(tip)
    assert shown == ["no tip", tip]
