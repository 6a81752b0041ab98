import json

import pytest
import torch
from peft import PeftModel
from tiny_patch import DOWN, QUERY, UP, apply, llama, random_patch, revert, with_lora
from transformers import AutoModelForCausalLM

from malleable.datamodules.files.fetch import resolve_model
from malleable.lightning_modules.patches.containers import open_container
from malleable.lightning_modules.patches.names import canonical_tensors
from malleable.lightning_modules.patches.patch import Patch


def tree(path):
    return {item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def load(path):
    return canonical_tensors(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


@pytest.fixture(params=["whole", "sharded"])
def folder(request, tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="4KB" if request.param == "sharded" else "1GB")
    return tmp_path / "model"


def test_a_model_loads_after_applying_and_has_every_byte_back_after_reverting(folder):
    before, plain = tree(folder), load(folder)
    patches = [random_patch(open_container(folder).tensors, (DOWN, UP), seed) for seed in range(2)]
    for patch in patches:
        apply(folder, patch, allow_conflicts=True)
    patched = load(folder)
    assert {name for name in plain if not torch.equal(plain[name], patched[name])} == {DOWN, UP}
    total = sum(patch.deltas[DOWN].dense() for patch in patches)
    torch.testing.assert_close(patched[DOWN], plain[DOWN] + total)
    assert open_container(folder).stack.ids == tuple(patch.id for patch in patches)
    revert(folder, patches[0].id)
    revert(folder)
    assert tree(folder) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_every_byte_back(tmp_path, dtype):
    folder = tmp_path / "model"
    llama(dtype=dtype, tied=True).save_pretrained(folder)
    before = tree(folder)
    apply(folder, random_patch(open_container(folder).tensors, (DOWN, "model.embed_tokens.weight")))
    assert load(folder)[DOWN].dtype == dtype
    assert tree(folder)["model.safetensors"] != before["model.safetensors"]
    revert(folder)
    assert tree(folder) == before


def test_a_patch_made_on_the_live_model_fits_its_folder(folder):
    patch = random_patch(canonical_tensors(llama()))
    apply(folder, patch)
    assert open_container(folder).stack.ids == (patch.id,)


def test_an_adapter_has_every_byte_back(tmp_path):
    folder = tmp_path / "adapter"
    with_lora(llama()).save_pretrained(folder)
    before = tree(folder)
    name = QUERY.replace(".weight", ".lora_A.weight")
    tensors = canonical_tensors(PeftModel.from_pretrained(llama(), folder))
    patch = random_patch(tensors, [name], rank=1)
    apply(folder, patch)
    loaded = canonical_tensors(PeftModel.from_pretrained(llama(), folder))
    torch.testing.assert_close(loaded[name], tensors[name] + patch.deltas[name].dense())
    revert(folder)
    assert tree(folder) == before


def test_files_beside_a_patch_travel_with_it(folder, tmp_path):
    edit = random_patch(open_container(folder).tensors).write(tmp_path / "edit")
    (edit / "keys.safetensors").write_bytes(b"keys")
    patch = Patch.read(edit)
    apply(folder, patch)
    apply(folder, random_patch(open_container(folder).tensors, (UP,), 1, base=patch.base))
    exported = open_container(folder).stack.find(patch.id).write(tmp_path / "exported")
    assert tree(exported) == tree(edit)


def test_unchanged_files_are_shared_and_others_are_kept(tmp_path):
    folder = tmp_path / "model"
    llama().save_pretrained(folder, max_shard_size="4KB")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("kept")
    nodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
    apply(folder, random_patch(open_container(folder).tensors))
    changed = {path.name for path in folder.iterdir() if path.is_file() and nodes.get(path.name) != path.stat().st_ino}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert changed == {index["weight_map"][DOWN]}
    assert (folder / "extra" / "notes.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_elsewhere_leaves_the_target_alone_and_shares_nothing(folder, tmp_path):
    before = tree(folder)
    out = apply(folder, random_patch(open_container(folder).tensors), tmp_path / "out")
    assert tree(folder) == before
    assert not {path.stat().st_ino for path in folder.iterdir()} & {path.stat().st_ino for path in out.iterdir()}
    assert not torch.equal(load(out)[DOWN], load(folder)[DOWN])


def test_files_that_are_links_into_the_cache_of_the_hub_stay_whole_there(tmp_path):
    folder = tmp_path / "models--x" / "snapshots" / "1"
    llama().save_pretrained(folder.parents[1] / "blobs")
    folder.mkdir(parents=True)
    for path in (folder.parents[1] / "blobs").iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    before = tree(folder.parents[1] / "blobs")
    apply(folder, random_patch(open_container(folder).tensors))
    assert tree(folder.parents[1] / "blobs") == before
    assert (folder / "config.json").is_symlink()
    assert not torch.equal(load(folder)[DOWN], load(folder.parents[1] / "blobs")[DOWN])


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "sub/notes.txt"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link that leads outside of its folder"):
        open_container(tmp_path / "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/model.safetensors", "/etc/passwd", "", "..", "x" * 300, "\ud800"])
def test_shards_in_other_folders_are_refused(tmp_path, name):
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "sub" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index.json names .* which is no file of its own folder"):
        open_container(tmp_path / "model")
    with pytest.raises(ValueError, match=r"index.json names .* which is no file of its own folder"):
        resolve_model(str(tmp_path / "model"))


def test_the_file_that_transformers_loads_is_patched(tmp_path):
    """Of several files of weights in a folder: the one that the configuration names, and no adapter without its configuration."""
    llama().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
    (tmp_path / "model" / "own.safetensors").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    (tmp_path / "model" / "adapter_model.safetensors").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    before = load(tmp_path / "model")[DOWN].clone()
    apply(tmp_path / "model", random_patch(open_container(tmp_path / "model").tensors))
    assert not torch.equal(load(tmp_path / "model")[DOWN], before)


def damage_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def lose_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "has no safetensors weights .* save_pretrained"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), r"model\.safetensors is damaged"),
        (damage_index, r"model\.safetensors\.index\.json is damaged"),
        (lose_shard, r"is incomplete: its index names model-00001-of-00001\.safetensors"),
        (lambda folder: (folder / "patches").mkdir(), r"patches was not written by malleable: it has no stack\.json"),
    ],
)
def test_what_is_damaged_is_refused_by_name(tmp_path, change, message):
    llama().save_pretrained(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        open_container(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stack.json", b"{", r"stack\.json is damaged"),
        ("stack.json", b'{"order": []}', r"stack\.json is damaged: expected an object with order"),
        ("originals.safetensors", b"half", r"originals\.safetensors is damaged"),
        ("{id}/patch.json", b"{}", r"patch\.json: it has format version None"),
    ],
)
def test_a_damaged_section_is_refused_by_name(tmp_path, name, text, message):
    llama().save_pretrained(tmp_path / "model")
    patch = random_patch(open_container(tmp_path / "model").tensors)
    apply(tmp_path / "model", patch)
    (tmp_path / "model" / "patches" / name.format(id=patch.id)).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_container(tmp_path / "model")
