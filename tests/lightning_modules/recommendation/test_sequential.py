"""SequentialRecommender: it learns, ranks, ignores padding rows, and refuses what it cannot read."""

from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from tiny import batch_of, tiny_catalog, tiny_rows
from tiny_data import quiet_trainer
from torch.utils.data import DataLoader
from toy_sequences import NUM_ITEMS, ToySequences, query_rows, sequence_catalog, training_rows

from malleable import BCE, BPR, CE, GBCE, EncoderSettings, Mixture, SampledCE, SequenceBatch, SequentialRecommender, Uniform, collate
from malleable.datamodules.negative_samplers import Popularity, Semantic
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sequence_inputs import layout_of

KINDS = ("sasrec", "gru4rec", "bert4rec", "hstu")


def small(kind="sasrec", **changes):
    options = {"dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "max_length": 12} | changes.pop("encoder", {})
    torch.manual_seed(0)
    return SequentialRecommender(EncoderSettings(kind, **options), **{"catalog": sequence_catalog(), "exclude_seen": False, **changes})


def built(kind="sasrec", **changes):
    module = small(kind, **changes)
    module.configure_model()
    return module


def steps(module, rows, count, lr=0.01):
    """Train on all rows for some steps."""
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    batch = collate(rows, SequenceBatch)
    for module.sampling_epoch in range(count):
        optimizer.zero_grad()
        loss = module.compute_loss(batch).loss
        loss.backward()
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_cyclic_sequences_are_learnt(kind):
    """The last item of every sequence, from the items before it."""
    module = steps(built(kind, encoder={"mask_rate": 0.4}), training_rows(64), 200)
    ends = [{"sample_id": row["sample_id"], "items": row["items"][:-1], "target": row["items"][-1], "seen": []} for row in training_rows(64)]
    ends = [end | {"times": row["times"][:-1]} for end, row in zip(ends, training_rows(64), strict=True)]
    batch = collate(ends, SequenceBatch)
    assert torch.equal(module.recommend(batch, 1).item_ids[:, 0], batch.target)


@pytest.mark.parametrize("loss", [SampledCE(), GBCE(), BCE(), BPR()])
def test_every_loss_learns(loss):
    module = steps(built(loss=loss, negatives=Uniform(8)), training_rows(64), 150)
    batch = collate(query_rows(20), SequenceBatch)
    assert (module.recommend(batch, 3).item_ids == batch.target[:, None]).any(1).float().mean() >= 0.9


def test_loss_at_all_positions_is_the_mean_over_prefixes():
    module, rows = built(), training_rows(5)
    prefixes = [{"sample_id": 0, "items": row["items"][:end], "target": row["items"][end]} for row in rows for end in range(1, len(row["items"]))]
    whole = module.compute_loss(collate(rows, SequenceBatch))
    expected = module.compute_loss(collate(prefixes, SequenceBatch))
    torch.testing.assert_close(whole.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert whole.weight == expected.weight == len(prefixes)


def test_padding_rows_do_not_count():
    module, rows = built(), training_rows(4)
    expected = module.compute_loss(collate(rows, SequenceBatch)).loss
    repeated = collate([*rows, rows[0] | {"sample_id": -1}], SequenceBatch)
    torch.testing.assert_close(module.compute_loss(repeated).loss, expected)


def test_targets_that_are_not_supervised_do_not_count():
    module = built()
    row = training_rows(1)[0]
    only = row | {"supervised": [False, False, True, *[False] * (len(row["items"]) - 3)]}
    query = {"sample_id": 0, "items": row["items"][:2], "target": row["items"][2]}
    torch.testing.assert_close(module.compute_loss(collate([only], SequenceBatch)).loss, module.compute_loss(collate([query], SequenceBatch)).loss)


def test_rows_of_prompts_and_answers_are_histories_with_one_target():
    """So that the module is a baseline in tests of language models."""
    module = SequentialRecommender(EncoderSettings(dim=16, num_heads=2, dropout=0.0), catalog=tiny_catalog())
    module.configure_model()
    rows = tiny_rows(6)
    queries = [{"sample_id": row["sample_id"], "items": row["history"], "target": row["item_ids"][0]} for row in rows]
    first, second = batch_of(rows), collate(queries, SequenceBatch)
    torch.testing.assert_close(module.scores(first), module.scores(second))
    assert torch.equal(module.recommend(first, 3).item_ids, module.recommend(second, 3).item_ids)
    torch.testing.assert_close(module.compute_loss(first).loss, module.compute_loss(second).loss)


def test_seen_items_and_other_candidates_are_not_recommended():
    module = built(exclude_seen=True)
    rows = [row | {"seen": row["items"]} for row in query_rows(6)]
    found = module.recommend(collate(rows, SequenceBatch), 10).item_ids
    assert all(not set(own) & set(row["items"]) for own, row in zip(found.tolist(), rows, strict=True))
    candidates = [row | {"candidates": [1, 5, 9]} for row in query_rows(6)]
    chosen = module.recommend(collate(candidates, SequenceBatch), 4).item_ids
    assert chosen[:, :3].sort(1).values.tolist() == [[1, 5, 9]] * 6
    assert (chosen[:, 3] == -1).all()


def test_a_long_history_is_read_from_its_end():
    module, items = built(), [step % NUM_ITEMS for step in range(30)]
    long, short = ([{"sample_id": 0, "items": own, "target": -1}] for own in (items, items[-12:]))
    torch.testing.assert_close(module.encode(collate(long, SequenceBatch)), module.encode(collate(short, SequenceBatch)))


def test_hidden_items_of_training_are_those_of_ranking():
    """Of a sequence whose last item is hidden in training, the input is that of ranking with the last item as the target."""
    module = built("bert4rec")
    row = training_rows(1)[0]
    batch = collate([row], SequenceBatch)
    query = collate([{"sample_id": 0, "items": row["items"][:-1], "target": row["items"][-1]}], SequenceBatch)
    masked = torch.zeros_like(batch.item_ids, dtype=torch.bool)
    masked[0, len(row["items"]) - 1] = True
    states = module._encode(batch, layout_of(batch), masked)
    torch.testing.assert_close(states[0, len(row["items"]) - 1], module.encode(query)[0], rtol=1e-5, atol=1e-6)


def test_hidden_items_depend_on_row_and_epoch_only():
    module, rows = built("bert4rec").train(), training_rows(6)
    batch = collate(rows, SequenceBatch)
    _, together = module._hide(batch)
    for index in (0, 4):
        _, alone = module._hide(collate(rows[index : index + 1], SequenceBatch))
        assert torch.equal(alone[0], together[index, : alone.shape[1]])
    module.sampling_epoch = 1
    assert not torch.equal(module._hide(batch)[1], together)
    assert not (together & (batch.item_ids < 0)).any()
    assert not together[:, 0].any(), "the first item is no target"


def test_some_sequences_hide_only_their_last_item():
    module, rows = built("bert4rec", encoder={"last_rate": 0.5}).train(), training_rows(64)
    hidden = module._hide(collate(rows, SequenceBatch))[1]
    only_last = sum(own.nonzero().flatten().tolist() == [len(row["items"]) - 1] for own, row in zip(hidden, rows, strict=True))
    assert 20 <= only_last <= 52


def test_negatives_are_no_targets_and_no_earlier_items():
    module = built(loss=BPR(), negatives=Popularity(64)).train()
    batch = collate(training_rows(8), SequenceBatch)
    draw = module._draw(batch, layout_of(batch), batch.supervised)
    found = draw(slice(None))
    row, column = batch.supervised // batch.targets.shape[1], batch.supervised % batch.targets.shape[1]
    for place, (r, c) in enumerate(zip(row.tolist(), column.tolist(), strict=True)):
        before = set(batch.item_ids[r, : c + 1].tolist()) | {int(batch.targets[r, c])}
        assert found.earlier[place].tolist() == [item in before for item in found.items[place].tolist()]
        assert found.is_target[place].tolist() == [item == int(batch.targets[r, c]) for item in found.items[place].tolist()]


def test_losses_of_rows_do_not_depend_on_the_batch():
    module, rows = built(loss=GBCE(), negatives=Mixture(4, [Uniform(4), Popularity(4)])), training_rows(6)
    together = module.compute_loss(collate(rows, SequenceBatch))
    apart = [module.compute_loss(collate([row], SequenceBatch)) for row in rows]
    mean = sum(output.loss * output.weight for output in apart) / sum(output.weight for output in apart)
    torch.testing.assert_close(together.loss, mean, rtol=1e-5, atol=1e-6)


def test_a_bare_trainer_with_the_users_own_loader(tmp_path):
    seed_everything(0)
    module = small(tuning=Tuning(lr=0.02, warmup_steps=0), behaviors=("view", "purchase"))
    loader = DataLoader(training_rows(64), batch_size=16, shuffle=True, collate_fn=lambda rows: collate(rows, SequenceBatch))
    test = DataLoader(query_rows(20), batch_size=20, collate_fn=lambda rows: collate(rows, SequenceBatch))
    trainer = quiet_trainer(tmp_path, max_epochs=40, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    (figures,) = trainer.test(module, test, verbose=False)
    assert figures["test_hr_1"] > 0.9
    assert figures["test_loss"] < 1
    (predicted,) = trainer.predict(module, test)
    assert predicted.item_ids.shape == (20, 10)


def test_mixed_precision_ranks_like_single_precision(tmp_path):
    module = steps(built(), training_rows(64), 100)
    batch = collate(query_rows(20), SequenceBatch)
    expected = module.scores(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.scores(batch)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_new_items_are_recommended_after_training_only(tmp_path):
    module = built(behaviors=("view", "purchase"))
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, ToySequences())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    catalog = sequence_catalog()
    more = replace(catalog, titles=(*catalog.titles, "New"), popularity=(*catalog.popularity, 0))
    loaded = SequentialRecommender.load_from_checkpoint(tmp_path / "saved.ckpt")
    loaded.catalog = more
    loaded._extend(len(more))
    batch = collate(query_rows(6), SequenceBatch)
    assert torch.equal(loaded.eval().scores(batch)[:, :NUM_ITEMS], module.eval().scores(batch))
    assert NUM_ITEMS not in loaded.recommend(batch, NUM_ITEMS + 1).item_ids
    loaded.on_train_start()
    assert NUM_ITEMS in loaded.recommend(batch, NUM_ITEMS + 1).item_ids


def test_other_types_of_interactions_than_those_of_the_checkpoint_are_refused(tmp_path):
    module = small(behaviors=("view", "purchase"))
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, ToySequences())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = SequentialRecommender.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert loaded.behaviors == ("view", "purchase")
    with pytest.raises(MisconfigurationException, match=r"the types of interactions \['view', 'purchase'\], got \['view', 'cart'\]"):
        SequentialRecommender.load_from_checkpoint(tmp_path / "saved.ckpt", behaviors=("view", "cart"))


def test_items_outside_the_catalogue_are_refused(tmp_path):
    rows = [*training_rows(7), {"sample_id": 99, "items": [1, 2, 25], "times": [1.0, 2.0, 3.0], "behaviors": [0, 0, 0]}]
    with pytest.raises(ValueError, match="item 25 in the row with sample_id 99 is not in the catalogue of 20 items, which have the numbers 0 to 19"):
        quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(small(), ToySequences(train=rows))
    queries = DataLoader([query_rows(1)[0] | {"target": 20}], collate_fn=lambda rows: collate(rows, SequenceBatch))
    with pytest.raises(ValueError, match="item 20 in the row with sample_id 0 is not in the catalogue"):
        quiet_trainer(tmp_path).test(built(), queries, verbose=False)


def test_what_cannot_be_read_is_refused():
    long = {"sample_id": 0, "items": [step % NUM_ITEMS for step in range(14)]}
    with pytest.raises(MisconfigurationException, match=r"has 13 items and a target, but encoder.max_length is 12"):
        built().compute_loss(collate([long], SequenceBatch))
    with pytest.raises(MisconfigurationException, match="'hstu' reads the times of the items, but these rows have none"):
        built("hstu").encode(collate([{"sample_id": 0, "items": [1], "target": 2}], SequenceBatch))
    with pytest.raises(ValueError, match="encode needs one history in each row"):
        built().encode(collate(training_rows(2), SequenceBatch))
    with pytest.raises(ValueError, match="has no effect: CE has no negatives"):
        small(loss=CE(), negatives=Uniform(3))
    with pytest.raises(ValueError, match="Semantic does not draw items from a fixed distribution"):
        small(loss=BPR(), negatives=Semantic())
    with pytest.raises(MisconfigurationException, match="has no weights yet"):
        small().encode(collate(query_rows(1), SequenceBatch))


def test_a_checkpoint_restores_loss_and_negatives(tmp_path, recwarn):
    module = small(loss=GBCE(t=0.5), negatives=Mixture(4, [Uniform(4), Popularity(4, exponent=0.5)], [1.0, 2.0]))
    assert not [warning for warning in recwarn if "nn.Module" in str(warning.message)]
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, ToySequences())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = SequentialRecommender.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert loaded.negatives == module.negatives
    assert loaded.loss.t == 0.5
    batch = collate(training_rows(6), SequenceBatch)
    assert torch.equal(loaded.eval().compute_loss(batch).loss, module.eval().compute_loss(batch).loss)


def test_training_goes_on_with_new_items(tmp_path):
    """Weights and moments of the optimizer get rows for the new items."""

    class More(ToySequences):
        extend_catalog = True

        def __init__(self, **changes):
            super().__init__(**changes)
            self.catalog = replace(self.catalog, titles=(*self.catalog.titles, "New"), popularity=(*self.catalog.popularity, 0))

    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(small(catalog=None), ToySequences())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module = small(catalog=None)
    quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(module, More(), ckpt_path=tmp_path / "saved.ckpt")
    batch = collate(query_rows(6), SequenceBatch)
    assert NUM_ITEMS in module.recommend(batch, NUM_ITEMS + 1).item_ids
    assert module.model.item.weight[NUM_ITEMS].abs().sum() > 0


@pytest.mark.parametrize("loss", [CE(), SampledCE(), GBCE(), BPR()])
def test_a_batch_without_targets_has_a_loss_of_zero(loss):
    module = built(loss=loss)
    for rows in ([{"sample_id": 0, "items": [4]}], [{"sample_id": 0, "items": [4], "target": -1}]):
        loss_value = module.train().compute_loss(collate(rows, SequenceBatch)).loss
        loss_value.backward()
        assert loss_value == 0


def test_a_sampled_validation_loss_does_not_depend_on_the_batch():
    module = built(loss=GBCE(), negatives=Uniform(4)).eval()
    rows = [{"sample_id": number, "items": list(range(length)), "target": length} for number, length in enumerate((3, 12))]
    together = module.compute_loss(collate(rows, SequenceBatch)).loss
    apart = [module.compute_loss(collate([row], SequenceBatch, pad_to_multiple_of=1)).loss for row in rows]
    torch.testing.assert_close(together, sum(apart) / 2)


def test_negatives_without_effect_are_refused_when_the_loss_is_chosen():
    with pytest.raises(ValueError, match="has no effect: CE has no negatives"):
        built(negatives=Popularity(64))


def test_settings_of_a_default_encoder_are_stored():
    assert SequentialRecommender().settings() == SequentialRecommender(EncoderSettings()).settings()
    assert SequentialRecommender().settings()["encoder.kind"] == "sasrec"


def test_types_of_interactions_that_the_module_does_not_have_are_refused():
    module, batch = built(behaviors=("view",)), collate(training_rows(2), SequenceBatch)
    with pytest.raises(ValueError, match="`behaviors` has the type 1, but the module has 1 types of interactions"):
        module.check_items(batch)


def test_padded_states_stay_zero_in_training():
    module = steps(built(), training_rows(8), 10)
    batch = collate(training_rows(8), SequenceBatch)
    states = module._encode(batch, layout_of(batch), None)
    assert (states[batch.item_ids < 0] == 0).all()
