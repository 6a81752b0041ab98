"""The default optimizer and schedule of language models."""

import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from tiny import tiny_config
from tiny_data import TinyData, quiet_trainer

from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.recommendation.sft import SFT


class StopAfter(Callback):
    """End a run that has no end of its own, and note the rates until then."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        trainer.should_stop = len(self.rates) >= 4


@pytest.mark.parametrize("limit", [{"max_epochs": -1}, {"max_epochs": -1, "max_time": timedelta(hours=1)}, {"max_steps": -1, "max_epochs": -1}])
def test_an_unbounded_run_keeps_the_peak_rate_with_a_warning(tmp_path, limit):
    watch = StopAfter()
    trainer = quiet_trainer(tmp_path, **limit, limit_val_batches=0, enable_checkpointing=False, callbacks=[watch])
    with pytest.warns(UserWarning, match=r"tuning.decay: linear needs a number of steps, .* set trainer.max_epochs or trainer.max_steps"):
        trainer.fit(SFT(tiny_config(), tuning=Tuning(lr=0.01, warmup_steps=2)), TinyData())
    assert watch.rates == [0.01] * 4


def test_a_constant_rate_gives_no_warning():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = Tuning(decay="constant", warmup_steps=0).scheduler(optimizer, float("inf"))
    assert schedule.get_last_lr() == [1.0]
