import os

import pytest
from tiny_patch import apply, llama, random_patch, save_checkpoint

from malleable.lightning_modules.patches.files import mirror
from malleable.lightning_modules.patches.storage import open_container


def tree(path):
    return {item.relative_to(path).as_posix(): item.read_text() for item in path.rglob("*") if item.is_file()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_every_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
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


def test_a_private_model_stays_private(tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="12KB")
    for file in (tmp_path / "model").iterdir():
        file.chmod(0o600)
    before = {file.name for file in (tmp_path / "model").iterdir()}
    target = open_container(tmp_path / "model")
    apply(tmp_path / "model", random_patch(target.tensors), tmp_path / "copy")
    apply(tmp_path / "model", random_patch(target.tensors))
    for folder in ("copy", "model"):
        assert {(tmp_path / folder / name).stat().st_mode & 0o777 for name in before} == {0o600}


def test_a_mirror_shares_files_or_copies_them(tmp_path):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    for name in ("a", "left", "inside/left"):
        (source / name).write_text(name)
    (source / "link").symlink_to("a")
    mirror(source, tmp_path / "linked", {"left"}, link=True)
    mirror(source, tmp_path / "copied", {"left"})
    for name in ("linked", "copied"):
        assert tree(tmp_path / name) == {"a": "a", "link": "a", "inside/left": "inside/left"}
    assert (source / "a").samefile(tmp_path / "linked" / "a")
    assert (tmp_path / "linked" / "link").is_symlink()
    assert not (source / "a").samefile(tmp_path / "copied" / "a")
    assert not (tmp_path / "copied" / "link").is_symlink()


def test_a_mirror_copies_where_it_cannot_link(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")

    def refuse(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr("os.link", refuse)
    mirror(tmp_path / "source", tmp_path / "target", link=True)
    assert tree(tmp_path / "target") == {"a": "a"}
