import pickle
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, DoublePrecision, FSDPPrecision, HalfPrecision, MixedPrecision, Precision
from torch.distributed.utils import _apply_to_tensors
from torch.utils.data import DataLoader

from malleable.datamodules.batch import AnswerBatch, Batch, PackedBatch, PreferenceBatch, QueryBatch
from malleable.datamodules.record import Record


class Weighted(PreferenceBatch):
    """A user's own batch: a weight for each row beside a preference."""

    purpose: ClassVar[str] = "testing"
    weight: torch.Tensor | None = None


class Nested(Batch):
    """A batch that holds another."""

    inner: Batch
    name: str = "outer"


def unexact(kind):
    """A batch of a class, with floats in every optional field that no half precision holds exactly."""
    values = {name: torch.ones(2, 1, dtype=torch.long) for name in kind.field_names()}
    for name in ("num_step_tokens", "num_step_rows"):
        if name in values:
            values[name] = torch.tensor(4012.5)
    for name in ("reference_logps", "weight"):
        if name in values:
            values[name] = torch.tensor([[-41.37, -3.1], [-40.03, -2.7]])
    return kind(**values)


# DeepSpeed's and FSDP's constructors take no notice of the device.
PLUGINS = {
    "32-true": Precision,
    "64-true": DoublePrecision,
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "16-mixed": lambda: MixedPrecision("16-mixed", "cpu"),
    "fsdp": lambda: FSDPPrecision("bf16-true"),
    "deepspeed": lambda: DeepSpeedPrecision("bf16-true"),
}


@pytest.mark.parametrize("kind", [AnswerBatch, PackedBatch, PreferenceBatch, QueryBatch, Weighted])
@pytest.mark.parametrize("plugin", PLUGINS)
def test_precision_plugins_do_not_change_a_batch(plugin, kind):
    if plugin == "deepspeed":
        pytest.importorskip("deepspeed")
    batch = unexact(kind)
    converted = PLUGINS[plugin]().convert_input(batch)
    assert converted is batch


def test_distributed_wrappers_do_not_cast_a_batch_either():
    batch = unexact(PreferenceBatch)
    (passed,) = _apply_to_tensors(lambda tensor: tensor.bfloat16(), [batch])
    assert passed is batch


def test_fields_are_those_of_all_classes_in_order():
    assert Weighted.field_names()[0] == "sample_id"
    assert Weighted.field_names()[-2:] == (PreferenceBatch.field_names()[-1], "weight")
    assert Weighted.field_names()[: len(AnswerBatch.field_names())] == AnswerBatch.field_names()


def test_a_missing_or_unknown_field():
    with pytest.raises(TypeError, match=r"PackedBatch: missing a required argument: 'input_ids'; the fields are sample_id, input_ids, "):
        PackedBatch(torch.arange(2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'reference_logps'"):
        unexact(AnswerBatch).replace(reference_logps=None)


def test_a_dataclass_is_refused():
    @dataclass
    class Decorated(Batch):
        features: torch.Tensor

    with pytest.raises(TypeError, match="Decorated must not be decorated with @dataclass"):
        Decorated(torch.zeros(2))


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda batch: pickle.loads(pickle.dumps(batch)), lambda batch: batch.replace(), lambda batch: batch.to("cpu")]
)
def test_copies_are_equal(copy):
    batch = unexact(Weighted)
    made = copy(batch)
    assert type(made) is Weighted
    assert made is not batch
    for name in Weighted.field_names():
        torch.testing.assert_close(getattr(made, name), getattr(batch, name), rtol=0, atol=0)


def test_a_replaced_field_leaves_the_original():
    batch = unexact(PreferenceBatch)
    assert batch.replace(reference_logps=None).reference_logps is None
    assert batch.reference_logps is not None


def test_nested_batches_are_moved():
    moved = Nested(torch.arange(2), Batch(torch.arange(3)), name="two").to("meta")
    assert (moved.inner.sample_id.device.type, moved.name) == ("meta", "two")


def test_copies_to_accelerators_do_not_block(monkeypatch):
    calls = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: calls.append(non_blocking) or original(tensor, device))
    for device in ("meta", "cpu"):
        Batch(torch.arange(2)).to(device)
    assert calls == [True, False]


def make_batch(rows):
    return unexact(PreferenceBatch).replace(sample_id=torch.tensor(rows))


def test_a_batch_from_a_worker_is_complete():
    (batch,) = DataLoader([3, 4], batch_size=2, collate_fn=make_batch, num_workers=1)
    assert type(batch) is PreferenceBatch
    assert batch.sample_id.tolist() == [3, 4]
    assert torch.equal(batch.reference_logps, unexact(PreferenceBatch).reference_logps)


def test_a_record_shows_shapes():
    assert (
        repr(Nested(torch.arange(2), Batch(torch.arange(3))))
        == "Nested(sample_id=(2,) torch.int64, inner=Batch(sample_id=(3,) torch.int64), name='outer')"
    )


def test_records_of_other_fields_are_independent():
    class Pair(NamedTuple):
        a: int
        b: int

    class Holds(Record):
        pair: Pair = Pair(1, 2)

    assert Holds().pair == (1, 2)
    assert Record.field_names() == ()
