"""Fit, test and predict on two processes give the tables, the report and the predictions of one."""

import runpy

import pytest
import torch
from launch import launch

SCRIPT = """
import os
import torch
from lightning.pytorch import Trainer
from malleable.callbacks.exposure import ExposureReport
from malleable.callbacks.floors import Floors
from malleable.callbacks.predictions import PredictionWriter
from malleable.callbacks.report import RunReport
from malleable.lightning_modules.baselines import Markov
from toy_shop import ToyShop

ranks, folder = int(os.environ.get("WORLD_SIZE", 1)), "ranks" + os.environ.get("WORLD_SIZE", "1")
module = Markov(ks=(1, 3))
data = ToyShop(num_users=11, batch_size=4 // ranks, global_batch_size=4, popularity=False)
trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=2, logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
                  callbacks=[RunReport(), Floors(), ExposureReport(), PredictionWriter()])
trainer.fit(module, data)
trainer.test(module, data, verbose=False)
trainer.predict(module, data)
if trainer.is_global_zero:
    torch.save(dict(module.named_buffers()), f"{folder}/tables.pt")
"""


@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    launch([script], ranks=2, cwd=tmp_path)
    one, two = tmp_path / "ranks1", tmp_path / "ranks2"
    for name in ("predictions.csv", "predictions.jsonl", "report/metrics.json", "report/most_recommended_titles.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    own, other = (torch.load(folder / "tables.pt", weights_only=True) for folder in (one, two))
    assert own.keys() == other.keys() == {"num_rows", "counts", "pairs", "transitions"}
    for name, table in own.items():
        assert table.sum() > 0
        assert torch.equal(table, other[name]), name
