import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from malleable.lightning_modules.patches.safetensors_file import write_changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_tensor_changes_and_all_else_stays(tmp_path, dtype):
    tensors = {name: torch.randn(3, 4).to(dtype) for name in "abc"} | {"scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "old", metadata={"format": "pt", "note": "kept"})
    (tmp_path / "old").chmod(0o444)
    new = torch.randn(4, 3).to(dtype).T
    write_changed(tmp_path / "old", tmp_path / "new", {"b": new, "scalar": torch.tensor(2.0)})
    read = load_file(tmp_path / "new")
    assert all(torch.equal(read[name], tensors[name]) for name in "ac")
    assert torch.equal(read["b"], new)
    assert read["scalar"] == 2
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o444
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    write_changed(tmp_path / "new", tmp_path / "back", tensors)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "old").read_bytes()
