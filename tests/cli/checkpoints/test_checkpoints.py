import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.checkpoints import differences, find_checkpoint, stored_model


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the checkpoint nowhere\.ckpt does not exist"):
        find_checkpoint("nowhere.ckpt", tmp_path)


@pytest.mark.parametrize("address", ["http://a/last.ckpt", "https://a/b.ckpt", "file:///a.ckpt", "s3://bucket/a.ckpt"])
def test_urls_are_refused_and_files_are_accepted(tmp_path, address):
    file = str(touch(tmp_path / "a.ckpt"))
    assert find_checkpoint(file, tmp_path) == file
    with pytest.raises(MisconfigurationException, match=f"--ckpt_path {address} is a URL; download the file"):
        find_checkpoint(address, tmp_path)


def test_the_model_stored_in_a_file(tmp_path):
    torch.save({"hyper_parameters": {"_class_path": "a.B", "_instantiator": "x", "goal": 2.0}}, tmp_path / "a.ckpt")
    assert stored_model(str(tmp_path / "a.ckpt")) == {"class_path": "a.B", "init_args": {"goal": 2.0}}


@pytest.mark.parametrize("folder", ["checkpoints/a.ckpt", "a.ckpt"])
def test_model_of_a_folder_is_read_from_the_run_configuration(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    model = {"class_path": "a.B", "init_args": {"goal": 2.0}}
    (tmp_path / "config_fit.yaml").write_text(yaml.safe_dump({"model": model}))
    assert stored_model(str(tmp_path / folder)) == model


def test_checkpoint_without_model(tmp_path):
    torch.save({"hyper_parameters": {"goal": 2.0}}, tmp_path / "a.ckpt")
    assert stored_model(str(tmp_path / "a.ckpt")) is None


def test_differences_contain_both_values():
    now = {"goal": 2.0, "betas": (0.1, 0.2), "optimizer": {"class_path": "A", "init_args": {"lr": 0.1}}, "new": 1}
    then = {"goal": 1.0, "betas": [0.1, 0.2], "optimizer": {"class_path": "A", "init_args": {"lr": 0.2}}, "old": 1}
    assert differences(now, then) == "goal 2.0 (checkpoint: 1.0), optimizer.lr 0.1 (checkpoint: 0.2)"
    assert differences(now, now) == ""
