"""Encoders of sequences: causality, padding, packing, relabelling, and gradients, for all kinds."""

import pytest
import torch
from toy_sequences import NUM_ITEMS, packed_row, query_rows, training_rows

from malleable.datamodules.collate import collate_sequences
from malleable.lightning_modules.functional.recommendation.hstu import time_buckets
from malleable.lightning_modules.functional.recommendation.sequence_layout import SequenceLayout
from malleable.lightning_modules.recommendation.sequence_inputs import layout_of
from malleable.lightning_modules.recommendation.sequence_settings import EncoderSettings

KINDS = ("sasrec", "gru4rec", "bert4rec", "hstu")
CAUSAL = ("sasrec", "gru4rec", "hstu")


def encoder(kind, num_behaviors=0):
    torch.manual_seed(0)
    made = EncoderSettings(kind=kind, dim=16, num_layers=2, num_heads=2, dropout=0.0, max_length=12).build(NUM_ITEMS, num_behaviors)
    with torch.no_grad():  # the biases of HSTU start at 0, which would hide mistakes
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def states_of(model, batch, layout=None, **changes):
    batch = batch.replace(**changes)
    return model(batch.item_ids, layout or layout_of(batch), batch.times, batch.behaviors)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_later_item_does_not_change_earlier_states(kind):
    model, batch = encoder(kind), collate_sequences(training_rows(4))
    before = states_of(model, batch)
    items = batch.item_ids.clone()
    items[:, 3] = (items[:, 3] + 7) % NUM_ITEMS
    after = states_of(model, batch, item_ids=items)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_a_later_item_changes_earlier_states_of_bert4rec():
    model, batch = encoder("bert4rec"), collate_sequences(training_rows(4))
    items = batch.item_ids.clone()
    items[:, 3] = (items[:, 3] + 7) % NUM_ITEMS
    assert not torch.allclose(states_of(model, batch)[:, 0], states_of(model, batch, item_ids=items)[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_changes_no_state(kind):
    model = encoder(kind)
    batch = collate_sequences(training_rows(4)[:1])
    length = int((batch.item_ids >= 0).sum())
    expected = states_of(model, batch)[0, :length]

    def shifted(values, fill):
        return torch.cat([values.new_full((1, 5), fill), values[:, :length]], 1)

    changes = {"item_ids": shifted(batch.item_ids, -1), "times": shifted(batch.times, 0), "behaviors": shifted(batch.behaviors, -1)}
    found = states_of(model, batch, **changes, num_sequences=None, longest=None)[0]
    torch.testing.assert_close(found[5:], expected, rtol=0, atol=1e-6)
    assert (found[:5] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_items_gives_zeros_and_no_nan(kind):
    model = encoder(kind)
    rows = [{"sample_id": 0, "items": [], "target": 1, "times": []}, {"sample_id": 1, "items": [1, 2], "target": 3, "times": [1.0, 2.0]}]
    states = states_of(model, collate_sequences(rows), behaviors=None)
    assert (states[0] == 0).all()
    assert states.isfinite().all()
    states.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_have_the_states_of_separate_rows(kind):
    model, rows = encoder(kind, num_behaviors=2), training_rows(6)
    apart = states_of(model, collate_sequences(rows))
    together = states_of(model, collate_sequences([packed_row(rows[:4]), packed_row(rows[4:])]))
    lengths = [len(row["items"]) for row in rows]
    expected = torch.cat([states[:length] for states, length in zip(apart, lengths, strict=True)])
    packed = torch.cat([together[0, : sum(lengths[:4])], together[1, : sum(lengths[4:])]])
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_relabelled_items_have_permuted_scores(kind):
    model, batch = encoder(kind), collate_sequences(query_rows(5))
    scores = states_of(model, batch)[:, -1] @ model.item.weight.T
    order = torch.randperm(NUM_ITEMS)
    position = order.argsort()
    relabelled = torch.where(batch.item_ids >= 0, position[batch.item_ids.clamp_min(0)], -1)
    model.item.weight.data = model.item.weight.data[order]
    found = states_of(model, batch, item_ids=relabelled)[:, -1] @ model.item.weight.T
    torch.testing.assert_close(found, scores[:, order])


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_interactions_change_states(kind):
    model, batch = encoder(kind, num_behaviors=2), collate_sequences(query_rows(5))
    assert not torch.allclose(states_of(model, batch), states_of(model, batch, behaviors=1 - batch.behaviors.clamp_min(0)))
    unknown = states_of(model, batch, behaviors=None)
    torch.testing.assert_close(states_of(model, batch, behaviors=torch.full_like(batch.behaviors, -1)), unknown)


def test_hstu_reads_differences_of_time_only():
    model, batch = encoder("hstu"), collate_sequences(query_rows(5))
    torch.testing.assert_close(states_of(model, batch, times=batch.times + 12345.0 * (batch.item_ids >= 0)), states_of(model, batch))
    assert not torch.allclose(states_of(model, batch, times=batch.times * 64), states_of(model, batch))


def test_hstu_equals_a_loop_over_positions():
    model, batch = encoder("hstu"), collate_sequences(query_rows(1))
    unit = model.units[0]
    x = torch.randn(1, 8, 16)
    layout = layout_of(batch)
    distance = (torch.arange(8)[:, None] - torch.arange(8)).clamp(0)
    buckets = time_buckets(batch.times, 64)
    found = unit(x, layout.attention_mask(), distance, buckets)
    gate, value, query, key = torch.nn.functional.silu(unit.expand(unit.input_norm(x)))[0].split(16, -1)
    for i in layout.real[0].nonzero().flatten().tolist():
        heads = []
        for head in range(2):
            own = slice(8 * head, 8 * head + 8)
            total = torch.zeros(8)
            for j in range(i + 1):
                if layout.real[0, j]:
                    bias = (
                        unit.position_bias.weight[layout.position[0, i] - layout.position[0, j], head] + unit.time_bias.weight[buckets[0, i, j], head]
                    )
                    total = total + torch.nn.functional.silu(query[i, own] @ key[j, own] + bias) / 12 * value[j, own]
            heads.append(total)
        expected = x[0, i] + unit.output(unit.attention_norm(torch.cat(heads)) * gate[i])
        torch.testing.assert_close(found[0, i], expected, rtol=1e-5, atol=1e-6)


def test_times_in_a_bucket_grow_with_the_difference():
    times = torch.tensor([[0.0, 1.0, 60.0, 86400.0, 1e12]], dtype=torch.float64)
    buckets = time_buckets(times, 64)[0, :, 0].tolist()
    assert buckets == sorted(buckets)
    assert buckets[:2] == [0, 0]
    assert buckets[-1] == 63


def test_layout_of_packed_rows():
    layout = SequenceLayout.of(torch.tensor([[1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1]]), 3, 5)
    assert layout.position.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]]
    assert layout.sequence_number().tolist() == [[0, 0, 1, 1, 1, -1], [-1, 2, 2, 2, 2, 2]]
    mask = layout.attention_mask()[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    states = torch.randn(2, 6, 4) * layout.real[..., None]
    rows = layout.unpack(states)
    assert rows.shape == (3, 5, 4)
    assert torch.equal(rows[1, :3], states[0, 2:5])
    assert (rows[0, 2:] == 0).all()
    assert torch.equal(layout.pack(rows), states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "encoder.dim must be >= 1, got 0"),
        ({"dim": 10, "num_heads": 4}, "encoder.dim 10 must be a multiple of encoder.num_heads 4"),
        ({"dropout": 1.0}, "encoder.dropout must be >= 0 and < 1, got 1.0"),
        ({"mask_rate": 0.0}, "encoder.mask_rate must be > 0 and < 1, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EncoderSettings(**changes)
