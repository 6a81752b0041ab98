"""A checkpoint that is written on a full disk: the error names the file, which is unchanged, and nothing is left behind."""

import os
from pathlib import Path

import pytest
import tiny_patch
import torch

from malleable.checkpoints import AtomicCheckpointIO, consolidate
from malleable.lightning_modules.patches.storage import open_container


def fill(monkeypatch):
    """Let ``torch.save`` fail as it does on a full disk."""

    def fail(content, file, *_):
        Path(file).write_bytes(b"part")
        raise RuntimeError("[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fail)


def write_checkpoint(folder):
    AtomicCheckpointIO().save_checkpoint({"epoch": 2}, folder / "a.ckpt")


def patch_checkpoint(folder):
    tiny_patch.apply(folder / "a.ckpt", tiny_patch.random_patch(open_container(folder / "a.ckpt").tensors))


def consolidate_checkpoint(folder):
    consolidate(str(folder / "sharded/a.ckpt"))


@pytest.mark.parametrize("write", [write_checkpoint, patch_checkpoint, consolidate_checkpoint])
def test_the_old_checkpoint_stays(tmp_path, monkeypatch, write):
    path = tiny_patch.save_checkpoint(tiny_patch.llama(), tmp_path / "a.ckpt")
    if write is consolidate_checkpoint:
        monkeypatch.setattr("lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict", lambda source, file: {"epoch": 2})
        (tmp_path / "sharded/a.ckpt").mkdir(parents=True)
        (tmp_path / "sharded/a.ckpt/latest").write_text("checkpoint")
        path = path.rename(tmp_path / "sharded/consolidated-a.ckpt")
        os.utime(path, (100, 100))
    before, files = path.read_bytes(), sorted(tmp_path.rglob("*"))
    fill(monkeypatch)
    with pytest.raises(OSError, match=rf"^{path} was not written \(is the disk full\? .*file write failed\); an existing file is unchanged$"):
        write(tmp_path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.rglob("*")) == files
