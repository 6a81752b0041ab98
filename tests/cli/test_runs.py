"""Run folders are claimed once, and found by model and data."""

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from launch import launch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from malleable.checkpoints import find_checkpoint
from malleable.datamodules.files.checkpoint_folders import missing_part
from malleable.datamodules.files.run_folders import RunDescription
from malleable.runs import claim_version, claimed_folders

SOURCE = {"class_path": "s.Tables", "init_args": {"file": "a.csv"}}
SFT = {"model": {"class_path": "m.SFT"}, "data": {"class_path": "d.Data", "init_args": {"source": SOURCE}}}


def save(path, steps=1, best=None, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    callbacks = {"ModelCheckpoint{}": {"best_model_path": best, "dirpath": str(path.parent), "monitor": "val_loss"}} if best else {}
    torch.save({"global_step": steps, "callbacks": callbacks, **content}, path)
    return path


def configure(run, config):
    run.mkdir(parents=True, exist_ok=True)
    (run / "config_fit.yaml").write_text(yaml.safe_dump(config))


def changed(config, **changes):
    config = json.loads(json.dumps(config))
    for name, value in changes.items():
        (config["data"]["init_args"]["source"]["init_args"] if name == "file" else config[name])["file" if name == "file" else "class_path"] = value
    return config


# Claiming


def quiet(**options):
    return Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)


def test_concurrent_processes_get_different_folders(tmp_path):
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            number = claim_version(tmp_path / "runs")
            (tmp_path / f"claim-{os.getpid()}").write_text(str(number))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(int(path.read_text()) for path in tmp_path.glob("claim-*")) == list(range(8))


def test_claimed_number_is_larger_than_all_existing_numbers(tmp_path):
    for name in ("version_3", "version_x", "version_7_copy", "other"):
        (tmp_path / name).mkdir()
    assert claim_version(tmp_path) == 4


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_folder_exists_before_the_run_starts(tmp_path, kind):
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    first, second = (quiet(logger=kind(tmp_path, name="runs")) for _ in range(2))
    with claimed_folders(first):
        assert (tmp_path / "runs/version_0").is_dir()
        with claimed_folders(second):
            assert first.log_dir == str(tmp_path / "runs/version_0")
            assert second.log_dir == str(tmp_path / "runs/version_1")


def test_loggers_of_one_run_share_its_folder(tmp_path):
    trainer = quiet(logger=[CSVLogger(tmp_path, name="runs"), CSVLogger(tmp_path, name="runs"), CSVLogger(tmp_path, name="other", version="given")])
    with claimed_folders(trainer):
        assert [logger.version for logger in trainer.loggers] == [0, 0, "given"]
    assert not list((tmp_path / "runs").iterdir())


def test_only_the_first_process_claims(tmp_path):
    for node, local in ((1, 0), (0, 1)):
        trainer = quiet(logger=CSVLogger(tmp_path, name="runs"))
        trainer.strategy.cluster_environment = SimpleNamespace(node_rank=lambda node=node: node, local_rank=lambda local=local: local)
        with claimed_folders(trainer):
            assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_before_it_writes_leaves_no_folder(run, boring, monkeypatch):
    from boring import BoringDataModule

    def fail(self):
        assert (boring / "runs/boring/version_0").is_dir()
        raise ValueError("no data")

    monkeypatch.setattr(BoringDataModule, "prepare_data", fail)
    with pytest.raises(ValueError, match="no data"):
        run("fit")
    assert not list((boring / "runs/boring").iterdir())
    monkeypatch.undo()
    monkeypatch.chdir(boring)
    with pytest.raises(FileNotFoundError, match="no last checkpoint in runs/boring"):
        run("test", "--ckpt_path", "last")


@pytest.mark.slow
def test_commands_that_are_started_together_have_folders_of_their_own(boring):
    words = ["fit", "--config", "boring.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda seed: launch(["-m", "malleable", *words, "--seed_everything", str(seed)], ranks=1, cwd=boring, timeout_s=300), (1, 2)))
    runs = sorted((boring / "runs/boring").iterdir())
    assert [path.name for path in runs] == ["version_0", "version_1"]
    assert {yaml.safe_load((path / "config_fit.yaml").read_text())["seed_everything"] for path in runs} == {1, 2}
    for path in runs:
        assert {each.name for each in path.iterdir()} == {"checkpoints", "config_fit.yaml", "hparams.yaml", "metrics.csv"}


# Searching


def test_last_is_the_latest_checkpoint_of_the_latest_run(tmp_path):
    """Whatever the times of files: clocks are set back, and copies are new."""
    old = save(tmp_path / "version_2/checkpoints/last.ckpt", steps=90)
    newest = save(tmp_path / "version_10/checkpoints/last-v1.ckpt", steps=20)
    save(tmp_path / "version_10/checkpoints/last.ckpt", steps=10)
    save(tmp_path / "version_10/checkpoints/epoch=9.ckpt", steps=30)
    for path, time in ((old, 300), (newest, 100)):
        os.utime(path, (time, time))
    assert find_checkpoint("last", tmp_path) == str(newest)
    edited = save(tmp_path / "version_10/checkpoints/edited.ckpt", steps=20)
    assert find_checkpoint("last", tmp_path) == str(edited)
    save(newest, steps=25)
    assert find_checkpoint("last", tmp_path) == str(newest)


def test_link_counts_as_its_target(tmp_path):
    folder = tmp_path / "version_0/checkpoints"
    save(folder / "epoch=3.ckpt", steps=3)
    save(folder / "edited.ckpt", steps=2)
    (folder / "last.ckpt").symlink_to("epoch=3.ckpt")
    assert find_checkpoint("last", tmp_path) == str(folder / "last.ckpt")


@pytest.mark.parametrize("damage", ["link to nowhere", "empty", "cut", "missing"])
def test_incomplete_last_checkpoint_is_skipped(tmp_path, damage):
    """A run was killed after it removed the old checkpoint, or while it wrote the new one."""
    folder = tmp_path / "version_0/checkpoints"
    save(folder / "epoch=3.ckpt", steps=3)
    newest = save(folder / "epoch=4.ckpt", steps=4)
    last = folder / "last.ckpt"
    if damage == "link to nowhere":
        last.symlink_to("epoch=2.ckpt")
    elif damage == "empty":
        last.write_bytes(b"")
    elif damage == "cut":
        last.write_bytes(newest.read_bytes()[:-100])
    assert find_checkpoint("last", tmp_path) == str(newest)
    for path in (newest, folder / "epoch=3.ckpt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no last checkpoint in"):
        find_checkpoint("last", tmp_path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


SHARDED = ("zero2", "zero3", "torch")


def save_sharded(folder, kind, steps=1, ranks=2):
    """Write a complete checkpoint folder of DeepSpeed or of ``torch.distributed.checkpoint``."""
    if kind == "torch":
        save(folder / "meta.pt", steps)
        for name in (".metadata", *(f"__{rank}_0.distcp" for rank in range(ranks))):
            (folder / name).write_bytes(b"shard")
        return folder
    models = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)] if kind == "zero3" else ["mp_rank_00_model_states.pt"]
    for name in (*models, *(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks))):
        save(folder / "checkpoint" / name, steps, dp_world_size=ranks)
    (folder / "latest").write_text("checkpoint")
    return folder


@pytest.mark.parametrize("kind", SHARDED)
def test_folders_of_sharded_strategies_are_ranked_by_their_steps(tmp_path, kind):
    folder = tmp_path / "version_0/checkpoints"
    save_sharded(folder / "last.ckpt", kind, steps=5)
    save_sharded(folder / "last-v1.ckpt", kind, steps=9)
    os.utime(folder / "last-v1.ckpt", (100, 100))
    assert find_checkpoint("last", tmp_path) == str(folder / "last-v1.ckpt")
    edited = save(folder / "edited.ckpt", steps=9)
    assert find_checkpoint("last", tmp_path) == str(edited)


PARTS = {
    "zero2": ("latest", "checkpoint/mp_rank_00_model_states.pt", "checkpoint/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "zero3": ("latest", *(f"checkpoint/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1))),
    "torch": (".metadata", "meta.pt"),
}


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in PARTS.items() for part in parts])
def test_incomplete_folder_is_skipped(tmp_path, caplog, kind, part, damage):
    """A process was killed while it wrote its part; the parts of the last rank show their absence by the stored number of ranks."""
    folder = tmp_path / "version_0/checkpoints"
    older = save_sharded(folder / "epoch=3-step=9.ckpt", kind, steps=9)
    last = save_sharded(folder / "last.ckpt", kind, steps=12)
    assert find_checkpoint("last", tmp_path) == find_checkpoint(str(last), tmp_path) == str(last)
    if damage == "missing" or not part.endswith(".pt"):
        (last / part).unlink()
    else:
        (last / part).write_bytes((last / part).read_bytes()[:-100])
    assert find_checkpoint("last", tmp_path) == str(older)
    assert f"{last} is not a complete checkpoint and is skipped ({part} is missing or incomplete)" in caplog.text
    with pytest.raises(FileNotFoundError, match=rf"^the checkpoint folder {last} is incomplete: {part} is missing or truncated"):
        find_checkpoint(str(last), tmp_path)
    earlier = folder.parent.rename(tmp_path / "version_1")
    shutil.rmtree(earlier / "checkpoints" / older.name)
    complete = save(folder / "last.ckpt")
    assert find_checkpoint("last", tmp_path) == str(complete)


@pytest.mark.parametrize("kind", SHARDED)
def test_checking_a_folder_runs_no_code(tmp_path, kind):
    for path in save_sharded(tmp_path / "last.ckpt", kind).rglob("*_states.pt"):
        torch.save({"dp_world_size": 2, "hostile": Hostile(str(tmp_path / "ran"))}, path)
    (tmp_path / "last.ckpt/.metadata").write_bytes(pickle.dumps(Hostile(str(tmp_path / "ran"))))
    missing_part(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_empty_folder_is_incomplete(tmp_path):
    older = save(tmp_path / "version_0/checkpoints/epoch=3.ckpt", steps=3)
    (tmp_path / "version_0/checkpoints/last.ckpt/checkpoint").mkdir(parents=True)
    assert find_checkpoint("last", tmp_path) == str(older)


def test_folders_without_a_state_are_ranked_by_their_names_or_else_their_times(tmp_path):
    folder = tmp_path / "version_0/checkpoints"
    for time, name in enumerate(("b.ckpt", "a.ckpt", "epoch=1-step=100.ckpt", "epoch=0-step=20.ckpt"), start=1):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text("of another strategy")
        os.utime(folder / name, (time, time))
    for name in ("epoch=1-step=100.ckpt", "epoch=0-step=20.ckpt", "a.ckpt", "b.ckpt"):
        assert find_checkpoint("last", tmp_path) == str(folder / name)
        shutil.rmtree(folder / name)


def test_without_a_run(tmp_path):
    for which in ("last", "best"):
        with pytest.raises(FileNotFoundError, match=f"no {which} checkpoint in"):
            find_checkpoint(which, tmp_path)


def test_runs_with_other_model_or_data_are_skipped(tmp_path, caplog):
    fitting = save(tmp_path / "version_0/checkpoints/last.ckpt")
    configure(tmp_path / "version_0", SFT)
    for number, other in enumerate((changed(SFT, model="m.DPO"), changed(SFT, file="b.csv"), changed(SFT, data="d.Other")), start=1):
        save(tmp_path / f"version_{number}/checkpoints/last.ckpt")
        configure(tmp_path / f"version_{number}", other)
    configure(tmp_path / "version_9", SFT)  # a run without a checkpoint, such as a test
    with caplog.at_level("INFO", "malleable"):
        assert find_checkpoint("last", tmp_path, RunDescription.from_config(SFT)) == str(fitting)
    assert f"using the last checkpoint of {tmp_path}/version_0, because later runs have another model or other data" in caplog.text
    absolute = changed(SFT, file=str(Path("a.csv").absolute()))
    assert find_checkpoint("last", tmp_path, RunDescription.from_config(absolute)) == str(fitting)


def test_error_contains_the_most_similar_run_and_its_differences(tmp_path):
    path = save(tmp_path / "version_0/checkpoints/last.ckpt")
    configure(tmp_path / "version_0", changed(SFT, file="b.csv"))
    save(tmp_path / "version_1/checkpoints/last.ckpt")
    configure(tmp_path / "version_1", changed(SFT, model="m.DPO", data="d.Other"))
    difference = r"data\.source\.file b\.csv instead of a\.csv"
    message = rf"no run in .* has this model and this data; the most similar run is .*version_0, with {difference}\. .*{path}"
    with pytest.raises(FileNotFoundError, match=message):
        find_checkpoint("last", tmp_path, RunDescription.from_config(SFT))


def test_run_without_configuration_is_described_by_its_checkpoint(tmp_path):
    path = save(tmp_path / "version_0/checkpoints/last.ckpt", hyper_parameters={"_class_path": "m.SFT"})
    assert find_checkpoint("last", tmp_path, RunDescription.from_config(SFT)) == str(path)
    with pytest.raises(FileNotFoundError, match=r"version_0, with model m\.SFT instead of m\.DPO"):
        find_checkpoint("last", tmp_path, RunDescription("m.DPO"))


def test_best_is_the_checkpoint_that_the_run_tests(tmp_path):
    folder = tmp_path / "version_0/checkpoints"
    best = save(folder / "epoch=1.ckpt", steps=2)
    save(folder / "last.ckpt", steps=5, best=str(best))
    assert find_checkpoint("best", tmp_path) == str(best)
    renamed = (tmp_path / "version_0").rename(tmp_path / "version_4")
    assert find_checkpoint("best", tmp_path) == str(renamed / "checkpoints/epoch=1.ckpt")
    resumed = tmp_path / "version_5/checkpoints"
    save(resumed / "last.ckpt", steps=9, best=str(renamed / "checkpoints/epoch=1.ckpt"))
    assert find_checkpoint("best", tmp_path) == str(renamed / "checkpoints/epoch=1.ckpt")
    edited = save(resumed / "edited.ckpt", steps=9)
    assert find_checkpoint("best", tmp_path) == str(edited)


def test_missing_or_unknown_best_checkpoint(tmp_path):
    last = save(tmp_path / "version_0/checkpoints/last.ckpt", best=str(tmp_path / "version_0/checkpoints/epoch=1.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"the best checkpoint of .*version_0 is missing: .*epoch=1\.ckpt does not exist"):
        find_checkpoint("best", tmp_path)
    save(last)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt does not contain the path of the best checkpoint"):
        find_checkpoint("best", tmp_path)


def test_commands_find_the_run_of_their_model(run, boring):
    run("fit", "--model.goal", 3)
    run("fit", "--model", "boring.TrainingFree")
    cli = run("test", "--ckpt_path", "last")
    assert cli.config.test.ckpt_path == "runs/boring/version_0/checkpoints/last.ckpt"
    assert run("test", "--ckpt_path", "best").config.test.ckpt_path.startswith("runs/boring/version_0/checkpoints/epoch=")
    with pytest.raises(FileNotFoundError, match=r"the most similar run is .*version_1, with model boring\.TrainingFree instead of boring\.Ragged"):
        run("test", "--ckpt_path", "last", "--model", "boring.Ragged")


def test_a_resumed_run_keeps_the_best_checkpoint_of_the_interrupted_one(run, boring):
    """Also where the folder was renamed; the monitored figure gets worse with every epoch."""
    monitor = ["--checkpoint.monitor", "epoch", "--checkpoint.mode", "min"]
    run("fit", "--trainer.max_epochs", 1, *monitor)
    (boring / "runs/boring/version_0").rename(boring / "runs/boring/version_4")
    best = run("fit", "--trainer.max_epochs", 3, "--ckpt_path", "last", *monitor).trainer.checkpoint_callback
    assert best.best_model_path.endswith("runs/boring/version_4/checkpoints/epoch=0-step=4.ckpt")
    assert float(best.best_model_score) == 0
    assert [path.name for path in (boring / "runs/boring/version_5/checkpoints").iterdir()] == ["last.ckpt"]
