"""What SelfPlayLoop refuses: values, limits and Trainers that do not go with it."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from self_play_run import make_loop, make_module
from tiny import batch_of, tiny_catalog, tiny_rows
from tiny_data import TinyData, quiet_trainer
from torch.utils.data import DataLoader

from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.callbacks.self_play.phases import PhaseSettings


def run(folder, loop=None, module=None):
    trainer = quiet_trainer(folder, max_epochs=-1, callbacks=[loop or make_loop()])
    trainer.fit(module or make_module(dropout=0.0), TinyData())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": -1}, "phase.epochs must be >= 0, got -1"),
        ({"warmup_steps": -2}, "phase.warmup_steps must be >= 0, got -2"),
        ({"lr": 0.0}, "phase.lr must be > 0, got 0.0"),
        ({"rows": 0}, "phase.rows must be >= 1, got 0"),
        ({"batch_factor": 0}, "phase.batch_factor must be >= 1, got 0"),
    ],
)
def test_invalid_phase_settings(values, message):
    with pytest.raises(ValueError, match=message):
        PhaseSettings(**values)


def test_unsuitable_limits_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="max_epochs=3 has no effect: SelfPlayLoop sets the number of epochs, 6 with"):
        make_loop().setup(quiet_trainer(tmp_path, max_epochs=3), make_module(), "fit")
    with pytest.raises(MisconfigurationException, match="EarlyStopping could end the run in the middle of a round"):
        make_loop().setup(quiet_trainer(tmp_path, max_epochs=-1, callbacks=[EarlyStopping("val_loss")]), make_module(), "fit")
    for epochs in (-1, 6):
        make_loop().setup(quiet_trainer(tmp_path, max_epochs=epochs), make_module(), "fit")
    make_loop().setup(quiet_trainer(tmp_path, fast_dev_run=True), make_module(), "fit")


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="rounds must be >= 0, got -1"):
        SelfPlayLoop(rounds=-1)
    with pytest.raises(ValueError, match="rows_per_round must be >= 1 or null, got 0"):
        SelfPlayLoop(rows_per_round=0)
    with pytest.raises(ValueError, match="diagnostic_rows must be >= 0, got -1"):
        SelfPlayLoop(diagnostic_rows=-1)
    with pytest.raises(ValueError, match="the loop has no epochs"):
        SelfPlayLoop(rounds=0, warmup=PhaseSettings(epochs=0))
    with pytest.warns(UserWarning, match="3 preference epochs per round"):
        SelfPlayLoop(dpo=PhaseSettings(epochs=3))
    with pytest.raises(ValueError, match="a round needs 64 rows, but there are 48"):
        run(tmp_path, make_loop(rows_per_round=64))
    with pytest.raises(MisconfigurationException, match="the warm-up has 2 rows, but an optimizer step needs"):
        run(tmp_path, make_loop(warmup=PhaseSettings(epochs=1, rows=2)))
    with pytest.raises(MisconfigurationException, match="a round has 32 rows, but an optimizer step of the sft phase needs 40"):
        run(tmp_path, make_loop(sft=PhaseSettings(batch_factor=10)))
    scheduled = make_module()
    scheduled.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(MisconfigurationException, match="sets the learning rates; omit lr_scheduler"):
        run(tmp_path, module=scheduled)
    unscheduled = make_module()
    unscheduled.default_lr_scheduler = scheduled.lr_scheduler
    with pytest.raises(MisconfigurationException, match="sets the learning rates; SPRec has its own schedule; use SPRec"):
        run(tmp_path, module=unscheduled)

    class Mute(LightningModule):
        pass

    with pytest.raises(MisconfigurationException, match="needs a module with the method `generate_negatives`, such as SPRec; Mute does not have it"):
        make_loop().setup(quiet_trainer(tmp_path), Mute(), "fit")
    plain = DataLoader(tiny_rows(8), batch_size=4, collate_fn=batch_of)
    module = make_module()
    module.catalog = tiny_catalog()
    with pytest.raises(MisconfigurationException, match="needs a PhasedLoader"):
        quiet_trainer(tmp_path, max_epochs=-1, callbacks=[make_loop(loader=plain)]).fit(module, plain)


def test_rounds_without_validation_are_reported(tmp_path, caplog):
    def check(warmup, every):
        caplog.clear()
        loop = make_loop(warmup=PhaseSettings(epochs=warmup))
        trainer = quiet_trainer(tmp_path, max_epochs=-1, check_val_every_n_epoch=every)
        with caplog.at_level("INFO"):
            loop.setup(trainer, make_module(), "fit")
        return "no round ends with a validation" in caplog.text

    assert [check(2, 1), check(2, 2), check(3, 2)] == [False, False, True]
