"""Two processes give the weights, figures and predictions of one."""

import json

import pyarrow.parquet as pq
import pytest
import sequence_run
import torch
from launch import launch
from safetensors.torch import load_file

KINDS = ("sasrec", "bert4rec", "hstu", "gru4rec")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        launch([sequence_run.__file__, root], ranks=ranks)
    return root / "ranks1", root / "ranks2"


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind, folders):
    one, two = (load_file(folder / f"{kind}.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    first, second = (json.loads((folder / f"{kind}.json").read_text()) for folder in folders)
    assert second == pytest.approx(first, abs=1e-5)
    texts = [(folder / kind / "predictions.csv").read_text().splitlines() for folder in folders]
    assert [line.rsplit(",", 1)[0] for line in texts[0]] == [line.rsplit(",", 1)[0] for line in texts[1]]
    assert len(texts[0]) > 5
    vectors = [pq.read_table(folder / kind / "user_vectors.parquet") for folder in folders]
    assert vectors[0]["sample_id"].to_pylist() == vectors[1]["sample_id"].to_pylist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(*(torch.tensor(table["vector"].to_pylist()) for table in vectors), rtol=0, atol=1e-5)
