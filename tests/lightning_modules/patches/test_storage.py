import json

import pytest
import torch
from peft import PeftModel
from tiny_patch import DOWN, QUERY, UP, apply, llama, random_patch, revert, save_checkpoint, with_lora
from transformers import AutoModelForCausalLM

from malleable.datamodules.files.fetch import resolve_model
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.storage import CheckpointFile, WeightsFolder, open_container
from malleable.lightning_modules.patches.tensors import canonical_tensors


def content(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_and_revert_in_place(tmp_path, dtype):
    path = save_checkpoint(llama(dtype=dtype), tmp_path / "model.ckpt", hyper_parameters={"lr": 0.1})
    before, tensors = content(path), open_container(path).tensors
    patches = [random_patch(tensors, (DOWN, UP), seed) for seed in range(2)]
    for patch in patches:
        apply(path, patch, allow_conflicts=True)
    patched = content(path)
    assert {key for key, value in before["state_dict"].items() if not torch.equal(value, patched["state_dict"][key])} == {
        f"model.{DOWN}",
        f"model.{UP}",
    }
    assert open_container(path).stack.ids == tuple(patch.id for patch in patches)
    revert(path, patches[0].id)
    revert(path)
    after = content(path)
    assert after.keys() == before.keys()
    assert {key: after[key] for key in ("epoch", "hyper_parameters")} == {"epoch": 3, "hyper_parameters": {"lr": 0.1}}
    for key, value in before["state_dict"].items():
        assert value.dtype == after["state_dict"][key].dtype
        assert torch.equal(value, after["state_dict"][key])


def test_metadata_and_permissions_are_preserved(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt")
    state = llama().state_dict(prefix="model.")
    torch.save({"state_dict": state}, path)
    path.chmod(0o640)
    (tmp_path / "last.ckpt").symlink_to(path.name)
    apply(tmp_path / "last.ckpt", random_patch(open_container(path).tensors))
    assert content(path)["state_dict"]._metadata == state._metadata
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "last.ckpt").is_symlink()
    assert len(open_container(tmp_path / "last.ckpt").stack.patches) == 1


def test_tied_weights_stay_tied(tmp_path):
    path = save_checkpoint(llama(tied=True), tmp_path / "model.ckpt")
    before = content(path)["state_dict"]
    apply(path, random_patch(open_container(path).tensors, ["model.embed_tokens.weight"]))
    state = content(path)["state_dict"]
    head, embeddings = state["model.lm_head.weight"], state["model.model.embed_tokens.weight"]
    assert head.data_ptr() == embeddings.data_ptr()
    assert not torch.equal(head, before["model.lm_head.weight"])
    revert(path)
    assert torch.equal(content(path)["state_dict"]["model.lm_head.weight"], before["model.lm_head.weight"])


def test_base_weights_of_an_adapter(tmp_path):
    model = with_lora(llama())
    path = save_checkpoint(model, tmp_path / "model.ckpt")
    patch = random_patch(open_container(path).tensors, [QUERY])
    apply(path, patch)
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    torch.testing.assert_close(content(path)["state_dict"][f"model.{key}"], model.state_dict()[key] + patch.deltas[QUERY].dense())
    revert(path)
    assert torch.equal(content(path)["state_dict"][f"model.{key}"], model.state_dict()[key])


def test_checkpoint_of_an_adapter_only(tmp_path):
    model = with_lora(llama())
    whole = open_container(save_checkpoint(model, tmp_path / "whole.ckpt")).tensors
    path = save_checkpoint(model, tmp_path / "adapter.ckpt", only="lora_")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"changes {DOWN}, which the target does not contain; if it contains trained weights only, give"):
        apply(path, random_patch(whole))
    assert path.read_bytes() == before
    apply(path, random_patch(whole, [QUERY.replace(".weight", ".lora_B.weight")]))
    assert len(open_container(path).stack.patches) == 1


def test_output_path_does_not_change_the_target(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt")
    before, patch = path.read_bytes(), random_patch(open_container(path).tensors)
    out = apply(path, patch, tmp_path / "new" / "patched.ckpt")
    assert path.read_bytes() == before
    assert open_container(out).stack.ids == (patch.id,)
    with pytest.raises(FileExistsError, match=r"patched\.ckpt exists already; give a new path"):
        apply(path, patch, out)


def test_other_base_does_not_change_the_file(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt")
    other = save_checkpoint(llama(seed=1), tmp_path / "other.ckpt")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="was made for other weights"):
        apply(path, random_patch(open_container(other).tensors))
    assert path.read_bytes() == before


def test_prefix_of_the_model(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {f"net.{key}": value for key, value in llama().state_dict().items()}}, path)
    with pytest.raises(ValueError, match=r"has no tensor with the prefix 'model\.', but e\.g\. \['net\.lm_head.* give the --prefix"):
        open_container(path)
    assert DOWN in open_container(path, "net.").tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "is not a Lightning checkpoint: it has no 'state_dict'"),
        ({"state_dict": {}, "x": print}, "contains more than tensors and plain data .*print"),
    ],
)
def test_other_files_raise(tmp_path, content, message):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        open_container(tmp_path / "model.ckpt")


def test_damaged_section_of_a_checkpoint_raises(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt", patches={"patches": []})
    with pytest.raises(ValueError, match=r"the patches in .*model\.ckpt are damaged"):
        open_container(path)


def tree(path):
    return {item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def load(path):
    return canonical_tensors(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


@pytest.fixture(params=["whole", "sharded"])
def folder(request, tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="4KB" if request.param == "sharded" else "1GB")
    return tmp_path / "model"


def test_patched_model_loads_and_revert_restores_the_bytes(folder):
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
def test_revert_restores_the_bytes_in_half_precision(tmp_path, dtype):
    folder = tmp_path / "model"
    llama(dtype=dtype, tied=True).save_pretrained(folder)
    before = tree(folder)
    apply(folder, random_patch(open_container(folder).tensors, (DOWN, "model.embed_tokens.weight")))
    assert load(folder)[DOWN].dtype == dtype
    assert tree(folder)["model.safetensors"] != before["model.safetensors"]
    revert(folder)
    assert tree(folder) == before


def test_patch_of_a_model_in_memory_applies_to_its_folder(folder):
    patch = random_patch(canonical_tensors(llama()))
    apply(folder, patch)
    assert open_container(folder).stack.ids == (patch.id,)


def test_revert_restores_the_bytes_of_an_adapter(tmp_path):
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


def test_other_files_of_a_patch_are_copied(folder, tmp_path):
    edit = random_patch(open_container(folder).tensors).write(tmp_path / "edit")
    (edit / "keys.safetensors").write_bytes(b"keys")
    patch = Patch.read(edit)
    apply(folder, patch)
    apply(folder, random_patch(open_container(folder).tensors, (UP,), 1, base=patch.base))
    exported = open_container(folder).stack.find(patch.id).write(tmp_path / "exported")
    assert tree(exported) == tree(edit)


def test_unchanged_files_are_linked_and_other_files_are_copied(tmp_path):
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


def test_output_path_has_no_links_to_the_target(folder, tmp_path):
    before = tree(folder)
    out = apply(folder, random_patch(open_container(folder).tensors), tmp_path / "out")
    assert tree(folder) == before
    assert not {path.stat().st_ino for path in folder.iterdir()} & {path.stat().st_ino for path in out.iterdir()}
    assert not torch.equal(load(out)[DOWN], load(folder)[DOWN])


def test_links_to_the_hub_cache_are_not_written_through(tmp_path):
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
def test_links_out_of_the_folder_raise(tmp_path, name):
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*, outside its folder"):
        open_container(tmp_path / "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/model.safetensors", "/etc/passwd", "", "..", "x" * 300, "\ud800"])
def test_shards_in_other_folders_raise(tmp_path, name):
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "sub" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index.json refers to .* which is not a file name in its folder"):
        open_container(tmp_path / "model")
    with pytest.raises(ValueError, match=r"index.json refers to .* which is not a file name in its folder"):
        resolve_model(str(tmp_path / "model"))


def test_file_that_transformers_loads_is_patched(tmp_path):
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


def remove_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "has no safetensors weights .* save_pretrained"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), r"model\.safetensors is damaged"),
        (damage_index, r"model\.safetensors\.index\.json is damaged"),
        (remove_shard, r"is incomplete: model-00001-of-00001\.safetensors of its index is missing"),
        (lambda folder: (folder / "patches").mkdir(), r"patches was not written by malleable: it has no stack\.json"),
    ],
)
def test_damaged_files_raise(tmp_path, change, message):
    llama().save_pretrained(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        open_container(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stack.json", b"{", r"stack\.json is damaged"),
        ("stack.json", b'{"order": []}', r"stack\.json is damaged: field 'order' must be an array of ids"),
        ("originals.safetensors", b"half", r"originals\.safetensors is damaged"),
        ("{id}/patch.json", b"{}", r"patch\.json: format version None"),
    ],
)
def test_damaged_section_of_a_folder_raises(tmp_path, name, text, message):
    llama().save_pretrained(tmp_path / "model")
    patch = random_patch(open_container(tmp_path / "model").tensors)
    apply(tmp_path / "model", patch)
    (tmp_path / "model" / "patches" / name.format(id=patch.id)).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_container(tmp_path / "model")


def test_relative_paths_and_links_are_resolved(tmp_path):
    save_checkpoint(llama(), tmp_path / "model.ckpt")
    llama().save_pretrained(tmp_path / "model")
    with_lora(llama()).save_pretrained(tmp_path / "adapter")
    kinds = {name: type(open_container(tmp_path / name)) for name in ("model.ckpt", "model", "adapter")}
    assert kinds == {"model.ckpt": CheckpointFile, "model": WeightsFolder, "adapter": WeightsFolder}
    assert set(open_container(tmp_path / "model").tensors) == set(open_container(str(tmp_path / "model.ckpt")).tensors)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (
            "latest",
            r"is a sharded checkpoint; run `malleable test --ckpt_path .*epoch=1\.ckpt` with its recipe, which writes a consolidated checkpoint",
        ),
        (".metadata", r"sharded checkpoint; run `python -m lightning\.pytorch\.utilities\.consolidate_checkpoint .*epoch=1\.ckpt`"),
        ("nothing.txt", "contains no weights; give a folder with config"),
    ],
)
def test_other_folders_raise(tmp_path, inside, message):
    folder = tmp_path / "epoch=1.ckpt"
    folder.mkdir()
    (folder / inside).touch()
    with pytest.raises(ValueError, match=message):
        open_container(folder)


def test_consolidated_checkpoint_is_named(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "latest").touch()
    (tmp_path / "consolidated-last.ckpt").touch()
    with pytest.raises(ValueError, match=r"give the consolidated checkpoint, .*consolidated-last\.ckpt"):
        open_container(tmp_path / "last.ckpt")


def test_patch_as_target_raises(tmp_path):
    tensors = {name: value.detach() for name, value in llama().named_parameters()}
    with pytest.raises(ValueError, match="is a patch, not weights"):
        open_container(random_patch(tensors).write(tmp_path / "edit"))


def test_missing_path_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give a checkpoint"):
        open_container(tmp_path / "nowhere")
