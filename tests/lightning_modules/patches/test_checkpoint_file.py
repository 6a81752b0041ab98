import pytest
import torch
from tiny_patch import DOWN, QUERY, UP, apply, llama, random_patch, revert, save_checkpoint, with_lora

from malleable.lightning_modules.patches.containers import open_container


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


def test_what_torch_and_the_system_keep_with_it_stays(tmp_path):
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


def test_weights_under_an_adapter(tmp_path):
    model = with_lora(llama())
    path = save_checkpoint(model, tmp_path / "model.ckpt")
    patch = random_patch(open_container(path).tensors, [QUERY])
    apply(path, patch)
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    torch.testing.assert_close(content(path)["state_dict"][f"model.{key}"], model.state_dict()[key] + patch.deltas[QUERY].dense())
    revert(path)
    assert torch.equal(content(path)["state_dict"][f"model.{key}"], model.state_dict()[key])


def test_a_checkpoint_of_the_adapter_alone(tmp_path):
    model = with_lora(llama())
    whole = open_container(save_checkpoint(model, tmp_path / "whole.ckpt")).tensors
    path = save_checkpoint(model, tmp_path / "adapter.ckpt", only="lora_")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"changes {DOWN}, which the target does not hold; if it stores only what was trained, give"):
        apply(path, random_patch(whole))
    assert path.read_bytes() == before
    apply(path, random_patch(whole, [QUERY.replace(".weight", ".lora_B.weight")]))
    assert len(open_container(path).stack.patches) == 1


def test_elsewhere_leaves_the_target_alone(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt")
    before, patch = path.read_bytes(), random_patch(open_container(path).tensors)
    out = apply(path, patch, tmp_path / "new" / "patched.ckpt")
    assert path.read_bytes() == before
    assert open_container(out).stack.ids == (patch.id,)
    with pytest.raises(FileExistsError, match=r"patched\.ckpt exists already; give a new path"):
        apply(path, patch, out)


def test_another_base_leaves_the_file_alone(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt")
    other = save_checkpoint(llama(seed=1), tmp_path / "other.ckpt")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="was made on other weights"):
        apply(path, random_patch(open_container(other).tensors))
    assert path.read_bytes() == before


def test_another_attribute_of_the_module(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {f"net.{key}": value for key, value in llama().state_dict().items()}}, path)
    with pytest.raises(ValueError, match=r"holds no tensor under 'model\.' but e\.g\. \['net\.lm_head.* give the --prefix"):
        open_container(path)
    assert DOWN in open_container(path, "net.").tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "is no Lightning checkpoint: it has no 'state_dict'"),
        ({"state_dict": {}, "x": print}, "holds more than tensors and plain data .*print"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        open_container(tmp_path / "model.ckpt")


def test_a_damaged_section_is_refused_with_the_file(tmp_path):
    path = save_checkpoint(llama(), tmp_path / "model.ckpt", patches={"patches": []})
    with pytest.raises(ValueError, match=r"the patches in .*model\.ckpt are damaged"):
        open_container(path)
