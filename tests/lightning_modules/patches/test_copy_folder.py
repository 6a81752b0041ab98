import os

import pytest
from tiny_patch import apply, llama, random_patch, save_checkpoint

from malleable.lightning_modules.patches.copy_folder import copy_folder
from malleable.lightning_modules.patches.storage import open_container


def tree(path):
    return {item.relative_to(path).as_posix(): item.read_text() for item in path.rglob("*") if item.is_file()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    """Libraries create some for their owner only, and another user of the group would read half a patch."""
    before = os.umask(umask)
    try:
        path = save_checkpoint(llama(), tmp_path / "model.ckpt")
        llama().save_pretrained(tmp_path / "model")
        (tmp_path / "model/model.safetensors").chmod(mode)
        patch = random_patch(open_container(path).tensors)
        patch.write(tmp_path / "patch")
        apply(path, patch)
        apply(tmp_path / "model", patch)
    finally:
        os.umask(before)
    written = [*tmp_path.glob("patch/*"), path, tmp_path / "model/model.safetensors", *tmp_path.glob("model/patches/**/*.*")]
    assert len(written) > 5
    assert {file.stat().st_mode & 0o777 for file in written} == {mode}


def test_permissions_of_a_private_model_are_preserved(tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="12KB")
    for file in (tmp_path / "model").iterdir():
        file.chmod(0o600)
    before = {file.name for file in (tmp_path / "model").iterdir()}
    target = open_container(tmp_path / "model")
    apply(tmp_path / "model", random_patch(target.tensors), tmp_path / "copy")
    apply(tmp_path / "model", random_patch(target.tensors))
    for folder in ("copy", "model"):
        assert {(tmp_path / folder / name).stat().st_mode & 0o777 for name in before} == {0o600}


def test_copy_with_and_without_links(tmp_path):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    for name in ("a", "left", "inside/left"):
        (source / name).write_text(name)
    (source / "link").symlink_to("a")
    copy_folder(source, tmp_path / "linked", {"left"}, link=True)
    copy_folder(source, tmp_path / "copied", {"left"})
    for name in ("linked", "copied"):
        assert tree(tmp_path / name) == {"a": "a", "link": "a", "inside/left": "inside/left"}
    assert (source / "a").samefile(tmp_path / "linked" / "a")
    assert (tmp_path / "linked" / "link").is_symlink()
    assert not (source / "a").samefile(tmp_path / "copied" / "a")
    assert not (tmp_path / "copied" / "link").is_symlink()


def test_files_are_copied_if_links_are_not_supported(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")

    def refuse(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr("os.link", refuse)
    copy_folder(tmp_path / "source", tmp_path / "target", link=True)
    assert tree(tmp_path / "target") == {"a": "a"}
