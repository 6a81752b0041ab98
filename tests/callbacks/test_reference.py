"""The frozen reference: computed once, kept in a file, read again by a run that goes on, and never mistaken for another."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference_run
import torch
from launch import launch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from reference_run import pairs, stored
from self_play_run import make_loop
from self_play_run import make_module as make_self_play
from tiny import EOS, batch_of, tiny_catalog, tiny_config
from tiny_data import TinyData, quiet_trainer
from torch.utils.data import DataLoader

from malleable.callbacks import reference
from malleable.callbacks.reference import ReferenceCache, row_keys
from malleable.callbacks.self_play.round_file import RoundFile
from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.loading import PhasedLoader
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.adaptive_margin import SimPO
from malleable.lightning_modules.losses.preference import IPO
from malleable.lightning_modules.recommendation.dpo import DPO


class Watch(Callback):
    """Note the losses, and the reference that came with each row."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.reference: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.reference |= dict(zip(batch.sample_id.tolist(), batch.reference_logps, strict=True))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path_factory):
    """Values of other tests must not be read."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MALLEABLE_CACHE", str(folder))
    return folder


@pytest.fixture
def passes(monkeypatch):
    """Count how often the reference is computed."""
    calls = []
    compute = reference.reference_logps
    monkeypatch.setattr(reference, "reference_logps", lambda *args: calls.append(1) or compute(*args))
    return calls


def make_module(seed: int = 0, dropout: float = 0.5) -> DPO:
    config = tiny_config()
    config.scratch.dropout = dropout
    torch.manual_seed(seed)
    module = DPO(language_model=config, catalog=tiny_catalog(), tuning=Tuning(lr=1e-2, warmup_steps=0))
    module.configure_model()
    return module


def fit(folder: Path, cache: ReferenceCache, module: DPO | None = None, rows: list[dict] | None = None, ckpt_path: Path | None = None, **changes):
    module, watch = module or make_module(), Watch()
    callbacks = [cache, watch, ModelCheckpoint(folder / "checkpoints", filename="saved", enable_version_counter=False)]
    trainer = quiet_trainer(folder, callbacks=callbacks, **{"max_epochs": 1, "limit_val_batches": 0, **changes})
    trainer.fit(module, TinyData(train=rows or pairs(24)), ckpt_path=ckpt_path)
    return watch


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("reference-*"))


@torch.no_grad()
def test_values_are_those_of_the_model_before_the_first_step(tmp_path):
    """Each pair comes with the untrained model's log-probabilities, without dropout; the first loss is log 2."""
    module = make_module()
    expected = answer_logps(module.model.eval(), batch_of(pairs(24)))
    module.train()
    with torch.enable_grad():
        watch = fit(tmp_path, ReferenceCache(), module)
    found = torch.stack([watch.reference[index] for index in range(24)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert watch.losses[-1] != pytest.approx(math.log(2), abs=1e-3)
    (path,) = files(tmp_path / "run")
    file = stored(path)
    torch.testing.assert_close(file["reference_logps"], expected, atol=1e-5, rtol=0)
    assert torch.equal(file["row"], row_keys(pairs(24)))
    assert not list(tmp_path.rglob("*.tmp"))


def test_equal_runs_share_the_file(tmp_path, passes):
    for _ in range(2):
        fit(tmp_path, ReferenceCache(dirpath=str(tmp_path / "cache")))
    assert len(files(tmp_path / "cache")) == len(passes) == 1


@pytest.mark.parametrize("change", ["weights", "rejected answers", "rows"])
def test_other_model_or_pairs_use_another_file(tmp_path, passes, change):
    """The ids of rows do not tell their answers: negatives may be drawn anew for the same rows."""
    fit(tmp_path, ReferenceCache(dirpath=str(tmp_path / "cache")))
    other = {
        "weights": {"module": make_module(seed=1)},
        "rejected answers": {"rows": pairs(24, step=3)},
        "rows": {"rows": pairs(20)},
    }[change]
    watch = fit(tmp_path, ReferenceCache(dirpath=str(tmp_path / "cache")), **other)
    assert len(files(tmp_path / "cache")) == len(passes) == 2
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_other_settings_or_precision_use_another_file(tmp_path, passes):
    """Four heads instead of two make another function of the same weights."""
    fit(tmp_path, ReferenceCache(dirpath=str(tmp_path / "cache")))
    other = make_module()
    config = tiny_config()
    config.scratch.num_heads = 4
    heads = DPO(language_model=config, catalog=tiny_catalog(), tuning=Tuning(lr=1e-2, warmup_steps=0))
    heads.configure_model()
    heads.model.load_state_dict(other.model.state_dict())
    for number, options in enumerate(({"module": heads}, {"module": other, "precision": "bf16-mixed"}), start=2):
        watch = fit(tmp_path, ReferenceCache(dirpath=str(tmp_path / "cache")), **options)
        assert len(files(tmp_path / "cache")) == len(passes) == number
        assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_next_fit_has_a_new_reference(tmp_path, passes):
    """The same callback, a model that has moved on: the reference is the model as it stands now."""
    cache, module = ReferenceCache(), make_module()
    for number in (1, 2):
        watch = fit(tmp_path / str(number), cache, module)
        assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(passes) == 2


def test_a_resumed_run_reads_the_old_values(tmp_path, passes):
    first = fit(tmp_path, ReferenceCache())
    resumed = fit(tmp_path, ReferenceCache(), make_module(), ckpt_path=tmp_path / "checkpoints/saved.ckpt", max_epochs=2)
    assert len(passes) == 1
    assert all(torch.equal(resumed.reference[index], value) for index, value in first.reference.items())
    assert resumed.losses[0] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("rows", [pairs(24, step=3), pairs(28)], ids=["other answers", "more rows"])
def test_other_rows_are_refused(tmp_path, rows):
    fit(tmp_path, ReferenceCache())
    with pytest.raises(MisconfigurationException, match=r"reference-.*\.safetensors belongs to other training rows; remove the file, or use"):
        fit(tmp_path, ReferenceCache(), rows=rows, ckpt_path=tmp_path / "checkpoints/saved.ckpt", max_epochs=2)


def test_missing_values_are_an_error(tmp_path):
    fit(tmp_path, ReferenceCache())
    (path,) = files(tmp_path / "run")
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(MisconfigurationException, match=r"are missing: .*reference-.* does not exist. They cannot be computed again"):
        fit(tmp_path, ReferenceCache(), ckpt_path=tmp_path / "checkpoints/saved.ckpt", max_epochs=2)


def test_a_run_that_was_moved_reads_its_values_and_copies_them(tmp_path, passes, monkeypatch):
    """From another working directory, to another run folder, twice."""
    monkeypatch.chdir(tmp_path)
    first = fit(Path("runs/a"), ReferenceCache())
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    for number, (start, folder) in enumerate((("a", "b"), ("b", "c")), start=2):
        (Path(start) / "checkpoints").rename(Path(start) / "run/checkpoints")
        path = tmp_path / "moved" / start / "run/checkpoints/saved.ckpt"
        resumed = fit(Path(folder), ReferenceCache(), make_module(), ckpt_path=path, max_epochs=number)
        assert all(torch.equal(resumed.reference[index], value) for index, value in first.reference.items())
        shutil.rmtree(tmp_path / "moved" / start)
    assert len(passes) == 1
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["a changed bit", "cut off"])
def test_damaged_values_are_computed_again_or_refused(tmp_path, passes, damage, empty_cache):
    cache = str(tmp_path / "cache")
    fit(tmp_path, ReferenceCache(cache))
    (path,) = files(tmp_path / "cache")
    whole = path.read_bytes()
    damaged = whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "a changed bit" else whole[:-8]
    path.write_bytes(damaged)
    with pytest.raises(MisconfigurationException, match=r"reference-.*\.safetensors is damaged .* restore the file or start a new run"):
        fit(tmp_path, ReferenceCache(cache), ckpt_path=tmp_path / "checkpoints/saved.ckpt", max_epochs=2)
    shutil.rmtree(empty_cache / "references")
    fit(tmp_path, ReferenceCache(cache))
    assert len(passes) == 2
    assert path.read_bytes() == whole


def test_runs_with_another_loss_or_rate_read_the_values_of_an_earlier_run(tmp_path, passes, empty_cache):
    first = fit(tmp_path / "a", ReferenceCache())
    module = make_module()
    module.loss, module.tuning.lr = IPO(beta=0.3), 1e-3
    second = fit(tmp_path / "b", ReferenceCache(), module)
    assert all(torch.equal(second.reference[index], value) for index, value in first.reference.items())
    assert len(passes) == len(files(empty_cache)) == len(files(tmp_path / "b/run")) == 1
    fit(tmp_path / "c", ReferenceCache(reuse=False))
    assert len(passes) == 2


def test_damaged_values_of_an_earlier_run_are_not_read(tmp_path, passes, empty_cache):
    fit(tmp_path / "a", ReferenceCache())
    (stored_values,) = files(empty_cache)
    whole = stored_values.read_bytes()
    stored_values.write_bytes(whole[:-8])
    fit(tmp_path / "b", ReferenceCache())
    assert len(passes) == 2
    assert stored_values.read_bytes() == whole


def test_a_loss_without_reference_needs_no_pass_in_self_play(tmp_path):
    module, loop = make_self_play(dropout=0.0), make_loop(rounds=1)
    module.loss = SimPO()
    quiet_trainer(tmp_path, max_epochs=-1, callbacks=[loop]).fit(module, TinyData())
    assert RoundFile.read(tmp_path / "run/self_play/round_1_pairs.parquet", loop.state.digest).reference is None


def test_a_loss_without_reference_needs_no_values(tmp_path, passes, empty_cache):
    module = make_module()
    module.loss = SimPO()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ReferenceCache()], enable_checkpointing=False)
    trainer.fit(module, TinyData(train=pairs(24)))
    assert not passes
    assert not files(tmp_path) + files(empty_cache)


class Pairs(TinyData):
    """Validation and test rows with rejected answers."""

    def setup(self, stage):
        super().setup(stage)
        self.val_dataset, self.test_dataset = pairs(7, step=2), pairs(9, step=3)


def test_rewards_are_measured_in_evaluation(tmp_path, passes):
    """In validation, in a test after the fit, and in a test of the checkpoint by a new Trainer; margins are 0 before training."""
    path = tmp_path / "run/checkpoints/saved.ckpt"
    module = DPO(tiny_config(), vocabulary=Vocabulary(16, EOS), tuning=Tuning(lr=1e-2, warmup_steps=0))
    data = Pairs(train=pairs(24))
    del data.catalog
    callbacks = [ReferenceCache(), ModelCheckpoint(path.parent, filename="saved", enable_version_counter=False)]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=3)
    trainer.fit(module, data)
    assert len(passes) == 3
    assert trainer.callback_metrics["val_rewards_margins"] != 0
    (after,) = trainer.test(module, data, verbose=False)
    loaded = DPO.load_from_checkpoint(path, weights_only=True)
    again = quiet_trainer(tmp_path / "again", callbacks=[ReferenceCache()], logger=False)
    (alone,) = again.test(loaded, data, ckpt_path=str(path), verbose=False)
    assert alone == pytest.approx(after, rel=1e-5)
    assert {"test_rewards_accuracies", "test_mean_logps_accuracies", "test_perplexity", "test_reference_chosen"} <= alone.keys()
    (without,) = quiet_trainer(tmp_path / "none", logger=False).test(loaded, data, verbose=False)
    assert "test_rewards_accuracies" not in without
    assert without["test_logps_accuracies"] == pytest.approx(after["test_logps_accuracies"])
    assert without["test_perplexity"] == pytest.approx(after["test_perplexity"], rel=1e-4)


def test_the_reference_of_a_trained_adapter_is_the_adapted_model(tmp_path):
    """Not the base model: margins are 0 in the first step of a second stage."""
    base = tmp_path / "model"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain = DPO(tiny_config(), tiny_catalog())
        plain.configure_model()
    plain.export(tmp_path)
    stage = DPO(LanguageModelConfig(name=str(base), lora=LoRA(r=4)), tiny_catalog(), tuning=Tuning(lr=5e-2, warmup_steps=0))
    fit(tmp_path / "first", ReferenceCache(), stage)
    adapter = str(tmp_path / "first/run/adapter")
    module = DPO(LanguageModelConfig(name=str(base), adapter=adapter), tiny_catalog(), tuning=Tuning(lr=1e-2, warmup_steps=0))
    watch = fit(tmp_path / "second", ReferenceCache(), module)
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    alone = DPO(LanguageModelConfig(name=str(base)), tiny_catalog())
    alone.configure_model()
    with torch.no_grad():
        base_values = answer_logps(alone.model.eval(), batch_of(pairs(24)))
    assert (watch.reference[0] - base_values[0]).abs().max() > 0.01


def test_row_keys_depend_on_id_prompt_and_answers():
    row = {"sample_id": 3, "prompt": [1, 2], "answers": [[3], [4, 5]]}
    changes = (
        {"sample_id": 4},
        {"prompt": [1]},
        {"answers": [[3], [4, 6]]},
        {"answers": [[3, 4], [5]]},
        {"prompt": [1, 2, 3], "answers": [[], [4, 5]]},
    )
    others = [row | change for change in changes]
    assert len(set(row_keys([row, *others]).tolist())) == 6
    arrays = {"sample_id": np.int64(3), "prompt": np.array([1, 2]), "answers": (np.array([3]), (4, 5)), "history": [7]}
    assert torch.equal(row_keys([row]), row_keys([arrays]))


def test_custom_loader(tmp_path):
    loader = PhasedLoader(DataLoader(pairs(24), batch_size=4, collate_fn=batch_of))
    watch = Watch()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ReferenceCache(loader=loader), watch], enable_checkpointing=False)
    trainer.fit(make_module(), loader)
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    plain = DataLoader(pairs(8), batch_size=4, collate_fn=batch_of)
    with pytest.raises(MisconfigurationException, match="ReferenceCache replaces the training rows and needs a PhasedLoader, got DataLoader"):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[ReferenceCache()], enable_checkpointing=False).fit(make_module(), plain)


def assert_same_file(found: Path, expected: Path) -> None:
    ours, theirs = (stored(path) for folder in (found, expected) for path in files(folder))
    assert torch.equal(ours["row"], theirs["row"])
    torch.testing.assert_close(ours["reference_logps"], theirs["reference_logps"], atol=1e-5, rtol=0)


@pytest.mark.ddp
def test_two_ranks_equal_one(tmp_path, two_ranks):
    reference_run.main(tmp_path)
    assert_same_file(two_ranks, tmp_path)


@pytest.mark.ddp
@pytest.mark.slow
def test_sharded_weights_equal_one_rank(tmp_path):
    """Under ZeRO-3 no rank knows the weights that the file is named after; they agree on one name all the same."""
    reference_run.main(tmp_path / "one")
    launch([reference_run.__file__, tmp_path / "two", "zero3"])
    assert_same_file(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("shared_prompt", [None, False, True])
def test_reference_and_policy_use_the_same_pass_form(shared_prompt, monkeypatch):
    seen = []
    monkeypatch.setattr(reference, "apply_to_rows", lambda *args: args[5]("batch"))
    monkeypatch.setattr(reference, "rows_per_pass", lambda *_: 1)
    monkeypatch.setattr(reference, "answer_logps", lambda model, batch, **options: seen.append(options) or torch.zeros(1, 0))
    module = DPO(tiny_config(), tiny_catalog(), decoding=Decoding(shared_prompt=shared_prompt))
    reference.reference_logps(None, module, [], SimpleNamespace(collate_fn=None), "label")
    assert seen == [{"shared_prompt": shared_prompt}]


def test_files_of_several_models_are_not_confused(tmp_path):
    """In a shared folder, a test without the state of the callback does not choose one of them."""
    folder = str(tmp_path / "shared")
    for seed in (0, 1):
        module = DPO(tiny_config(), vocabulary=Vocabulary(16, EOS), tuning=Tuning(lr=1e-2, warmup_steps=0))
        data = Pairs(train=pairs(24))
        del data.catalog
        torch.manual_seed(seed)
        trainer = quiet_trainer(tmp_path / str(seed), callbacks=[ReferenceCache(dirpath=folder)], max_epochs=1, enable_checkpointing=False)
        trainer.fit(module, data)
    assert len(files(tmp_path / "shared")) == 2
    (known,) = trainer.test(module, data, verbose=False)
    assert "test_rewards_accuracies" in known
    again = quiet_trainer(tmp_path / "again", callbacks=[ReferenceCache(dirpath=folder)], logger=False)
    with pytest.raises(MisconfigurationException, match="reference log-probabilities of several models for the test rows"):
        again.test(module, data, verbose=False)
