import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch, is_patch, read_patches
from malleable.lightning_modules.patches.tensors import fingerprint

TENSORS = {"a.weight": torch.arange(12.0).view(4, 3), "b.bias": torch.arange(4.0), "c.weight": torch.ones(2)}
TWINS = {"a": Delta(torch.ones(1, 1), torch.ones(1, 1)), "a.up": Delta(torch.ones(1))}
REQUEST = {"prompt": "{} lies in", "subject": "Łódź", "target": " Poland"}


def make(**fields):
    deltas = {"a.weight": Delta(torch.full((4, 1), 0.5), torch.tensor([[1.0, 2.0, 3.0]])), "b.bias": Delta(torch.ones(4))}
    return Patch(**{"kind": "alpha_edit", "deltas": deltas, "base": fingerprint(TENSORS), "requests": [REQUEST], **fields})


@pytest.fixture
def folder(tmp_path):
    return make().write(tmp_path / "edit")


def test_write_and_read(tmp_path):
    figures = {"before": {"efficacy": 0.0}, "after": {"efficacy": 1.0, "perplexity": float("nan")}}
    patch = make(title="Łódź", settings={"layers": (1, 2)}, figures=figures, requires=["0" * 12])
    read = Patch.read(patch.write(tmp_path / "edit"))
    for name in ("id", "kind", "title", "requests", "settings", "figures", "requires", "created", "base", "libraries"):
        assert getattr(read, name) == getattr(patch, name), name
    assert read.settings == {"layers": [1, 2]}
    assert read.figures["after"] == {"efficacy": 1.0, "perplexity": None}
    assert read.libraries["torch"] == torch.__version__
    assert all(torch.equal(read.tensors()[name], tensor) for name, tensor in patch.tensors().items())
    stored = json.loads((tmp_path / "edit" / "patch.json").read_text())["tensors"]
    assert stored["a.weight"] == {"shape": [4, 3], "form": "low_rank", "rank": 1, "norm": pytest.approx(14**0.5)}
    assert stored["b.bias"] == {"shape": [4], "form": "dense", "norm": 2.0}


def test_id_depends_on_the_content_only():
    patch = make()
    same = make(
        deltas=dict(reversed(patch.deltas.items())),
        base=dict(reversed(patch.base.items())),
        requests=[dict(reversed(REQUEST.items()))],
        created="2001-01-01T00:00:00+00:00",
        title="another",
    )
    others = [
        make(kind="other"),
        make(requests=[]),
        make(base={**patch.base, "d": "0"}),
        make(deltas={"b.bias": patch.deltas["b.bias"]}),
        make(deltas={"a.weight": patch.deltas["a.weight"], "b.bias": Delta(torch.ones(4, dtype=torch.float64))}),
    ]
    assert patch.id == same.id
    assert len({patch.id, *(other.id for other in others)}) == 6


def test_id_is_equal_in_other_processes(folder):
    code = f"from malleable import Patch; from pathlib import Path; print(Patch.read(Path({str(folder)!r})).id)"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{make().id}\n"


def test_patch_without_weights(tmp_path):
    patch = Patch(kind="erasure", deltas={}, base={}, requests=[{"concept": "Snoopy"}])
    folder = patch.write(tmp_path / "erasure")
    assert [path.name for path in folder.iterdir()] == ["patch.json"]
    assert Patch.read(folder).requests == [{"concept": "Snoopy"}]


def test_existing_folder_is_not_overwritten(folder):
    before = (folder / "patch.json").read_bytes()
    with pytest.raises(FileExistsError, match="never overwritten; give another folder"):
        make(kind="other").write(folder)
    assert (folder / "patch.json").read_bytes() == before


def test_other_files_are_copied(folder, tmp_path):
    (folder / "ledger.jsonl").write_text("{}\n")
    copy = Patch.read(folder).write(tmp_path / "copy")
    assert sorted(path.name for path in copy.iterdir()) == ["deltas.safetensors", "ledger.jsonl", "patch.json"]
    assert Patch.read(copy).id == make().id


def test_read_patches(folder, tmp_path):
    make(kind="older", created="2001-01-01T00:00:00+00:00").write(tmp_path / "z")
    (tmp_path / "other").mkdir()
    (tmp_path / ".half.killed.tmp/half").mkdir(parents=True)
    (tmp_path / ".half.killed.tmp/half/patch.json").touch()
    assert [patch.kind for patch in read_patches(tmp_path)] == ["older", "alpha_edit"]
    assert is_patch(folder)
    assert not is_patch(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": {"a.weight": "0"}}, r"only change tensors of its base, which does not contain 'b\.bias'"),
        ({"figures": {"now": {}}}, r"'before' and 'after', got \['now'\]"),
        ({"settings": {"model": torch.ones(1)}}, "settings must be plain data"),
        ({"deltas": TWINS, "base": dict.fromkeys(TWINS, "")}, r"both be stored as 'a\.up'"),
    ],
)
def test_invalid_fields_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format version 2 is not supported, only 1"),
        ({"kind": 3}, "'kind' must be a JSON string, got 3; copy the patch again"),
        ({"base": None}, "'base' must be a JSON object, got None"),
        ({"requests": ["x"]}, "'requests': expected a JSON object, got 'x'"),
        ({"requires": [1]}, "'requires': expected a JSON string, got 1"),
        ({"created": "yesterday"}, "'created' must be a time like .* got 'yesterday'"),
    ],
)
def test_invalid_manifest_raises(folder, changes, message):
    fields = json.loads((folder / "patch.json").read_text())
    (folder / "patch.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(ValueError, match=rf"edit/patch\.json: .*{message}"):
        Patch.read(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "it is not JSON"), ("[]", r"must be a JSON object, got \[\]"), (b"\xff", "not text in UTF-8")])
def test_manifest_without_an_object_raises(folder, text, message):
    (folder / "patch.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"edit/patch\.json.*{message}"):
        Patch.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("b.bias"), r"missing \['b\.bias'\], unexpected \[\]"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), r"missing \[\], unexpected \['extra'\]"),
        (lambda tensors: tensors["b.bias"].fill_(float("nan")), r"b\.bias: a delta must be finite"),
        (lambda tensors: tensors.update({"b.bias": torch.ones(5)}), r"b\.bias has shape \[5\], but \[4\] in the manifest"),
    ],
)
def test_invalid_deltas_raise(folder, change, message):
    tensors = load_file(folder / "deltas.safetensors")
    change(tensors)
    save_file(tensors, folder / "deltas.safetensors")
    with pytest.raises(ValueError, match=rf"edit/deltas\.safetensors: .*{message}"):
        Patch.read(folder)


def test_damaged_deltas_raise(folder):
    (folder / "deltas.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(ValueError, match=r"edit/deltas\.safetensors is damaged"):
        Patch.read(folder)


def test_files_of_different_patches_raise(folder, tmp_path):
    tensors = load_file(folder / "deltas.safetensors")
    save_file({**tensors, "b.bias": -tensors["b.bias"]}, folder / "deltas.safetensors")
    with pytest.raises(ValueError, match=rf"edit has id {make().id}, but its contents have id [0-9a-f]{{12}}"):
        Patch.read(folder)


def test_folder_without_a_patch_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a patch: it has no patch\.json"):
        Patch.read(tmp_path)
