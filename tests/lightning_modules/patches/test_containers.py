import pytest
from tiny_patch import llama, random_patch, save_checkpoint, with_lora

from malleable.lightning_modules.patches.checkpoint_file import CheckpointFile
from malleable.lightning_modules.patches.containers import open_container
from malleable.lightning_modules.patches.weights_folder import WeightsFolder


def test_a_path_is_what_lies_there(tmp_path):
    save_checkpoint(llama(), tmp_path / "model.ckpt")
    llama().save_pretrained(tmp_path / "model")
    with_lora(llama()).save_pretrained(tmp_path / "adapter")
    kinds = {name: type(open_container(tmp_path / name)) for name in ("model.ckpt", "model", "adapter")}
    assert kinds == {"model.ckpt": CheckpointFile, "model": WeightsFolder, "adapter": WeightsFolder}
    assert set(open_container(tmp_path / "model").tensors) == set(open_container(str(tmp_path / "model.ckpt")).tensors)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("latest", r"is a checkpoint in shards; `malleable test --ckpt_path .*epoch=1\.ckpt` with its recipe writes its one-file form"),
        (".metadata", r"in shards; `python -m lightning\.pytorch\.utilities\.consolidate_checkpoint .*epoch=1\.ckpt` writes"),
        ("nothing.txt", "holds no weights: a model's folder has a config"),
    ],
)
def test_other_folders_are_refused_with_advice(tmp_path, inside, message):
    folder = tmp_path / "epoch=1.ckpt"
    folder.mkdir()
    (folder / inside).touch()
    with pytest.raises(ValueError, match=message):
        open_container(folder)


def test_the_one_file_form_that_is_there_is_named(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "latest").touch()
    (tmp_path / "consolidated-last.ckpt").touch()
    with pytest.raises(ValueError, match=r"give its one-file form, .*consolidated-last\.ckpt"):
        open_container(tmp_path / "last.ckpt")


def test_a_patch_is_not_a_target(tmp_path):
    tensors = {name: value.detach() for name, value in llama().named_parameters()}
    with pytest.raises(ValueError, match="is a patch, not weights"):
        open_container(random_patch(tensors).write(tmp_path / "edit"))


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*nowhere; give a checkpoint"):
        open_container(tmp_path / "nowhere")
