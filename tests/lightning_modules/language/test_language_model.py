"""Recommending language models: which items they name, what their checkpoints hold and refuse, how they are tuned."""

import json
from pathlib import Path
from types import SimpleNamespace

import global_batch_run
import pytest
import torch
from launch import launch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from safetensors.torch import load_file
from tiny import EOS, TOKENS, batch_of, tiny_catalog, tiny_config, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import lora, ready, save_base

from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.language import language_model
from malleable.lightning_modules.language.config import build_language_model
from malleable.lightning_modules.language.free_answers import texts, write_answers
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sft import SFT


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
    found = module.recommend(batch_of(rows), k=8)
    for row, items, scores in zip(rows, found.item_ids.tolist(), found.scores, strict=True):
        expected = torch.tensor(naive_scores(module, row["prompt"]))
        assert items == expected.argsort(descending=True).tolist()
        torch.testing.assert_close(scores, expected[items], atol=1e-4, rtol=0)


def test_the_default_number_of_items_is_the_largest_cut_off():
    assert ready().recommend(batch_of(tiny_rows(2))).item_ids.shape == (2, 3)
    narrow = ready(decoding=Decoding(num_beams=1, exclude_seen=False))
    assert narrow.recommend(batch_of(tiny_rows(2)), k=5).item_ids.min() >= 0, "the beam is at least as wide as the list"


def test_seen_items_are_excluded():
    batch = batch_of(tiny_rows(6))
    for row, seen in zip(ready().recommend(batch, k=8).item_ids.tolist(), batch.seen.tolist(), strict=True):
        left = 8 - len({item for item in seen if item >= 0})
        assert len(set(row[:left])) == left
        assert not set(row[:left]) & set(seen)
        assert row[left:] == [-1] * (8 - left)
    everything = ready(decoding=Decoding(exclude_seen=False)).recommend(batch, k=8)
    assert sorted(everything.item_ids[0].tolist()) == list(range(8))


def test_candidates_restrict_the_choice():
    rows = [row | {"candidates": [row["item_ids"][0], (row["item_ids"][0] + 3) % 8]} for row in tiny_rows(4)]
    found = ready(decoding=Decoding(exclude_seen=False)).recommend(batch_of(rows), k=3).item_ids.tolist()
    assert [set(row) for row in found] == [{*row["candidates"], -1} for row in rows]


def test_predictions_are_recommendations(tmp_path):
    module = ready()
    parts = quiet_trainer(tmp_path).predict(module, TinyData())
    assert torch.equal(torch.cat([part.item_ids for part in parts]), module.recommend(batch_of(tiny_rows(5))).item_ids)


def test_grounding_by_embedding_ranks_titles_by_their_distance_to_one_free_answer():
    """The same for items as for scores, and what was seen is left out here, too."""
    module = ready(decoding=Decoding(grounding="embedding", max_new_tokens=4))
    batch = batch_of(tiny_rows(6))
    found = module.recommend(batch, k=8)
    tokens = write_answers(module.model, batch, module.catalog, max_new_tokens=4)
    distances = torch.cdist(embed_texts(module.model, texts(tokens)), embed_texts(module.model, TOKENS))
    for row, items in enumerate(found.item_ids.tolist()):
        seen = {item for item in batch.seen[row].tolist() if item >= 0}
        expected = [item for item in distances[row].argsort().tolist() if item not in seen]
        assert items == expected + [-1] * len(seen)


def title_embeddings(module):
    return module.items.title_embeddings(module.model, module.weights_version)


def test_title_embeddings_are_updated_with_the_weights(tmp_path):
    """Made once an evaluation; made anew after training, after a checkpoint was loaded, and without a Trainer each time."""
    module = ready(decoding=Decoding(grounding="embedding", max_new_tokens=4))
    alone = title_embeddings(module)
    with torch.no_grad():
        module.model.model.norm.weight.mul_(2)
    torch.testing.assert_close(title_embeddings(module), 2 * alone)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2, enable_checkpointing=False)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    kept = title_embeddings(module)
    assert title_embeddings(module) is kept
    torch.testing.assert_close(kept, embed_texts(module.model, TOKENS))
    other = ready(seed=1)
    other.trainer = module.trainer
    first = title_embeddings(other)
    trainer.test(other, TinyData(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert not torch.allclose(first, kept)
    torch.testing.assert_close(title_embeddings(other), kept)


# --- losses ---


@torch.no_grad()
def test_answer_loss_is_the_mean_over_answer_tokens():
    """Sum over the answers' tokens, the end-of-sequence token included, over their number; nothing of the prompt."""
    module, rows = ready(), tiny_rows(5)
    output = module.answer_loss(batch_of(rows))
    number = sum(len(row["answers"][0]) for row in rows)
    total = sum(naive_scores(module, row["prompt"])[row["item_ids"][0]] for row in rows)
    assert output.loss.item() == pytest.approx(-total / number, abs=1e-5)
    assert output.weight == number
    shared = batch_of(rows).replace(num_step_tokens=torch.tensor(20.0))
    assert module.answer_loss(shared).loss.item() == pytest.approx(-total / 20, abs=1e-5)


@torch.no_grad()
def test_padding_rows_have_no_loss():
    module, batch = ready(), batch_of(tiny_rows(3))
    alone = module.answer_loss(batch_of(tiny_rows(2)))
    filled = module.answer_loss(batch.replace(sample_id=torch.tensor([0, 1, -3])))
    assert filled.loss.item() == pytest.approx(alone.loss.item(), abs=1e-6)
    assert filled.weight == alone.weight
    nothing = module.answer_loss(batch.replace(sample_id=torch.tensor([-1, -2, -3])))
    assert (nothing.loss.item(), nothing.weight) == (0.0, 0)


@torch.no_grad()
def test_packed_padding_rows_have_no_loss():
    module = ready()
    rows = [{"sample_id": index, "input_ids": TOKENS[index] * 2, "document_ids": [1] * 2 * len(TOKENS[index])} for index in range(3)]
    alone = module.answer_loss(batch_of(rows[:2]))
    filled = module.answer_loss(batch_of(rows).replace(sample_id=torch.tensor([0, 1, -3])))
    assert filled.loss.item() == pytest.approx(alone.loss.item(), abs=1e-6)
    assert filled.weight == alone.weight


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
    output = module.answer_loss(batch_of(rows))
    assert output.weight == 3 + 2 + 4
    assert output.loss.item() == pytest.approx(-total / 9, abs=1e-5)


# --- settings ---


def test_without_catalogue_no_weights():
    """Neither given nor from a data module: the Trainer refuses before weights are built."""
    module = SFT(language_model=tiny_config())
    module.configure_model()
    assert module.model is None
    with pytest.raises(MisconfigurationException, match=r"SFT needs `vocabulary`: pass SFT\(vocabulary=...\)"):
        quiet_trainer(Path()).fit(module, torch.utils.data.DataLoader(tiny_rows(4), collate_fn=batch_of))


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


def test_the_learning_rate_schedule_covers_the_whole_run(tmp_path):
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Folder of what one device computes."""
    root = tmp_path_factory.mktemp("global_batch")
    save_base(root / "base")
    global_batch_run.main(root)
    return root


def assert_equal_weights(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=0)


def test_four_accumulated_batches_are_one_step(alone):
    """Answers differ in length, so means of means would differ: the loss is over the tokens of the whole step."""
    assert_equal_weights(alone / "ranks1/full_4.safetensors", alone / "ranks1/full_1.safetensors")


@pytest.mark.ddp
def test_two_ranks_equal_one(alone):
    """With dropout 0, also with adapters whose blocks recompute their activations; and a test on two devices counts each row once."""
    launch([global_batch_run.__file__, alone])
    assert_equal_weights(alone / "ranks2/full_2.safetensors", alone / "ranks1/full_1.safetensors")
    assert_equal_weights(alone / "ranks2/lora_2.safetensors", alone / "ranks1/lora_2.safetensors")
    ours, theirs = (json.loads((alone / f"ranks{ranks}/test.json").read_text()) for ranks in (2, 1))
    assert ours == pytest.approx(theirs, abs=1e-5)


# --- sharded weights ---


def attached(module: SFT, **flags):
    """Give the module a strategy that shards weights, and note the flags that ranks exchange."""
    calls: list[tuple[bool, bool]] = []

    def reduce_boolean_decision(decision: bool, all: bool) -> bool:
        calls.append((decision, all))
        return decision

    module.trainer = SimpleNamespace(global_step=0, strategy=SimpleNamespace(reduce_boolean_decision=reduce_boolean_decision, **flags))
    return calls


def test_ranks_synchronise_every_step_with_sharded_weights():
    module = ready()
    expected = module.recommend(batch_of(tiny_rows(3)))
    calls = attached(module, zero_stage_3=True)
    assert torch.equal(module.recommend(batch_of(tiny_rows(3))).item_ids, expected.item_ids)
    assert calls
    assert not any(all_ranks for _, all_ranks in calls), "one rank that goes on keeps all going"


def test_ranks_are_independent_without_sharded_weights():
    module = ready()
    assert module.sync_any is None
    calls = attached(module, zero_stage_3=False)
    assert module.sync_any is None
    module.recommend(batch_of(tiny_rows(3)))
    assert not calls


@pytest.mark.parametrize("sharded", [True, False])
def test_sharded_weights_are_loaded_in_shards(monkeypatch, sharded):
    asked = {}

    def build(config, catalog, *, zero3_config):
        asked["zero3"] = zero3_config
        return build_language_model(config, catalog)

    monkeypatch.setattr(language_model, "build_language_model", build)
    module = SFT(language_model=tiny_config(), catalog=tiny_catalog())
    attached(module, zero_stage_3=sharded, config={"zero_optimization": {"stage": 3}})
    module.configure_model()
    assert asked["zero3"] == ({"zero_optimization": {"stage": 3}} if sharded else None)
