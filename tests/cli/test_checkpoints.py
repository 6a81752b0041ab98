import os

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from malleable.checkpoints import differences, find_checkpoint, stored_model


def touch(path, time=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    os.utime(path, (time, time))
    return path


def test_last_is_the_latest_of_all_runs(tmp_path):
    touch(tmp_path / "version_0" / "checkpoints" / "last.ckpt", time=10)
    latest = touch(tmp_path / "version_1" / "checkpoints" / "last-v1.ckpt", time=30)
    touch(tmp_path / "version_1" / "checkpoints" / "last.ckpt", time=20)
    touch(tmp_path / "version_1" / "checkpoints" / "epoch=9.ckpt", time=40)
    assert find_checkpoint("last", tmp_path) == str(latest)
    edited = touch(tmp_path / "version_1" / "checkpoints" / "edited.ckpt", time=35)
    assert find_checkpoint("last", tmp_path) == str(edited)


def test_a_link_is_the_checkpoint_it_leads_to(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    touch(folder / "epoch=3.ckpt", time=30)
    touch(tmp_path / "version_1" / "checkpoints" / "last.ckpt", time=20)
    (folder / "last.ckpt").symlink_to("epoch=3.ckpt")
    assert find_checkpoint("last", tmp_path) == str(folder / "last.ckpt")


def test_a_link_to_nowhere_stands_for_the_newest_checkpoint_beside_it(tmp_path):
    """A run was killed after it removed the old checkpoint, before the link led to the new one."""
    folder = tmp_path / "version_0" / "checkpoints"
    touch(folder / "epoch=3.ckpt", time=30)
    newest = touch(folder / "epoch=4.ckpt", time=40)
    (folder / "last.ckpt").symlink_to("epoch=2.ckpt")
    assert find_checkpoint("last", tmp_path) == str(newest)
    for path in (newest, folder / "epoch=3.ckpt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no last checkpoint under"):
        find_checkpoint("last", tmp_path)


def test_a_run_killed_while_last_was_replaced_is_found_by_its_epochs(tmp_path):
    touch(tmp_path / "version_0/checkpoints/last.ckpt", time=10)
    newest = touch(tmp_path / "version_1/checkpoints/epoch=4.ckpt", time=40)
    touch(tmp_path / "version_1/checkpoints/epoch=3.ckpt", time=30)
    assert find_checkpoint("last", tmp_path) == str(newest)


def test_last_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no last checkpoint under"):
        find_checkpoint("last", tmp_path)


def test_best_outside_its_run(tmp_path):
    with pytest.raises(MisconfigurationException, match="`best` is known only to the run itself"):
        find_checkpoint("best", tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint nowhere\.ckpt"):
        find_checkpoint("nowhere.ckpt", tmp_path)


def test_addresses_and_files_are_left_alone(tmp_path):
    file = str(touch(tmp_path / "a.ckpt"))
    assert find_checkpoint(file, tmp_path) == file
    assert find_checkpoint("s3://bucket/a.ckpt", tmp_path) == "s3://bucket/a.ckpt"


def test_the_model_stored_in_a_file(tmp_path):
    torch.save({"hyper_parameters": {"_class_path": "a.B", "_instantiator": "x", "goal": 2.0}}, tmp_path / "a.ckpt")
    assert stored_model(str(tmp_path / "a.ckpt")) == {"class_path": "a.B", "init_args": {"goal": 2.0}}


@pytest.mark.parametrize("folder", ["checkpoints/a.ckpt", "a.ckpt"])
def test_a_folder_tells_through_the_configuration_of_its_run(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    model = {"class_path": "a.B", "init_args": {"goal": 2.0}}
    (tmp_path / "config_fit.yaml").write_text(yaml.safe_dump({"model": model}))
    assert stored_model(str(tmp_path / folder)) == model


def test_a_checkpoint_that_tells_nothing(tmp_path):
    torch.save({"hyper_parameters": {"goal": 2.0}}, tmp_path / "a.ckpt")
    assert stored_model(str(tmp_path / "a.ckpt")) is None


def test_differences_name_both_values():
    now = {"goal": 2.0, "betas": (0.1, 0.2), "optimizer": {"class_path": "A", "init_args": {"lr": 0.1}}, "new": 1}
    then = {"goal": 1.0, "betas": [0.1, 0.2], "optimizer": {"class_path": "A", "init_args": {"lr": 0.2}}, "old": 1}
    assert differences(now, then) == "goal 2.0 (checkpoint: 1.0), optimizer.lr 0.1 (checkpoint: 0.2)"
    assert differences(now, now) == ""
