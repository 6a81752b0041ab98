"""Knowledge-graph embeddings on a device: the CPU's start, losses, gradients and ranks, every precision, a kill, no wait within a step."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from launch import HELPERS, launch
from safetensors.torch import load_file
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData, collate_queries, grouped_rows, query_rows, tiny_graph, tiny_triples
from toy_graph import write_toy_graph

from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.point_embeddings import ComplEx, DistMult, RotatE, TransE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning, Init
from malleable.lightning_modules.losses.embedding import DURA, BCESum, KvsAll, NegativeSampling, Softmax

pytestmark = pytest.mark.gpu

ROWS = query_rows(tiny_triples())
MODELS = {
    **{kind: lambda kind=kind, **settings: NFE(kind, **settings) for kind in ("nfe1", "nfe2", "nfe3", "affine_point", "sigma")},
    **{kind.__name__: kind for kind in (TransE, DistMult, ComplEx, RotatE)},
}
LOSSES = {"BCESum": BCESum(), "BCESum in chunks": BCESum(0.1, chunk=5), "Softmax": Softmax(chunk=5), "KvsAll": KvsAll(), "drawn": NegativeSampling(4)}


def make(model, device, **settings):
    torch.manual_seed(0)
    module = MODELS[model](**{"dimension": 32, "graph": tiny_graph(), "init": Init(scale=0.8), **settings})
    with torch.device(device):  # as a strategy sets its device
        module.configure_model()
    return module.to(device)


def loss_and_gradients(model, loss, device):
    module = make(model, device, loss=LOSSES[loss], regulariser=DURA())
    value = module.compute_loss(collate_queries(grouped_rows(ROWS)).to(device)).loss
    value.backward()
    return [value.detach().cpu(), *(table.weight.grad.to_dense().cpu() for table in module.tables)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_equal_those_of_a_cpu(model, loss, device):
    for own, other in zip(loss_and_gradients(model, loss, device), loss_and_gradients(model, loss, torch.device("cpu")), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5 * max(1, other.abs().max().item()))


@pytest.mark.parametrize("setting", ["highest", "high"])
@pytest.mark.parametrize("model", MODELS)
def test_ranks_equal_those_of_a_cpu_and_duplicates_tie(model, setting, device):
    figures = []
    torch.set_float32_matmul_precision(setting)  # TF32, which must not reach ranks
    try:
        for place in (torch.device("cpu"), device):
            module = make(model, place)
            with torch.no_grad():
                module.tables[0].weight[6:] = module.tables[0].weight[:6].flip(0)
            for size in (1, 2, len(ROWS)):
                metrics = {name: metric.to(place) for name, metric in module.configure_metrics().items()}
                for start in range(0, len(ROWS), size):
                    module.evaluate(collate_queries(ROWS[start : start + size]).to(place), metrics)
                figures.append({name: value.item() for name, value in metrics["ranking"].compute().items()})
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(figure == figures[0] for figure in figures[1:]), figures


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_does_not_wait_for_the_device(model, loss, device):
    module = make(model, device, loss=LOSSES[loss], regulariser=DURA(), dropout=0.1)
    metrics = {name: metric.to(device) for name, metric in module.configure_metrics().items()}
    batch, optimizer = collate_queries(ROWS).to(device), module.default_optimizer(module.parameter_groups())
    batch.one_each = True

    def step():
        module.compute_loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.evaluate(batch, metrics)

    step()  # what is set up once may wait
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"])
@pytest.mark.parametrize("kind", [lambda **settings: NFE("nfe2", **settings), ComplEx], ids=["nfe2", "ComplEx"])
def test_fit_and_test_in_every_precision(kind, precision, device, tmp_path):
    module = kind(dimension=16, loss=Softmax(), tuning=EmbeddingTuning(lr=0.05))
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    options = {"max_epochs": 20, "limit_val_batches": 0, "enable_checkpointing": False, "gradient_clip_val": 5.0}
    trainer = quiet_trainer(tmp_path, accelerator=accelerator, precision=precision, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, TinyGraphData(batch_size=24))
        (figures,) = trainer.test(module, TinyGraphData(), verbose=False)
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert figures["test_mrr"] > 0.4


def test_a_killed_run_resumes_to_the_same_weights(device, tmp_path):
    accelerator = ["--accelerator", "gpu" if device.type == "cuda" else "cpu"]
    write_toy_graph(tmp_path / "graph")
    launch([HELPERS / "graph_run.py", tmp_path / "whole", *accelerator], ranks=1, timeout_s=300)
    command = [sys.executable, HELPERS / "graph_run.py", tmp_path / "killed", *accelerator, "--kill", "2:7"]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr[-2000:]
    launch([HELPERS / "graph_run.py", tmp_path / "killed", *accelerator, "--resume"], ranks=1, timeout_s=300)
    expected, found = (load_file(tmp_path / run / "final.safetensors") for run in ("whole", "killed"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    figures = [json.loads((tmp_path / run / "test.json").read_text()) for run in ("whole", "killed")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
