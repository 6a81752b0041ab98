import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_patch import DOWN, UP, llama, random_patch, save_checkpoint

from malleable.commands.patch import run
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.storage import open_container
from malleable.main import main

EMPTY = torch.empty(0, 4)
REQUEST = {"prompt": "{} lies in", "subject": "Łódź", "target": " Poland"}


@pytest.fixture
def target(tmp_path):
    return save_checkpoint(llama(), tmp_path / "model.ckpt")


@pytest.fixture
def edits(tmp_path, target):
    """Folders of three patches: the second meets the first, the third was made on top of it."""
    tensors = open_container(target).tensors
    first = random_patch(
        tensors,
        (DOWN, UP),
        requests=[REQUEST],
        settings={"layers": [0, 1]},
        figures={"before": {"efficacy": 0.0, "perplexity": 9.25}, "after": {"efficacy": 1.0}},
        created="2026-01-01T00:00:00+00:00",
    )
    second = random_patch(tensors, (DOWN,), 1, rank=None, requests=[{**REQUEST, "target": " Peru"}], created="2026-01-02T00:00:00+00:00")
    third = random_patch(tensors, (DOWN,), 2, kind="llm_eraser", requires=[first.id], created="2026-01-03T00:00:00+00:00")
    return [patch.write(tmp_path / "edits" / name) for name, patch in {"first": first, "second": second, "third": third}.items()]


@pytest.fixture
def patch(capsys):
    """Run a command and return what it prints."""

    def command(*words):
        main(["patch", *map(str, words)])
        return capsys.readouterr().out

    return command


def fails(monkeypatch, capsys, *words):
    """Run a command as a process would, and return its exit status and message."""
    monkeypatch.setattr(sys, "argv", ["malleable", "patch", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


def test_apply_list_and_revert(target, edits, patch, monkeypatch, capsys):
    before = torch.load(target, weights_only=True)["state_dict"]
    first, _, third = (Patch.read(edit) for edit in edits)
    assert patch("list", target) == f"{target} contains no patches\n"
    assert patch("apply", edits[0], target) == f"applied {first.id} (alpha_edit, 2 tensors): {target} has 1 patch\n"
    assert patch("apply", edits[2], target) == f"applied {third.id} (llm_eraser, 1 tensor): {target} has 2 patches\n"
    assert patch("list", target).splitlines() == [
        "#  id            kind        created                    tensors  requests  title",
        f"1  {first.id}  alpha_edit  2026-01-01T00:00:00+00:00  2        1         edit 0",
        f"2  {third.id}  llm_eraser  2026-01-03T00:00:00+00:00  1        0         edit 2",
    ]
    known = f"malleable: error: no patch with id 'x'; the target has {first.id}, {third.id}\n"
    assert fails(monkeypatch, capsys, "revert", target, "x") == (1, known)
    assert patch("revert", target) == f"reverted {third.id}: {target} has 1 patch\n"
    assert patch("revert", target, first.id[:6]) == f"reverted {first.id}: {target} has 0 patches\n"
    after = torch.load(target, weights_only=True)
    assert "patches" not in after
    assert all(torch.equal(before[key], after["state_dict"][key]) for key in before)


def test_a_folder_of_patches_is_listed(edits, patch):
    lines = patch("list", edits[0].parent).splitlines()[1:]
    assert [line.split()[1] for line in lines] == [Patch.read(edit).id for edit in edits]


def test_model_folder_with_patches_is_a_target(edits, patch, tmp_path):
    llama().save_pretrained(edits[0].parent)
    assert patch("list", edits[0].parent) == f"{edits[0].parent} contains no patches\n"


def test_conflicts_are_reported_and_need_consent(target, edits, patch, monkeypatch, capsys):
    patch("apply", edits[0], target)
    stored = target.read_bytes()
    code, message = fails(monkeypatch, capsys, "apply", edits[1], target)
    assert code == 1
    assert f"conflict with {Patch.read(edits[0]).id}" in message
    assert '["{} lies in", "Łódź"]: " Poland" in that patch, " Peru" in the new one' in message
    assert target.read_bytes() == stored
    shown = patch("apply", edits[1], target, "--allow_conflicts")
    assert f"{DOWN}: cosine" in shown
    assert shown.endswith(f"{target} has 2 patches\n")


def test_force_ignores_a_different_base(target, edits, patch, monkeypatch, capsys):
    code, message = fails(monkeypatch, capsys, "apply", edits[2], target)
    assert (code, "apply these first, or use force" in message) == (1, True)
    patch("apply", edits[2], target, "--force")
    patch("apply", edits[0], target, "--allow_conflicts")
    code, message = fails(monkeypatch, capsys, "revert", target)
    assert (code, "revert those, too, or use force" in message) == (1, True)
    assert patch("revert", target, "--force").endswith("has 1 patch\n")


def test_a_dry_run_checks_and_writes_nothing(target, edits, patch, monkeypatch, capsys):
    stored = target.read_bytes()
    assert (
        patch("apply", edits[0], target, "--dry_run")
        == f"would apply {Patch.read(edits[0]).id} (alpha_edit, 2 tensors) to {target}; nothing was written\n"
    )
    assert fails(monkeypatch, capsys, "apply", edits[2], target, "--dry_run")[0] == 1
    assert target.read_bytes() == stored


def test_apply_and_revert_with_out(target, edits, patch, tmp_path):
    stored = target.read_bytes()
    patch("apply", edits[0], target, "--out", tmp_path / "patched.ckpt")
    patch("revert", tmp_path / "patched.ckpt", "--all", "--out", tmp_path / "back.ckpt")
    assert target.read_bytes() == stored
    assert patch("diff", target, tmp_path / "back.ckpt").startswith("0 of 21 common tensors differ\n")


def test_show_prints_all_fields_of_a_patch(target, edits, patch):
    first = Patch.read(edits[0])
    text = patch("show", edits[0])
    for line in (
        "kind:     alpha_edit",
        f"base:     {len(first.base)} tensors",
        "  layers: [0, 1]",
        '  {"prompt": "{} lies in", "subject": "Łódź", "target": " Poland"}',
    ):
        assert f"{line}\n" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["efficacy"] == ["0", "1"]
    assert rows["perplexity"] == ["9.25", "-"]
    assert rows[DOWN] == ["(16,", "24)", "2", f"{first.deltas[DOWN].norm:.6g}", "-"]


def test_show_of_a_target_has_relative_norms(target, edits, patch):
    size = float(open_container(target).tensors[DOWN].double().norm())
    for edit in (edits[0], edits[2]):
        patch("apply", edit, target)
    first, latest = Patch.read(edits[0]), Patch.read(edits[2])
    assert f"{latest.deltas[DOWN].norm / size:.3e}\n" in patch("show", target)
    assert f"id:       {first.id}\n" in patch("show", target, first.id[:8])
    fields = json.loads(patch("show", target, first.id, "--json"))
    assert fields["requests"] == [REQUEST]
    assert fields["tensors"][DOWN]["relative_norm"] == pytest.approx(first.deltas[DOWN].norm / size)


def test_diff_of_targets_measures_the_change(target, edits, patch, tmp_path, monkeypatch):
    monkeypatch.setattr("malleable.commands.patch_text._BLOCK", 100)
    llama().save_pretrained(tmp_path / "model")
    patch("apply", edits[0], tmp_path / "model")
    first, old, new = Patch.read(edits[0]), open_container(target).tensors[DOWN].double(), open_container(tmp_path / "model").tensors[DOWN].double()
    lines = patch("diff", target, tmp_path / "model").splitlines()
    assert lines[0] == "2 of 21 common tensors differ"
    row = next(line.split() for line in lines if line.startswith(DOWN))
    assert row[1:] == [f"{float((new - old).norm() / old.norm()):.3e}", f"{float((new - old).abs().max()):.6g}"]
    assert lines[-2:] == [f"patches of {target}: none", f"patches of {tmp_path / 'model'}: {first.id}"]


def test_diff_lists_missing_tensors_and_other_shapes(tmp_path, patch):
    for name, state in {
        "a": {"x": torch.ones(2), "y": torch.ones(2), "none": EMPTY},
        "b": {"x": torch.ones(3), "z": torch.ones(1), "none": EMPTY},
    }.items():
        torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / f"{name}.ckpt")
    text = patch("diff", tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert text.startswith("1 of 2 common tensors differ\n")
    assert "x       shape (2,)  shape (3,)\n" in text
    assert f"only in {tmp_path / 'a.ckpt'} (1): y\n" in text
    assert f"only in {tmp_path / 'b.ckpt'} (1): z\n" in text


def test_diff_of_patches(edits, patch):
    first, second = (Patch.read(edit) for edit in edits[:2])
    lines = patch("diff", *edits[:2]).splitlines()
    assert lines[0] == f'only in {first.id}: {{"prompt": "{{}} lies in", "subject": "Łódź", "target": " Poland"}}'
    assert lines[1].startswith(f"only in {second.id}: ")
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows[DOWN][2] == f"{first.deltas[DOWN].cosine(second.deltas[DOWN]):.6g}"
    assert rows[UP] == [f"{first.deltas[UP].norm:.6g}", "-", "-"]
    assert patch("diff", edits[0], edits[0]) == f"the same patch, {first.id}\n"


def test_diff_of_two_kinds_is_refused(target, edits, monkeypatch, capsys):
    code, message = fails(monkeypatch, capsys, "diff", edits[0], target)
    assert (code, "are a patch and a target; give two patches or two targets" in message) == (1, True)


def test_exported_patch_equals_the_original(target, edits, patch, tmp_path):
    for edit in (edits[0], edits[2]):
        patch("apply", edit, target)
    patch("export", target, tmp_path / "latest")
    patch("export", target, tmp_path / "first", Patch.read(edits[0]).id[:5])
    for name, edit in (("first", edits[0]), ("latest", edits[2])):
        assert all((tmp_path / name / file).read_bytes() == (edit / file).read_bytes() for file in ("patch.json", "deltas.safetensors"))


@pytest.mark.parametrize("kind", ["model.ckpt", "model"])
def test_a_merged_export_has_the_weights_and_no_patches(edits, patch, tmp_path, monkeypatch, capsys, kind):
    if kind == "model":
        llama().save_pretrained(tmp_path / "model")
    patch("apply", edits[0], tmp_path / kind)
    assert "the patches cannot be reverted there" in patch("export", tmp_path / kind, tmp_path / "merged", "--merged")
    assert patch("diff", tmp_path / kind, tmp_path / "merged").startswith("0 of 21 common tensors differ\n")
    code, message = fails(monkeypatch, capsys, "revert", tmp_path / "merged")
    assert (code, message) == (1, f"malleable: error: {tmp_path / 'merged'} contains no patches\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "model.ckpt"], "model.ckpt contains no patches"),
        (["revert", "model.ckpt", "--all"], "model.ckpt contains no patches"),
        (["revert", "model.ckpt", "abc", "--all"], "omit the ids"),
        (["export", "model.ckpt", "out", "abc", "--merged"], "omit the id"),
        (["apply", "edits", "model.ckpt"], "edits is not a patch: it has no patch.json"),
        (["apply", "edits/first", "nowhere.ckpt"], "nowhere.ckpt does not exist; give a checkpoint"),
        (["apply", "edits/first", "model.ckpt", "--out", "model.ckpt"], "model.ckpt exists already"),
        (["list", "model.ckpt", "--prefix", "net."], "has no tensor with the prefix 'net.'"),
    ],
)
def test_error_messages(target, edits, monkeypatch, capsys, words, message):
    stored = target.read_bytes()
    code, text = fails(monkeypatch, capsys, *words)
    assert code == 1
    assert text.startswith("malleable: error: ")
    assert message in text
    assert target.read_bytes() == stored


def test_damage_error_contains_the_file(target, edits, monkeypatch, capsys):
    (edits[0] / "patch.json").write_text("{")
    code, text = fails(monkeypatch, capsys, "apply", edits[0], target)
    assert (code, "first/patch.json: it is not JSON" in text) == (1, True)


@pytest.mark.parametrize("words", [[], ["unknown"], ["apply"], ["list", "x", "--unknown"]])
def test_wrong_command_line_prints_the_usage(monkeypatch, capsys, words):
    code, text = fails(monkeypatch, capsys, *words)
    assert (code, text.startswith("usage: malleable patch")) == (2, True)


def test_it_imports_neither_lightning_nor_transformers(target):
    heavy = {"lightning", "transformers", "peft", "jsonargparse", "pandas"}
    listed = f"import sys; from malleable.main import main; main(['patch', 'list', {str(target)!r}])"
    code = f"{listed}; sys.exit(' '.join({heavy!r} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"{target} contains no patches\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_concurrent_applies_keep_all_patches(tmp_path, kind):
    """Reading, changing and writing is one step for other processes."""
    model = llama()
    target = tmp_path / "model"
    if kind == "folder":
        model.save_pretrained(target)
    else:
        torch.save({"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()}}, target)
    patches = [random_patch(open_container(target).tensors, seed=seed) for seed in range(4)]
    for number, patch in enumerate(patches):
        patch.write(tmp_path / f"patch{number}")
    code = "import sys; from malleable.commands.patch import run; run(sys.argv[1:])"
    words = [["apply", str(tmp_path / f"patch{number}"), str(target), "--allow_conflicts"] for number in range(4)]
    running = [subprocess.Popen([sys.executable, "-c", code, *own], stdout=subprocess.DEVNULL) for own in words]
    assert [process.wait(120) for process in running] == [0] * 4
    assert sorted(open_container(target).stack.ids) == sorted(patch.id for patch in patches)
    assert {path.name for path in tmp_path.iterdir()} == {"model", *(f"patch{number}" for number in range(4))}


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_a_patch_are_refused(tmp_path, kind):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    random_patch(open_container(tmp_path / "model").tensors).write(tmp_path / "patch")
    if kind == "link":
        (tmp_path / "secret").write_text("x")
        (tmp_path / "patch" / "notes").symlink_to(tmp_path / "secret")
    else:
        (tmp_path / "patch" / "deltas.safetensors").unlink()
        os.mkfifo(tmp_path / "patch" / "deltas.safetensors")
    with pytest.raises(ValueError, match=r"a link to .*, outside its folder|neither a file nor a folder"):
        run(["apply", str(tmp_path / "patch"), str(tmp_path / "model")])


def test_files_of_a_patch_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        llama().save_pretrained(tmp_path / "model")
        random_patch(open_container(tmp_path / "model").tensors).write(tmp_path / "patch")
        run(["apply", str(tmp_path / "patch"), str(tmp_path / "model")])
    finally:
        os.umask(before)
    files = [path for name in ("patch", "model/patches") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
