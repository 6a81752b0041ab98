"""Fits of knowledge-graph embeddings: on two ranks, and in other precisions."""

import json

import pytest
import torch
from launch import launch
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData

from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning
from malleable.lightning_modules.losses.embedding import BCESum, NegativeSampling

SCRIPT = """
import json, os, sys
import torch
from tiny_data import quiet_trainer
from tiny_graph import TinyGraphData, grouped_rows, query_rows, tiny_triples
from malleable.lightning_modules.graphs.settings import EmbeddingTuning
from malleable.lightning_modules.losses import embedding
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.point_embeddings import ComplEx

size = int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(0)
sparse = sys.argv[2].startswith("NegativeSampling")
rows = query_rows(tiny_triples())
# Queries of one and of two true tails.
grouped = grouped_rows(rows + [{**row, "target": [(row["target"][0] + 3) % 12]} for row in rows[::3]])
name, *options = sys.argv[2].split(",")
loss, tuning = getattr(embedding, name)(*map(json.loads, options)), EmbeddingTuning(lr=0.02, lr_decay=0.9, sparse=sparse)
regulariser = None if sparse else embedding.N3(0.1)
if sys.argv[3] == "ComplEx":
    model = ComplEx(dimension=4, loss=loss, regulariser=regulariser, tuning=tuning)
else:
    model = NFE(sys.argv[3], dimension=4, gamma=1.0, gamma_trainable=not sparse, loss=loss, regulariser=regulariser, tuning=tuning)
settings = {"strategy": "ddp", "devices": size} if size > 1 else {}
trainer = quiet_trainer(sys.argv[1], max_epochs=3, precision=sys.argv[4], enable_checkpointing=False, logger=False, **settings)
# 72 queries in steps of 20: the last one is short, and not filled on any rank.
trainer.fit(model, TinyGraphData(train=grouped, batch_size=5, global_batch_size=20))
figures = trainer.test(model, TinyGraphData(), verbose=False)[0]
if not sparse:
    figures |= trainer.validate(model, TinyGraphData(), verbose=False)[0]
print(json.dumps([figures, [table.weight.flatten().tolist() for table in model.tables]]))
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        ("BCESum", "nfe1", "32-true"),
        ("KvsAll", "nfe2", "bf16-mixed"),
        ("Softmax", "ComplEx", "bf16-mixed"),
        ("BCESum", "nfe3", "32-true"),
        ("NegativeSampling,4", "nfe1", "32-true"),
        ("NegativeSampling,4,0.5,true", "ComplEx", "32-true"),
    ],
    ids="-".join,
)
def test_two_ranks_give_the_run_of_one(choice, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    (one,), two = (
        [json.loads(out.splitlines()[-1]) for out in launch([script, tmp_path / str(ranks), *choice], ranks=ranks, cwd=tmp_path, timeout_s=300)]
        for ranks in (1, 2)
    )
    assert two[0] == two[1]
    assert two[0][0] == pytest.approx(one[0], abs=1e-6)
    for own, other in zip(two[0][1], one[1], strict=True):
        torch.testing.assert_close(torch.tensor(own), torch.tensor(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("loss", [BCESum(), NegativeSampling(4)])
def test_learns_in_other_precisions(precision, loss, tmp_path):
    """Only tables are narrow, under ``bf16-true``; that figures are those of single precision is tested in ``test_graph_devices.py``."""
    module = NFE("nfe2", 8, 1.0, loss=loss, tuning=EmbeddingTuning(lr=0.05))
    trainer = quiet_trainer(tmp_path, max_epochs=10, precision=precision, enable_checkpointing=False)
    trainer.fit(module, TinyGraphData(batch_size=24))
    assert trainer.test(module, TinyGraphData(), verbose=False)[0]["test_mrr"] > 0.3
    assert trainer.callback_metrics["test_mrr"].isfinite()
