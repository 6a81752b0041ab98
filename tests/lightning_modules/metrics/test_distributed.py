import json
import runpy

import pytest
from launch import launch

SCRIPT = """
import json, os
import torch
from torch import distributed
from malleable.lightning_modules.metrics.exposure import ExposureMetrics
from malleable.lightning_modules.metrics.ranking import RankingMetrics, ScoredRankingMetrics

rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if size > 1:
    distributed.init_process_group("gloo")
generator = torch.Generator().manual_seed(0)
number = 101
recommended = torch.randint(-1, 40, (number, 10), generator=generator)
target = torch.randint(-1, 40, (number,), generator=generator)
history = torch.randint(-1, 40, (number, 6), generator=generator)
scores = torch.randint(9, (number, 12), generator=generator).float()
labels = torch.randint(3, (number, 12), generator=generator)
mask = torch.rand(number, 12, generator=generator) < 0.8
ids = torch.arange(number)
# As a distributed loader deals them: shuffled, and filled up with repeats that are marked.
order = torch.randperm(number, generator=generator) if size > 1 else ids
rows = torch.cat([order, order[: -number % size]])
ids = torch.where(torch.arange(len(rows)) < number, ids[rows], -1 - ids[rows])
lists, scored = RankingMetrics(), ScoredRankingMetrics(ties="pessimistic")
exposure = ExposureMetrics(40, genres=[("abc"[item % 3], "d") for item in range(40)], popularity=range(40))
for part in torch.arange(rank, len(rows), size).split(7):
    at = rows[part]
    lists.update(recommended[at], target[at], ids[part])
    scored.update(scores[at], labels[at], mask[at], ids[part])
    exposure.update(recommended[at], history[at], ids[part])
figures = {f"{type(metric).__name__} {name}": value.item() for metric in (lists, scored, exposure) for name, value in metric.compute().items()}
result = [figures, exposure.item_counts(10).tolist()]
print(json.dumps(result))
"""


@pytest.mark.ddp
def test_shuffled_and_padded_shards_give_equal_metrics(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    one = runpy.run_path(str(script))["result"]
    two = [json.loads(out) for out in launch([script], ranks=2)]
    assert two == [one, one]
    assert 0 < one[0]["RankingMetrics hr_10"] < 1
    assert sum(one[1]) > 0
