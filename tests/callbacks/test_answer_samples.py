"""Sampled answers to held-out prompts, and their divergence from the reference."""

import json
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from reference_run import pairs
from tiny import EOS, tiny_config
from tiny_data import TinyData, quiet_trainer

from malleable import DPO, AnswerSamples, Popularity, ReferenceCache, RunReport, SimPO, Vocabulary
from malleable.callbacks.answer_samples import answer_statistics
from malleable.lightning_modules.language.tuning import Tuning


class Pairs(TinyData):
    """Validation and test rows with rejected answers, without a catalogue."""

    def __init__(self, **changes):
        super().__init__(train=pairs(24), **changes)
        del self.catalog

    def setup(self, stage):
        super().setup(stage)
        self.val_dataset, self.test_dataset = pairs(7, step=2), pairs(9, step=3)


def make_module(lr=5e-2):
    torch.manual_seed(0)
    return DPO(tiny_config(), vocabulary=Vocabulary(16, EOS), loss=SimPO(), tuning=Tuning(lr=lr, warmup_steps=0))


def trainer_of(folder, *callbacks, **changes):
    samples = AnswerSamples(num_prompts=5, max_new_tokens=6, batch_size=2)
    return quiet_trainer(folder, **{"callbacks": [samples, *callbacks], "max_epochs": 2, **changes})


def test_statistics_by_hand():
    answers = torch.tensor([[3, 4, 3, 4, 1, -1], [5, 5, 5, 5, 5, 5]])
    figures = answer_statistics(answers, 1)
    assert figures["answer_tokens"] == 5.5
    assert figures["answers_ended"] == 0.5
    assert figures["distinct_2"] == pytest.approx(4 / 9), "3 4, 4 3, 4 1 and 5 5 among 4 + 5 pairs"


def test_an_untrained_model_does_not_diverge_and_a_trained_one_does(tmp_path):
    still = trainer_of(tmp_path / "still", max_epochs=1)
    still.fit(make_module(lr=1e-12), Pairs())
    assert still.callback_metrics["val_kl"].item() == pytest.approx(0, abs=1e-4)
    moved = trainer_of(tmp_path / "moved", RunReport())
    moved.fit(make_module(), Pairs())
    assert moved.callback_metrics["val_kl"] > 0.5
    files = sorted(path.name for path in (tmp_path / "moved/run/samples").iterdir())
    assert files == ["reference_test.safetensors", "reference_val.safetensors", "val_step_12.jsonl", "val_step_6.jsonl"]
    entries = [json.loads(line) for line in (tmp_path / "moved/run/samples/val_step_12.jsonl").read_text().splitlines()]
    assert len(entries) == 5
    assert all(entry["prompt"] and entry["answer"] and entry["reference"] and entry["chosen"] for entry in entries)
    assert len({entry["prompt"] for entry in entries}) == 5
    report = (tmp_path / "moved/run/report/report.md").read_text()
    assert "Sampled answers" in report
    assert entries[0]["reference"] in report


def test_samples_depend_on_seed_and_prompt_only(tmp_path):
    """Not on the size of batches."""
    for name, size in (("one", 1), ("three", 3)):
        trainer = quiet_trainer(tmp_path / name, callbacks=[AnswerSamples(5, 6, batch_size=size)], max_epochs=1)
        trainer.fit(make_module(), Pairs())
    first, second = ((tmp_path / name / "run/samples/val_step_6.jsonl").read_text() for name in ("one", "three"))
    assert first == second


def test_a_test_of_the_checkpoint_reads_the_answers_of_its_run(tmp_path):
    saved = ModelCheckpoint(tmp_path / "run/checkpoints", filename="saved", enable_version_counter=False)
    module = make_module()
    trainer = trainer_of(tmp_path, saved)
    trainer.fit(module, Pairs())
    (after,) = trainer.test(module, Pairs(), verbose=False)
    again = trainer_of(tmp_path / "again")
    (alone,) = again.test(make_module(), Pairs(), ckpt_path=str(tmp_path / "run/checkpoints/saved.ckpt"), verbose=False)
    assert alone == pytest.approx(after, rel=1e-4)
    assert alone["test_kl"] > 0.5


def test_a_resumed_run_keeps_the_answers_of_the_reference(tmp_path):
    """Even in another folder; without them, it is an error."""
    saved = ModelCheckpoint(tmp_path / "run/checkpoints", filename="saved", enable_version_counter=False)
    trainer_of(tmp_path, saved).fit(make_module(), Pairs())
    path = tmp_path / "run/checkpoints/saved.ckpt"
    resumed = trainer_of(tmp_path / "b", max_epochs=3)
    resumed.fit(make_module(), Pairs(), ckpt_path=path)
    assert resumed.callback_metrics["val_kl"] > 0.5
    name = "run/samples/reference_val.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    with pytest.raises(MisconfigurationException, match=r"the answers of the reference are missing: .*reference_val"):
        trainer_of(tmp_path / "c", max_epochs=3).fit(make_module(), Pairs(), ckpt_path=path)


def test_it_works_beside_the_cache_of_the_reference(tmp_path):
    """Divergence and rewards of one run."""
    module = DPO(tiny_config(), vocabulary=Vocabulary(16, EOS), tuning=Tuning(lr=5e-2, warmup_steps=0))
    trainer = trainer_of(tmp_path, ReferenceCache())
    trainer.fit(module, Pairs())
    assert {"val_kl", "val_rewards_accuracies", "val_distinct_2"} <= trainer.callback_metrics.keys()
    assert all(math.isfinite(value) for value in trainer.callback_metrics.values())


def test_bad_values(tmp_path):
    with pytest.raises(ValueError, match="num_prompts must be >= 1, got 0"):
        AnswerSamples(num_prompts=0)
    with pytest.raises(ValueError, match="need temperature >= 0"):
        AnswerSamples(temperature=-1)
    with pytest.raises(MisconfigurationException, match="AnswerSamples needs a language model, got Popularity"):
        trainer_of(tmp_path).fit(Popularity(), TinyData())


def test_answers_to_other_prompts_are_not_compared(tmp_path):
    """After a fit, a test on other rows has no divergence; the stored answers of another seed are refused."""
    saved = ModelCheckpoint(tmp_path / "run/checkpoints", filename="saved", enable_version_counter=False)
    module = make_module()
    trainer = trainer_of(tmp_path, saved)
    trainer.fit(module, Pairs())

    class Others(Pairs):
        def setup(self, stage):
            super().setup(stage)
            self.test_dataset = pairs(12, step=3)[4:]

    (figures,) = trainer.test(module, Others(), verbose=False)
    assert "test_kl" not in figures
    other = quiet_trainer(tmp_path / "b", callbacks=[AnswerSamples(num_prompts=5, max_new_tokens=6, seed=3)])
    with pytest.raises(MisconfigurationException, match=r"reference_test\.safetensors has answers to other prompts"):
        other.test(make_module(), Pairs(), ckpt_path=str(tmp_path / "run/checkpoints/saved.ckpt"), verbose=False)
