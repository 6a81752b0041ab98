"""Edits after training: evaluation in the test, exact revert, resumed runs, atomic writes."""

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import HELPERS, launch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from post_fit_run import FactModule, edit, evaluation, make_request, trainer_of
from small_facts import NEW, OTHERS, SETTINGS, TEXTS, share

from malleable import AlphaEdit, Delta, EditEvaluation, PostFitEdit
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.patches.patch import read_patches
from malleable.lightning_modules.patches.storage import open_container
from malleable.main import main


@pytest.fixture(scope="module")
def learnt():
    """A module that knows the facts."""
    module = FactModule()
    module.learn()
    return module


@pytest.fixture
def module(learnt):
    return copy.deepcopy(learnt)


@pytest.fixture
def run(module, tmp_path):
    """Fit and edit."""
    callback = edit()
    trainer = trainer_of(tmp_path, callback, evaluation())
    trainer.fit(module)
    return trainer, module, callback


def weights(path):
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def test_test_after_fit_uses_the_edited_weights(run):
    trainer, module, _ = run
    fresh = FactModule()
    (figures,) = trainer.test(verbose=False)
    assert figures["test_new"] == 1
    (figures,) = trainer.test(fresh, ckpt_path="best", verbose=False)
    assert trainer.checkpoint_callback.best_model_path.endswith("edited.ckpt")
    assert figures["test_new"] == 1
    assert figures["test_others"] >= 0.9
    assert share(module.model, NEW) == share(fresh.model, NEW) == 1


def test_edit_starts_from_the_best_weights(module, tmp_path):
    module.spoil, callback = 1, edit()
    trainer = trainer_of(tmp_path, callback, max_epochs=2)
    trainer.fit(module)
    assert "epoch=0" in callback.replaced
    assert share(module.model, NEW) == 1
    assert share(module.model, OTHERS) >= 0.9, "the second epoch had ruined them"


def test_revert_restores_the_checkpoint_exactly(run, capsys):
    trainer, _, callback = run
    edited = trainer.checkpoint_callback.best_model_path
    before = weights(callback.replaced)
    assert any(not torch.equal(value, before[name]) for name, value in weights(edited).items())
    main(["patch", "revert", edited])
    after = weights(edited)
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not open_container(edited).stack.patches


def test_patch_contains_requests_and_results(run, capsys):
    trainer, _, callback = run
    (patch,) = read_patches(Path(trainer.log_dir) / "patches")
    assert (patch.id,) == tuple(callback.applied) == callback.stack.ids
    assert patch.kind == "alpha_edit"
    assert [request["subject"] for request in patch.requests] == [fact.subject for fact in NEW]
    assert all(request["outcome"]["nll"] < 0.5 for request in patch.requests)
    assert patch.settings["layers"] == [0, 1]
    assert {delta.rank for delta in patch.deltas.values()} == {len(NEW)}
    assert patch.figures["before"]["efficacy"] == 0
    assert patch.figures["after"]["efficacy_exact"] == 100
    assert patch.figures["after"]["perplexity"] < 1.5 * patch.figures["before"]["perplexity"]
    main(["patch", "show", str(patch.folder)])
    assert "6 facts, alpha_edit, layers 0 to 1" in capsys.readouterr().out


def test_patch_applies_to_the_original_checkpoint(run):
    trainer, module, callback = run
    target = open_container(callback.replaced)
    (patch,) = callback.stack.patches
    change = target.stack.apply(read_patches(Path(trainer.log_dir) / "patches")[0], target.tensors)
    own = module.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in change.tensors.items())
    assert change.stack.ids == (patch.id,)


def test_resumed_run_is_not_edited_twice(run, tmp_path, caplog):
    trainer, module, callback = run
    edited = trainer.checkpoint_callback.best_model_path
    again, other = edit(), FactModule()
    with caplog.at_level(logging.INFO):
        trainer_of(tmp_path / "resumed", again).fit(other, ckpt_path=edited, weights_only=True)
    assert "applied already" in caplog.text
    assert again.applied == callback.applied
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in module.model.state_dict().items())


def test_other_requests_add_a_second_patch(learnt, tmp_path, caplog):
    """What one run does in two batches, two runs do one after the other, each with a patch of its own."""
    settings = EditSettings(**SETTINGS, batch_size=3)
    whole = copy.deepcopy(learnt)
    trainer_of(tmp_path / "whole", edit(settings=settings)).fit(whole)
    first, second = (edit(settings=settings, requests=[make_request(fact) for fact in facts]) for facts in (NEW[:3], NEW[3:]))
    module, other = copy.deepcopy(learnt), FactModule()
    trainer = trainer_of(tmp_path / "first", first)
    trainer.fit(module)
    measured = evaluation()
    later = trainer_of(tmp_path / "second", second, measured)
    later.fit(other, ckpt_path=trainer.checkpoint_callback.best_model_path, weights_only=True)
    edited = later.checkpoint_callback.best_model_path
    assert [tuple(patch.requires) for patch in second.stack.patches] == [(), first.stack.ids]
    assert second.stack.ids[0] == first.stack.ids[0]
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        start, one, two = (found.model.state_dict()[name] for found in (learnt, whole, other))
        assert (two - one).norm() < 1e-3 * (one - start).norm()
    (figures,) = later.test(other, verbose=False)
    assert figures["test_new"] == 1
    assert figures["test_efficacy"] == 100
    assert measured.before.figures["efficacy"] == 0, "of all six, as the model was before both patches"
    assert len(measured.after.requests) == 6
    main(["patch", "revert", edited, second.stack.ids[1]])
    assert all(torch.equal(value, weights(trainer.checkpoint_callback.best_model_path)[name]) for name, value in weights(edited).items())


def test_replaced_request_is_not_preserved(learnt, tmp_path):
    first, second = edit(requests=[make_request(fact) for fact in NEW[:2]]), edit(requests=[{**make_request(NEW[0]), "target": "sad"}])
    trainer = trainer_of(tmp_path / "first", first)
    trainer.fit(copy.deepcopy(learnt))
    measured = evaluation()
    later, module = trainer_of(tmp_path / "second", second, measured), FactModule()
    later.fit(module, ckpt_path=trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert NEW[0].target != "sad"
    assert share(module.model, [NEW[0]._replace(target="sad"), NEW[1]]) == 1
    (figures,) = later.test(module, verbose=False)
    assert figures["test_efficacy_exact"] == 100
    assert len(measured.after.requests) == 2


def test_further_training_merges_the_patch_and_edits_again(run, tmp_path, caplog):
    trainer, _, callback = run
    edited = trainer.checkpoint_callback.best_model_path
    again, other = edit(), FactModule()
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path / "on", again, max_epochs=3).fit(other, ckpt_path=edited, weights_only=True)
    assert "cannot be reverted" in caplog.text
    assert len(again.stack.ids) == 1
    assert again.stack.ids != callback.stack.ids
    assert share(other.model, NEW) == 1


def test_interrupted_save_leaves_the_old_state(module, tmp_path, monkeypatch):
    callback = edit()
    trainer = trainer_of(tmp_path, callback)
    save = Trainer.save_checkpoint

    def cut(self, path, *arguments, **options):
        if "edited" in str(path):
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, path, *arguments, **options)

    monkeypatch.setattr(Trainer, "save_checkpoint", cut)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module)
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    assert not (folder / "edited.ckpt").exists()
    (kept,) = folder.glob("*.ckpt")
    assert weights(kept)


def test_edited_frozen_weights_are_stored_in_checkpoints_of_trained_weights(module, tmp_path):
    module.only = "lm_head"
    trainer = trainer_of(tmp_path, edit())
    trainer.fit(module)
    kept = weights(trainer.checkpoint_callback.best_model_path)
    assert set(kept) == {"model.lm_head.weight", *(f"model.model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))}


def test_full_disk_leaves_the_old_state(module, tmp_path, monkeypatch):
    def fail(content, file, *arguments, **options):
        if isinstance(file, Path):  # Lightning saves to memory first
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")
        save(content, file, *arguments, **options)

    save = torch.save
    monkeypatch.setattr(torch, "save", fail)
    module.only = "lm_head"
    trainer = trainer_of(tmp_path, edit())
    with pytest.raises(OSError, match=r"checkpoints/edited\.ckpt was not written \(is the disk full\? PytorchStreamWriter failed"):
        trainer.fit(module)
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    (kept,) = folder.iterdir()
    assert trainer.checkpoint_callback.best_model_path == str(kept)
    assert weights(kept)


def test_patch_is_written_without_checkpoints(module, tmp_path):
    callback = edit()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(module)
    assert (tmp_path / "patches" / callback.stack.ids[0] / "patch.json").exists()
    assert (tmp_path / "checkpoints/edited.ckpt").exists()


def test_module_without_the_model_raises(module, tmp_path):
    callback = edit(model="decoder")
    with pytest.raises(MisconfigurationException, match="name the attribute"):
        trainer_of(tmp_path, callback).fit(module)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharding_strategies_raise_in_every_stage(module, stage, strategy):
    # Made without its constructor, which wants an installed deepspeed.
    trainer = SimpleNamespace(strategy=object.__new__(strategy), datamodule=None, callbacks=[])
    expected = rf"AlphaEdit cannot run `{stage}` with {strategy.__name__}.*use one device or ddp \(--config base/ddp.yaml\)"
    with pytest.raises(MisconfigurationException, match=expected):
        edit().setup(trainer, module, stage)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([{"prompt": "no place", "subject": "Anna", "target": "Lima"}], "prompt must contain {} exactly once"),
        ([{"prompt": "{} is", "subject": "Anna"}], "missing target"),
        ([], "no edit requests"),
        (
            [{"prompt": "{} is", "subject": "Anna", "target": word} for word in ("Lima", "Peru")],
            "the same prompt 'Anna is' but targets 'Lima' and 'Peru'",
        ),
    ],
)
def test_invalid_requests_raise_before_training(requests, message):
    with pytest.raises(ValueError, match=message):
        AlphaEdit(requests=requests)


def test_invalid_line_is_named(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "{} is", "subject": "Anna", "target_new": {"str": "Lima"}}\n\n{"prompt": "{} is", "subject": "Tom", "goal": "x"}\n')
    with pytest.raises(ValueError, match=r"requests\.jsonl, line 3: .*goal"):
        AlphaEdit(requests=str(file))


class ScaledWeights(PostFitEdit):
    """An edit of one's own: a dense change of one matrix."""

    kind = "louder"

    def make_patch(self, trainer, pl_module, model):
        return self.patch(model, {"lm_head.weight": Delta(0.5 * model.lm_head.weight.detach())}, title="half as loud again")


def test_custom_edit(module, tmp_path, capsys):
    before = module.model.lm_head.weight.detach().clone()
    module.configure_optimizers = lambda: None  # what trains would move the matrix
    callback = ScaledWeights()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(module)
    torch.testing.assert_close(module.model.lm_head.weight.detach(), 1.5 * before)
    edited = trainer.checkpoint_callback.best_model_path
    main(["patch", "list", edited])
    assert "half as loud again" in capsys.readouterr().out
    main(["patch", "revert", edited])
    assert torch.equal(weights(edited)["model.lm_head.weight"], before)


@pytest.mark.parametrize("first", [True, False])
def test_every_edit_is_evaluated(module, tmp_path, first):
    """Its patch gets the metrics before and after; the edit itself knows nothing of requests."""
    module.configure_optimizers = lambda: None
    measured = EditEvaluation(requests=[make_request(fact) for fact in OTHERS[:4]], texts=TEXTS)
    trainer = trainer_of(tmp_path, *([measured, ScaledWeights()] if first else [ScaledWeights(), measured]), max_steps=0)
    trainer.fit(module)
    (patch,) = measured.stack.patches
    assert patch.figures["before"]["efficacy_exact"] == patch.figures["after"]["efficacy_exact"] == 100
    assert patch.figures["before"]["perplexity"] > patch.figures["after"]["perplexity"], "louder logits are surer"
    (figures,) = trainer.test(verbose=False)
    assert figures["test_efficacy"] == 100
    assert figures["test_perplexity_ratio"] == pytest.approx(patch.figures["after"]["perplexity"] / patch.figures["before"]["perplexity"])
    assert "drift" not in patch.figures["after"]
    (stored,) = read_patches(Path(trainer.log_dir) / "patches")
    assert stored.figures == patch.figures
    assert open_container(trainer.checkpoint_callback.best_model_path).stack.patches[0].figures == patch.figures


@pytest.mark.parametrize("start", ["best", "last"])
def test_edits_of_one_run_are_stacked(module, tmp_path, start):
    callbacks = [edit(start=start), ScaledWeights(start=start)]
    trainer = trainer_of(tmp_path, *callbacks, evaluation())
    trainer.fit(module)
    edited = trainer.checkpoint_callback.best_model_path
    both = open_container(edited).stack
    assert [patch.kind for patch in both.patches] == ["alpha_edit", "louder"]
    assert both.patches[1].requires == [both.ids[0]]
    assert all(callback.stack.ids == both.ids for callback in callbacks)
    (figures,) = trainer.test(verbose=False)
    assert figures["test_new"] == figures["test_efficacy"] / 100 == 1
    main(["patch", "revert", edited, "--all"])
    before = weights(callbacks[0].replaced)
    assert all(torch.equal(value, before[name]) for name, value in weights(edited).items())


def test_edits_of_two_models_in_one_run_raise(module, tmp_path):
    with pytest.raises(MisconfigurationException, match="must name the same model, got model=model and model=reference"):
        trainer_of(tmp_path, edit(), ScaledWeights(model="reference")).fit(module)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("how", ["trained", "frozen"])
def test_two_ranks_give_the_patch_and_figures_of_one_rank(tmp_path, learnt, how):
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        torch.save(learnt.state_dict(), folder / "learnt.pt")
        launch([HELPERS / "post_fit_run.py", folder, str(ranks), how], ranks=ranks, cwd=folder, timeout_s=240)
        found += [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    one, first, second = found
    assert first == second
    assert one["id"] == first["id"]
    assert one["answers"][:2] == first["answers"][:2]
    assert one["weights"] == first["weights"]
    for name in ("figures", "before"):
        assert first[name] == pytest.approx(one[name], rel=1e-5, nan_ok=True)
    assert one["figures"]["test_efficacy"] == 100
    assert {"perplexity", "fluency", "consistency", "efficacy", "generalization", "specificity"} <= one["before"].keys()


class Opaque:
    """What no checkpoint should hold."""


def test_checkpoints_with_objects_are_not_loaded(module, tmp_path):
    module.on_save_checkpoint = lambda checkpoint: checkpoint.update(secret=Opaque())
    with pytest.raises(MisconfigurationException, match=r"contains more than tensors and plain data.*edit the last weights with start='last'"):
        trainer_of(tmp_path, edit()).fit(module)
