import json
import signal

import pytest
from interrupted_commands import CASES, FIRST, QUIET
from launch import HELPERS, launch

from malleable.interruption import command_line, interrupting_signal

START = " ".join(["malleable", "{} --config boring.yaml", *QUIET])
MESSAGES = {
    "options": f"interrupted while reading the options; nothing was saved; to start again, run: {START}",
    "data": f"interrupted while preparing the data; nothing was saved; to start again, run: {START}",
    "data, terminated": f"interrupted while preparing the data; nothing was saved; to start again, run: {START}",
    "background": f"interrupted while preparing the data; nothing was saved; to start again, run: {START}",
    "model": f"interrupted while building the model; nothing was saved; to start again, run: {START}",
    "resumed": f"interrupted while reading the checkpoint; nothing was saved; to resume, run: {START} --trainer.max_epochs 2 --ckpt_path {FIRST}",
    "ignored": f"interrupted while running `fit`; nothing was saved; to resume, run: {START} --trainer.max_epochs 2 --ckpt_path {FIRST}",
    "first step": f"interrupted in epoch 0 after step 1; to resume, run: {START} --ckpt_path runs/boring/version_1/checkpoints/last.ckpt",
    "resumed step": f"interrupted in epoch 1 after step 5; to resume, run: {START} --trainer.max_epochs 2 --ckpt_path "
    "runs/boring/version_2/checkpoints/last.ckpt",
    "tested after fit": "interrupted while running `fit`; the last checkpoint is runs/boring/version_3/checkpoints/last.ckpt; to resume, run: "
    f"{START} --test_after_fit --ckpt_path runs/boring/version_3/checkpoints/last.ckpt",
    "validate": f"interrupted while running `validate`; nothing was saved; to start again, run: {START} --ckpt_path {FIRST}",
    "test": f"interrupted while running `test`; nothing was saved; to start again, run: {START} --ckpt_path {FIRST}",
    "predict": f"interrupted while running `predict`; nothing was saved; to start again, run: {START} --ckpt_path {FIRST}",
}


@pytest.mark.slow(minutes=1)
def test_a_signal_ends_a_command_with_one_message(boring):
    launch([HELPERS / "interrupted_commands.py"], ranks=1, cwd=boring, timeout_s=600)
    ended = json.loads((boring / "ended.json").read_text())
    assert ended.keys() == CASES.keys() == {"whole", *MESSAGES}
    assert ended["whole"][0] == 0, ended["whole"][1]
    for case, message in MESSAGES.items():
        (command, *_), number, *_ = CASES[case]
        status, text = ended[case]
        assert status == 128 + number, (case, text)
        assert text.splitlines()[-1] == message.format(command), (case, text)
        assert text.count("interrupted ") == 1, text
        assert "KeyboardInterrupt, attempting" not in text
        if case != "ignored":  # Python reports the exception in the destructor
            assert "Traceback" not in text, text


def test_the_checkpoint_of_a_command_is_replaced():
    given = ["fit", "--ckpt_path", "a b.ckpt", "--config", "x.yaml", "--ckpt_path=c"]
    assert command_line(given) == "malleable fit --config x.yaml"
    assert command_line(given, "d e.ckpt") == "malleable fit --config x.yaml --ckpt_path 'd e.ckpt'"


def lightnings() -> SystemExit:
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904  (as Lightning does)
    except SystemExit as error:
        return error


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (KeyboardInterrupt(), signal.SIGINT),
        (lightnings(), signal.SIGINT),
        (SystemExit(143), signal.SIGTERM),
        (SystemExit(1), None),
        (SystemExit(), None),
        (ValueError(), None),
    ],
)
def test_signal_of_an_exception(error, number):
    assert interrupting_signal(error) == number
