"""Recommending language models: which items they name, what their checkpoints hold and refuse, how they are tuned."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import launch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file
from tiny import EOS, TOKENS, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from transformers import AutoModelForCausalLM

from malleable.datamodules.batch import collate
from malleable.lightning_modules import language_model
from malleable.lightning_modules.language_model import Decoding, Tuning
from malleable.lightning_modules.pretrained import LanguageModelConfig, LoRA, build_language_model, save_language_model
from malleable.lightning_modules.sft import SFT


def ready(seed: int = 0, **settings) -> SFT:
    """A module with weights, decided enough to have preferences."""
    torch.manual_seed(seed)
    module = SFT(**{"language_model": tiny_config(), "catalog": tiny_catalog(), "ks": (1, 3), **settings})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(3)
    return module.eval()


def save_base(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    save_language_model(build_language_model(tiny_config(), tiny_catalog()), folder)
    return str(folder)


def lora(base: str, **changes) -> LanguageModelConfig:
    return LanguageModelConfig(name=base, lora=LoRA(r=2, alpha=4, dropout=0.5), **changes)


def fit(folder: Path, config: LanguageModelConfig, **settings):
    """Fit for an epoch; return the module, the Trainer and the checkpoint's path."""
    module = SFT(language_model=config, ks=(1, 3), tuning=Tuning(lr=1e-2, warmup_steps=0), **settings)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[ModelCheckpoint(folder / "checkpoints", filename="saved")])
    trainer.fit(module, TinyData())
    return module, trainer, folder / "checkpoints/saved.ckpt"


def naive_scores(module: SFT, prompt: list[int]) -> list[float]:
    """The log-probability of each title, one plain forward pass a title."""
    scores = []
    for title in TOKENS:
        logps = module.model(torch.tensor([[*prompt, *title]])).logits[0].log_softmax(-1)
        scores.append(sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(title)))
    return scores


# --- recommending ---


@torch.no_grad()
def test_recommendations_are_the_titles_in_order_of_probability():
    module = ready(decoding=Decoding(num_beams=8, exclude_seen=False))
    rows = tiny_rows(5)
    found = module.recommend(collate(rows), k=8)
    for row, items, scores in zip(rows, found.item_ids.tolist(), found.scores, strict=True):
        expected = torch.tensor(naive_scores(module, row["prompt"]))
        assert items == expected.argsort(descending=True).tolist()
        torch.testing.assert_close(scores, expected[items], atol=1e-4, rtol=0)


def test_as_many_as_the_largest_cut_off():
    assert ready().recommend(collate(tiny_rows(2))).item_ids.shape == (2, 3)
    narrow = ready(decoding=Decoding(num_beams=1, exclude_seen=False))
    assert narrow.recommend(collate(tiny_rows(2)), k=5).item_ids.min() >= 0, "the beam is at least as wide as the list"


def test_what_was_seen_is_left_out():
    batch = collate(tiny_rows(6))
    for row, seen in zip(ready().recommend(batch, k=8).item_ids.tolist(), batch.seen.tolist(), strict=True):
        left = 8 - len({item for item in seen if item >= 0})
        assert len(set(row[:left])) == left
        assert not set(row[:left]) & set(seen)
        assert row[left:] == [-1] * (8 - left)
    everything = ready(decoding=Decoding(exclude_seen=False)).recommend(batch, k=8)
    assert sorted(everything.item_ids[0].tolist()) == list(range(8))


def test_candidates_restrict_the_choice():
    rows = [row | {"candidates": [row["item_ids"][0], (row["item_ids"][0] + 3) % 8]} for row in tiny_rows(4)]
    found = ready(decoding=Decoding(exclude_seen=False)).recommend(collate(rows), k=3).item_ids.tolist()
    assert [set(row) for row in found] == [{*row["candidates"], -1} for row in rows]


def test_predictions_are_recommendations(tmp_path):
    module = ready()
    parts = quiet_trainer(tmp_path).predict(module, TinyData())
    assert torch.equal(torch.cat([part.item_ids for part in parts]), module.recommend(collate(tiny_rows(5))).item_ids)


# --- losses ---


@torch.no_grad()
def test_answer_loss_is_the_mean_over_answer_tokens():
    """Sum over the answers' tokens, the end-of-sequence token included, over their number; nothing of the prompt."""
    module, rows = ready(), tiny_rows(5)
    output = module.answer_loss(collate(rows))
    number = sum(len(row["answers"][0]) for row in rows)
    total = sum(naive_scores(module, row["prompt"])[row["item_ids"][0]] for row in rows)
    assert output.loss.item() == pytest.approx(-total / number, abs=1e-5)
    assert output.weight == number
    shared = replace(collate(rows), num_step_tokens=torch.tensor(20.0))
    assert module.answer_loss(shared).loss.item() == pytest.approx(-total / 20, abs=1e-5)


@torch.no_grad()
def test_rows_that_only_fill_a_batch_bear_no_loss():
    module, batch = ready(), collate(tiny_rows(3))
    alone = module.answer_loss(collate(tiny_rows(2)))
    filled = module.answer_loss(replace(batch, sample_id=torch.tensor([0, 1, -3])))
    assert filled.loss.item() == pytest.approx(alone.loss.item(), abs=1e-6)
    assert filled.weight == alone.weight
    nothing = module.answer_loss(replace(batch, sample_id=torch.tensor([-1, -2, -3])))
    assert (nothing.loss.item(), nothing.weight) == (0.0, 0)


@torch.no_grad()
def test_packed_loss_is_the_mean_over_all_tokens_but_the_first_of_each_document():
    module = ready()
    documents = [[2, 4, 5, EOS], [2, 7, EOS], [2, 8, 9, 10, EOS]]
    rows = [
        {"sample_id": 0, "input_ids": documents[0] + documents[1], "document_ids": [1] * 4 + [2] * 3},
        {"sample_id": 1, "input_ids": documents[2], "document_ids": [1] * 5},
    ]
    total = 0.0
    for document in documents:
        logps = module.model(torch.tensor([document])).logits[0].log_softmax(-1)
        total += sum(logps[place, token].item() for place, token in enumerate(document[1:]))
    output = module.answer_loss(collate(rows))
    assert output.weight == 3 + 2 + 4
    assert output.loss.item() == pytest.approx(-total / 9, abs=1e-5)


# --- checkpoints ---


def test_checkpoint_brings_weights_catalogue_and_settings(tmp_path):
    """Nothing but the file is needed: no catalogue, no settings, no pickle."""
    module, _, path = fit(tmp_path, tiny_config(), decoding=Decoding(num_beams=5, exclude_seen=False))
    batch = collate(tiny_rows(6))
    loaded = SFT.load_from_checkpoint(path, weights_only=True).eval()
    assert loaded.catalog == tiny_catalog()
    assert (loaded.language_model, loaded.decoding, loaded.tuning, loaded.ks) == (module.language_model, module.decoding, module.tuning, module.ks)
    expected, found = module.eval().recommend(batch, 8), loaded.recommend(batch, 8)
    assert torch.equal(found.item_ids, expected.item_ids)
    assert torch.equal(found.scores, expected.scores)


def test_testing_from_a_checkpoint_equals_testing_the_fitted_model(tmp_path):
    module, trainer, path = fit(tmp_path, tiny_config())
    straight = trainer.test(module, TinyData(), verbose=False)
    fresh = SFT(language_model=tiny_config(), ks=(1, 3))
    assert quiet_trainer(tmp_path).test(fresh, TinyData(), ckpt_path=path, weights_only=True, verbose=False) == straight
    assert {"test_loss", "test_hr_1", "test_ndcg_3", "test_div_ratio_3", "test_or_ratio_3"} <= straight[0].keys()


def test_adapter_checkpoint_holds_the_adapter_only(tmp_path):
    """The base is neither in it under one name nor, as a head tied to the embeddings, under another."""
    module, _, path = fit(tmp_path, lora(save_base(tmp_path / "base")))
    checkpoint = torch.load(path, weights_only=True)
    trainable = {f"model.{name}" for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert set(checkpoint["state_dict"]) == trainable
    assert all("lora_" in name for name in trainable)
    loaded = SFT.load_from_checkpoint(path, weights_only=True).eval()
    batch = collate(tiny_rows(6))
    assert torch.equal(loaded.recommend(batch).scores, module.eval().recommend(batch).scores)


def test_adapter_resumes_where_it_stopped(tmp_path):
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    module = SFT(language_model=config, ks=(1, 3))
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, TinyData(), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 24


def test_another_base_is_refused(tmp_path):
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    other = lora(save_base(tmp_path / "other", seed=1))
    message = "trained on another base model than '.*other' .fingerprint .*give the base model it was trained on"
    with pytest.raises(MisconfigurationException, match=message):
        SFT.load_from_checkpoint(path, weights_only=True, language_model=other)
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path).test(SFT(language_model=other), TinyData(), ckpt_path=path)


def test_missing_and_unexpected_weights_are_refused(tmp_path):
    """Loading is not strict because frozen weights are left out; so the module looks itself."""
    config = lora(save_base(tmp_path / "base"))
    _, _, path = fit(tmp_path, config)
    checkpoint = torch.load(path, weights_only=True)
    first, *rest = checkpoint["state_dict"].items()
    module = SFT(language_model=config)
    with pytest.raises(
        MisconfigurationException, match=r"does not fit this module: missing \['model.*lora_A.*'\], unexpected \[\] \(1 and 0 in all\)"
    ):
        module.on_load_checkpoint(checkpoint | {"state_dict": dict(rest)})
    with pytest.raises(MisconfigurationException, match=r"missing \[\], unexpected \['model.other'\] \(0 and 1 in all\)"):
        module.on_load_checkpoint(checkpoint | {"state_dict": {**dict([first, *rest]), "model.other": first[1]}})


def test_another_vocabulary_is_refused(tmp_path):
    _, _, path = fit(tmp_path, tiny_config())
    with pytest.raises(RuntimeError, match="size mismatch"):
        SFT.load_from_checkpoint(path, weights_only=True, catalog=replace(tiny_catalog(), vocab_size=20))


def test_a_checkpoint_without_catalogue_needs_one():
    with pytest.raises(MisconfigurationException, match="SFT needs the catalogue, and the checkpoint has none: pass catalog="):
        SFT().on_load_checkpoint({"state_dict": {}})


def test_without_catalogue_no_weights():
    """Neither given nor from a data module: the Trainer refuses before weights are built."""
    module = SFT(language_model=tiny_config())
    module.configure_model()
    assert module.model is None
    with pytest.raises(MisconfigurationException, match=r"SFT needs `catalog`: pass SFT\(catalog=...\)"):
        quiet_trainer(Path()).fit(module, torch.utils.data.DataLoader(tiny_rows(4), collate_fn=collate))


def test_hyper_parameters_are_plain_data(tmp_path):
    module = SFT(language_model=lora(save_base(tmp_path / "base")), catalog=tiny_catalog(), tuning=Tuning(lr=0.5), optimizer=torch.optim.SGD)
    stored = json.loads(json.dumps(dict(module.hparams)))
    assert set(stored) == {"language_model", "decoding", "tuning", "ks"}
    again = SFT(**stored)
    assert (again.language_model, again.tuning, again.ks) == (module.language_model, module.tuning, module.ks)


def test_configuring_twice_builds_once():
    module = ready()
    model = module.model
    module.configure_model()
    assert module.model is model


# --- export ---


@torch.no_grad()
def test_the_run_leaves_a_model_that_transformers_loads(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    module, _, _ = fit(tmp_path, tiny_config(), catalog=replace(tiny_catalog(), tokenizer=str(tokenizer)))
    folder = tmp_path / "run/model"
    assert (folder / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([[2, 4, 5, EOS]])
    torch.testing.assert_close(loaded(tokens).logits, module.model.eval()(tokens).logits)


@torch.no_grad()
def test_the_run_leaves_an_adapter_that_peft_loads(tmp_path):
    base = save_base(tmp_path / "base")
    module, _, _ = fit(tmp_path, lora(base))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run/adapter").eval()
    tokens = torch.tensor([[2, 4, 5, EOS]])
    torch.testing.assert_close(loaded(tokens).logits, module.model.eval()(tokens).logits)
    assert not (tmp_path / "run/model").exists()


def test_a_trial_run_leaves_nothing(tmp_path):
    quiet_trainer(tmp_path, fast_dev_run=True).fit(SFT(language_model=tiny_config()), TinyData())
    assert not list(tmp_path.rglob("*.safetensors"))


# --- tuning ---


class Watch(Callback):
    """Note the rate of every step, and which parts are in training mode."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.modes: dict[str, set[bool]] = {"train": set(), "eval": set()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.modes["train"] |= {part.training for part in pl_module.model.modules()}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.modes["eval"] |= {part.training for part in pl_module.model.modules()}


def test_the_rate_rises_and_falls_over_the_whole_run(tmp_path):
    """48 rows in steps of 8, two epochs: 12 steps. A rise of 4, then 8 of 8, 7 of 8, ..., 1 of 8."""
    watch = Watch()
    module = SFT(language_model=tiny_config(), tuning=Tuning(lr=0.1, warmup_steps=4, decay="linear"))
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[watch]).fit(module, TinyData(batch_size=4, global_batch_size=8))
    expected = [0.1 * step / 4 for step in (1, 2, 3, 4)] + [0.1 * step / 8 for step in range(8, 0, -1)]
    assert watch.rates == pytest.approx([rate for rate in expected for _ in range(2)])


def test_the_default_optimizer_takes_the_modules_own_settings():
    module = ready(tuning=Tuning(lr=0.25, weight_decay=0.5))
    optimizer = module.default_optimizer(module.parameter_groups())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.5), (0.25, 0.0)]


def test_dropout_is_on_in_training_and_off_in_evaluation(tmp_path):
    """Also in a backbone that `from_pretrained` returns in evaluation mode, and again after validation."""
    watch = Watch()
    module = SFT(language_model=lora(save_base(tmp_path / "base")))
    quiet_trainer(tmp_path, max_epochs=1, val_check_interval=4, callbacks=[watch]).fit(module, TinyData())
    assert watch.modes == {"train": {True}, "eval": {False}}


# --- the same on any devices ---

SCRIPT = """
import json, os, sys
import torch
from safetensors.torch import save_file
from tiny import tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from torch.utils.data import DataLoader
from malleable.datamodules.batch import collate
from malleable.lightning_modules.language_model import Tuning
from malleable.lightning_modules.pretrained import LanguageModelConfig, LoRA
from malleable.lightning_modules.sft import SFT

ranks = int(os.environ.get("WORLD_SIZE", 1))
folder = f"ranks{ranks}"
steady = Tuning(warmup_steps=0, decay="constant")
configs = {
    "full": tiny_config(),
    "lora": LanguageModelConfig(name="base", lora=LoRA(r=2, alpha=4, dropout=0.0), gradient_checkpointing=True),
}
# Steps of 8 rows: on one device at once and in 4 parts, on two devices in 2 parts each.
for name, size in [("full", 8), ("full", 2), ("lora", 4)] if ranks == 1 else [("full", 2), ("lora", 2)]:
    torch.manual_seed(0)
    module = SFT(language_model=configs[name], tuning=steady, ks=(1, 3), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5))
    trainer = quiet_trainer(folder, devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, TinyData(batch_size=size, global_batch_size=8))
    assert trainer.global_step == 6
    if trainer.is_global_zero:
        weights = {key: value.clone() for key, value in module.model.named_parameters() if value.requires_grad}
        save_file(weights, f"{folder}/{name}_{8 // size // ranks}.safetensors")
# A loader of the user's own, which Lightning shards by repeating rows: the second rank's last batch is one repeat.
(figures,) = trainer.test(module, DataLoader(tiny_rows(5), batch_size=2, collate_fn=collate), verbose=False)
if trainer.is_global_zero:
    with open(f"{folder}/test.json", "w") as file:
        json.dump(figures, file)
"""


@pytest.mark.ddp
def test_a_step_is_the_same_on_one_device_accumulated_and_on_two(tmp_path):
    """Also with adapters whose blocks recompute their activations under DDP; and a test on two devices counts each row once."""
    save_base(tmp_path / "base")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    runpy.run_path(str(script))
    launch([script], ranks=2, cwd=tmp_path)
    one, two = tmp_path / "ranks1", tmp_path / "ranks2"
    for expected, found in [
        (one / "full_1", one / "full_4"),
        (one / "full_1", two / "full_2"),
        (one / "lora_2", two / "lora_2"),
    ]:
        ours, theirs = (load_file(path.with_suffix(".safetensors")) for path in (found, expected))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    ours, theirs = (json.loads((folder / "test.json").read_text()) for folder in (two, one))
    assert ours == pytest.approx(theirs, abs=1e-5)


# --- sharded weights ---


def attached(module: SFT, **flags):
    """Give the module a strategy that shards weights, and note the flags that ranks exchange."""
    calls: list[tuple[bool, bool]] = []

    def reduce_boolean_decision(decision: bool, all: bool) -> bool:
        calls.append((decision, all))
        return decision

    module.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=reduce_boolean_decision, **flags))
    return calls


def test_ranks_agree_on_every_step_where_weights_are_sharded():
    module = ready()
    expected = module.recommend(collate(tiny_rows(3)))
    calls = attached(module, zero_stage_3=True)
    assert torch.equal(module.recommend(collate(tiny_rows(3))).item_ids, expected.item_ids)
    assert calls
    assert not any(all_ranks for _, all_ranks in calls), "one rank that goes on keeps all going"


def test_ranks_go_their_own_way_where_weights_are_whole():
    module = ready()
    assert module.any_rank is None
    calls = attached(module, zero_stage_3=False)
    assert module.any_rank is None
    module.recommend(collate(tiny_rows(3)))
    assert not calls


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_load_shard_by_shard_where_they_are_sharded(monkeypatch, sharded):
    asked = {}

    def build(config, catalog, *, zero3_config):
        asked["zero3"] = zero3_config
        return build_language_model(config, catalog)

    monkeypatch.setattr(language_model, "build_language_model", build)
    module = SFT(language_model=tiny_config(), catalog=tiny_catalog())
    attached(module, zero_stage_3=sharded, config={"zero_optimization": {"stage": 3}})
    module.configure_model()
    assert asked["zero3"] == ({"zero_optimization": {"stage": 3}} if sharded else None)
