"""Fit, test and predict on two processes give the tables, the report and the predictions of one."""

import contextlib
import runpy

import pytest
import torch
from launch import launch

SCRIPT = """
import os
import torch
from lightning.pytorch import Trainer
from malleable.callbacks.report.exposure import ExposureReport
from malleable.callbacks.report.baselines import Baselines
from malleable.callbacks.predictions import PredictionWriter
from malleable.callbacks.report.report import RunReport
from malleable.lightning_modules.recommendation.baselines import Markov
from toy_shop import ToyShop

ranks, folder = int(os.environ.get("WORLD_SIZE", 1)), "ranks" + os.environ.get("WORLD_SIZE", "1")
module = Markov(ks=(1, 3))
data = ToyShop(num_users=13, batch_size=4 // ranks, global_batch_size=4, popularity=False)
trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2, logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
                  callbacks=[RunReport(), Baselines(), ExposureReport(), PredictionWriter()])
trainer.fit(module, data)
trainer.test(module, data, verbose=False)
trainer.predict(module, data)
if trainer.is_global_zero:
    assert len(data.train_dataset) % 4, "the last rows fill no global batch"
    assert int(module.num_rows) == len(data.train_dataset)
    torch.save(dict(module.named_buffers()), f"{folder}/tables.pt")
"""


def run_alone_and_on_two_ranks(code, folder):
    """Run a script in a folder, in this process and on two ranks."""
    script = folder / "run.py"
    script.write_text(code)
    with contextlib.chdir(folder):
        runpy.run_path(str(script))
    launch([script], ranks=2, cwd=folder)


@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path):
    run_alone_and_on_two_ranks(SCRIPT, tmp_path)
    one, two = tmp_path / "ranks1", tmp_path / "ranks2"
    for name in ("predictions.csv", "predictions.jsonl", "report/metrics.json", "report/most_recommended_titles.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    own, other = (torch.load(folder / "tables.pt", weights_only=True) for folder in (one, two))
    assert own.keys() == other.keys() == {"num_rows", "counts", "pairs", "transitions"}
    for name, table in own.items():
        assert table.sum() > 0
        assert torch.equal(table, other[name]), name


UNEVEN = """
import os, sys
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset
from malleable.callbacks.report.exposure import ExposureReport
from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.lightning_modules.base import BaseModule, LossOutput
from malleable.lightning_modules.recommendation.baselines import Popularity
from toy_shop import ToyShop


class WithLoss(Popularity):
    log_loss = BaseModule.log_loss

    def compute_loss(self, batch):
        return LossOutput(batch.target.float().mean(), {"squares": batch.target.float().square().mean()})


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


ranks, data = int(os.environ.get("WORLD_SIZE", 1)), ToyShop()
data.setup("test")
# All rows are those of the first rank; the second one sees no batch.
rows = [data.test_dataset[index] for index in range(5)] if os.environ.get("RANK", "0") == "0" else []
module, exposure, loop = WithLoss(data.catalog, ks=(2,)), ExposureReport(), SelfPlayLoop(rounds=1)
module.configure_model()
module.num_rows.fill_(1)
loop.state.before = {"figures": {}, "counts": torch.zeros(8, dtype=torch.long)}
trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False, callbacks=[exposure, loop])
(figures,) = trainer.test(module, DataLoader(Stream(rows), batch_size=2, collate_fn=data.collate), verbose=False)
found = {name: figures[name] for name in ("test_loss", "test_squares", "test_hr_2", "test_coverage_2")}
torch.save([found, exposure.recommended, loop._comparison.counts], f"ranks{ranks}-{os.environ.get('RANK', '0')}.pt")
"""


@pytest.mark.ddp
def test_rank_without_batches_joins_all_reductions(tmp_path):
    """An iterable dataset may end on one rank before its first batch; nothing waits for that rank, and all have the figures of all rows."""
    run_alone_and_on_two_ranks(UNEVEN, tmp_path)
    expected, *counts = torch.load(tmp_path / "ranks1-0.pt", weights_only=True)
    assert [table.sum().item() for table in counts] == [10, 10]
    for rank in (0, 1):
        found, *others = torch.load(tmp_path / f"ranks2-{rank}.pt", weights_only=True)
        assert found == pytest.approx(expected)
        assert all(map(torch.equal, others, counts))
