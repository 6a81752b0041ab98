import csv
import warnings

import pytest
import torch
from boring import BoringBatch, BoringDataModule, BoringModule, Ragged
from launch import launch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from malleable.lightning_modules.base import BaseModule, LossOutput


def trainer(tmp_path, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path, **quiet, **arguments})


def ready(module):
    module.configure_model()
    return module


class RequiresRows(BoringModule):
    """Takes the number of rows from the data module."""

    required_from_datamodule = ("num_rows",)

    def __init__(self, num_rows=None):
        super().__init__()
        self.num_rows = num_rows


def test_attributes_are_copied_from_the_data_module(tmp_path):
    module = RequiresRows()
    trainer(tmp_path).fit(module, BoringDataModule(num_rows=12))
    assert module.num_rows == 12


def test_attributes_of_the_constructor_are_kept(tmp_path):
    module = RequiresRows(num_rows=5)
    trainer(tmp_path).fit(module, BoringDataModule(num_rows=12))
    assert module.num_rows == 5


def test_a_missing_required_attribute_is_an_error(tmp_path):
    loader = DataLoader([0.0])
    with pytest.raises(MisconfigurationException, match=r"RequiresRows needs `num_rows`: pass RequiresRows\(num_rows=...\)"):
        trainer(tmp_path).fit(RequiresRows(), loader)


def test_matrices_decay_and_vectors_do_not():
    groups = ready(BoringModule()).parameter_groups()
    assert [[tuple(parameter.shape) for parameter in group["params"]] for group in groups] == [[(2, 4)], [(2,)]]
    assert groups[1]["weight_decay"] == 0.0
    assert "weight_decay" not in groups[0]  # the optimizer's own


def test_a_partitioned_matrix_is_still_a_matrix():
    # DeepSpeed stage 3 empties a parameter and notes its shape.
    module = ready(BoringModule())
    module.layer.weight = torch.nn.Parameter(torch.empty(0))
    module.layer.weight.ds_shape = torch.Size((2, 4))
    assert module.parameter_groups()[0]["params"] == [module.layer.weight]


def test_an_error_without_trainable_parameters():
    module = ready(BoringModule()).requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="BoringModule has no trainable parameter"):
        module.parameter_groups()


def test_the_optimizer_and_the_schedule_may_be_given():
    module = BoringModule(
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5), lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)
    )
    made = ready(module).configure_optimizers()
    assert isinstance(made["optimizer"], torch.optim.SGD)
    assert made["lr_scheduler"]["interval"] == "step"


def test_by_default_adamw_at_a_constant_rate():
    assert isinstance(ready(BoringModule()).configure_optimizers(), torch.optim.AdamW)


def test_losses_and_metrics_are_logged_by_split(tmp_path):
    module = BoringModule()
    fitted = trainer(tmp_path)
    fitted.fit(module, BoringDataModule())
    assert {"train_loss", "val_loss", "val_distance", "val_mean_output"} <= fitted.callback_metrics.keys()
    fitted.test(module, BoringDataModule())
    assert {"test_loss", "test_distance", "test_mean_output"} <= fitted.callback_metrics.keys()


def test_metrics_are_reset_before_each_evaluation(tmp_path):
    module, data = BoringModule(), BoringDataModule()
    measured = trainer(tmp_path)
    first, second = (measured.test(module, data, verbose=False)[0]["test_mean_output"] for _ in range(2))
    assert first == second


def test_accumulated_steps_equal_one_large_step(tmp_path):
    weights = []
    for size in (2, 8):
        torch.manual_seed(0)
        module = BoringModule(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
        trainer(tmp_path).fit(module, BoringDataModule(batch_size=size, global_batch_size=8))
        weights.append(module.layer.weight)
    torch.testing.assert_close(*weights)


STEP_LOSSES = """
import sys
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from boring import BoringDataModule, BoringModule

torch.manual_seed(0)
module = BoringModule(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
devices = int(sys.argv[1])
quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
strategy = "ddp" if devices > 1 else "auto"
trainer = Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, log_every_n_steps=1, logger=CSVLogger(sys.argv[2]), **quiet)
trainer.fit(module, BoringDataModule(batch_size=2, global_batch_size=8))
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_the_logged_training_loss_is_that_of_the_whole_step(tmp_path):
    # Four batches of two rows on one device, two batches on each of two: the same steps of eight rows.
    curves = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        launch(["-c", STEP_LOSSES, str(devices), folder], ranks=devices, cwd=tmp_path)
        rows = list(csv.DictReader(next(folder.rglob("metrics.csv")).open()))
        curves.append([(row["step"], float(row["train_loss"])) for row in rows if row["train_loss"]])
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert len(curves[0]) == 2
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], rel=1e-6)


REPEATS = """
import torch
from torch.utils.data import DataLoader
from lightning.pytorch import Trainer
from boring import BoringBatch, BoringModule

torch.manual_seed(0)
rows = [(index, torch.full((4,), float(index))) for index in range(5)]
collate = lambda rows: BoringBatch(torch.tensor([index for index, _ in rows]), torch.stack([features for _, features in rows]))
module = BoringModule(width=1)
module.configure_model()
torch.nn.init.constant_(module.layer.weight, 0.25)
torch.nn.init.zeros_(module.layer.bias)
quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet)
(result,) = trainer.test(module, DataLoader(rows, batch_size=2, collate_fn=collate), verbose=False)
print(trainer.world_size, result["test_mean_output"])
"""


@pytest.mark.ddp
def test_rows_repeated_by_a_sampler_count_once(tmp_path):
    # 5 rows on 2 devices: the sampler repeats row 0. The outputs are 0, 1, 2, 3, 4, their mean is 2; with the repeat it would be 10 / 6.
    outputs = launch(REPEATS, ranks=2, cwd=tmp_path)
    assert [output.split() for output in outputs] == [["2", "2.0"]] * 2


def test_a_batch_of_padding_rows_has_no_effect(tmp_path):
    module = ready(BoringModule())
    metrics = module.configure_metrics()
    module.evaluate(BoringBatch(torch.tensor([0, 1]), torch.zeros(2, 4)), metrics)
    expected = metrics["output"].compute()
    module.evaluate(BoringBatch(torch.tensor([-1, -2]), torch.ones(2, 4)), metrics)
    assert metrics["output"].compute() == expected


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BaseModule()


@pytest.mark.parametrize("resumed_at", [1, 3])
def test_random_numbers_of_a_step_depend_on_its_number_only(tmp_path, resumed_at, monkeypatch):
    module = ready(BoringModule())
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    module.trainer = trainer(tmp_path)
    module.on_train_batch_start(None, resumed_at)
    first = torch.rand(3)
    torch.rand(7)
    module.on_train_batch_start(None, resumed_at)
    assert torch.equal(torch.rand(3), first)
    module.on_train_batch_start(None, resumed_at + 1)
    assert not torch.equal(torch.rand(3), first)


def test_every_seed_of_lightning_is_supported(tmp_path, monkeypatch):
    module = ready(BoringModule())
    monkeypatch.setenv("PL_GLOBAL_SEED", str(2**32 - 1))
    module.trainer = trainer(tmp_path)
    module.on_train_batch_start(None, 7)
    assert torch.rand(1) != torch.rand(1)


class Noisy(BoringModule):
    """Drops features, and notes the losses of its steps."""

    def __init__(self):
        super().__init__(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
        self.losses: list[float] = []

    def compute_loss(self, batch):
        loss = torch.nn.functional.dropout(self(batch.features), 0.5).square().mean()
        self.losses.append(loss.item())
        return LossOutput(loss, {})


def test_dropout_repeats_from_run_to_run_and_changes_from_step_to_step(tmp_path):
    """Whatever was drawn before a step, it drops the same; the same rows are dropped otherwise in the next epoch."""
    runs = []
    for drawn in (0, 11):
        module = Noisy()
        torch.manual_seed(0)
        module.configure_model()
        torch.rand(drawn)
        trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(module, BoringDataModule(num_rows=4))
        runs.append(module.losses)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_the_order_of_hooks(tmp_path, monkeypatch):
    """Needs are known before weights, weights before optimizers; metrics are made at the first evaluation, once a split."""
    module, calls = BoringModule(), []

    def recorded(name):
        hook = getattr(module, name)

        def record(*arguments, **settings):
            calls.append(name)
            return hook(*arguments, **settings)

        return record

    for name in ("setup", "configure_model", "configure_optimizers", "configure_metrics"):
        monkeypatch.setattr(module, name, recorded(name))
    fitted = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    fitted.fit(module, BoringDataModule())
    assert calls == ["setup", "configure_model", "configure_optimizers", "configure_metrics"]
    calls.clear()
    fitted.test(module, BoringDataModule(), verbose=False)
    assert calls == ["setup", "configure_model", "configure_metrics"]


@pytest.mark.parametrize(("weighed", "expected"), [(None, 2.0), (int, 3.0), (torch.Tensor, 3.0)])
def test_a_mean_over_batches_is_weighed(tmp_path, weighed, expected):
    """Batches (0 1) (2 3) (4): the mean over rows is 10/5 = 2, over parts (0 + 1 + 4 + 9 + 16) / 10 = 3; equal batches would give 2.33 and 2.53."""
    (result,) = trainer(tmp_path).test(Ragged(weighed), BoringDataModule(num_rows=5, batch_size=2), verbose=False)
    assert result["test_loss"] == pytest.approx(expected)


def test_a_batch_of_repeated_rows_has_no_loss(tmp_path):
    """Its mean is 0 / 0, and must not spoil that of the others."""
    batches = [BoringBatch(torch.tensor(ids), torch.ones(2, 4)) for ids in ([1, 3], [-1, -4])]
    for weighed, expected in ((None, 2.0), (torch.Tensor, 2.5)):
        (result,) = trainer(tmp_path).test(Ragged(weighed), DataLoader(batches, batch_size=None), verbose=False)
        assert result["test_loss"] == pytest.approx(expected)


def test_an_interrupted_evaluation_has_no_effect_on_the_next(tmp_path, monkeypatch):
    """The next one starts with empty losses and metrics."""
    module, measured = Ragged(torch.Tensor), trainer(tmp_path)
    expected = measured.test(module, BoringDataModule(num_rows=5), verbose=False)
    forward, calls = BoringModule.forward, []

    def interrupted(self, features):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("interrupted")
        return forward(self, features)

    monkeypatch.setattr(BoringModule, "forward", interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        measured.test(module, BoringDataModule(num_rows=8), verbose=False)
    assert measured.test(module, BoringDataModule(num_rows=5), verbose=False) == expected


WEIGHED = """
import torch
from lightning.pytorch import Trainer
from boring import BoringDataModule, Ragged

quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet)
for weighed in (None, int, torch.Tensor):
    (result,) = trainer.test(Ragged(weighed), BoringDataModule(num_rows=7, batch_size=2), verbose=False)
    print(result["test_loss"], end=" ")
"""


@pytest.mark.ddp
def test_uneven_ranks_give_the_mean_over_rows(tmp_path):
    """Rows 0..6 on two ranks, one of them repeated: 21/7 and 91/21, on each rank; a mean of the ranks' weights rounded down is neither."""
    outputs = launch(WEIGHED, ranks=2, cwd=tmp_path)
    for output in outputs:
        assert [float(value) for value in output.split()] == pytest.approx([21 / 7, 91 / 21, 91 / 21], rel=1e-6)


class LogsItsOwn(BoringModule):
    def validation_step(self, batch, batch_idx):
        self.log("val_own", batch.features.mean(), on_epoch=True, batch_size=len(batch.features))
        return super().validation_step(batch, batch_idx)


def test_only_values_of_a_user_are_recommended_to_be_synchronized(tmp_path, monkeypatch):
    monkeypatch.setattr(result, "_distributed_is_initialized", lambda: True)
    result.warning_cache.clear()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        trainer(tmp_path).validate(LogsItsOwn(), BoringDataModule(), verbose=False)
    found = [str(warning.message) for warning in shown if "sync_dist=True" in str(warning.message)]
    assert ["'val_own'" in message for message in found] == [True]
