"""Exact search on a device: the items and scores of a CPU."""

import pytest
import torch

from malleable import ItemIndex
from malleable.lightning_modules.functional.search import nearest as module

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_an_index_finds_what_that_of_a_cpu_finds(device, metric, monkeypatch):
    """Also with TF32 and autocast, among equal embeddings, and in several blocks."""
    monkeypatch.setattr(module, "ACCELERATOR_SCORES", 1 << 19)
    embeddings, queries = torch.randn(20_000, 96), torch.randn(150, 96)
    embeddings[10_000:] = embeddings[:10_000]
    mask, excluded = torch.rand(150, 20_000) < 0.9, [[row, row + 10_000] for row in range(150)]
    index = ItemIndex(embeddings, metric=metric)
    expected = index.search(queries, 25), index.search(queries, 25, mask, excluded)
    index.to(device)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, torch.bfloat16):
            found = index.search(queries.to(device), 25), index.search(queries, 25, mask, excluded)
    finally:
        torch.set_float32_matmul_precision("highest")
    for own, other in zip(found, expected, strict=True):
        assert own.positions.device.type == device.type
        assert own.ids == other.ids
        torch.testing.assert_close(own.scores.cpu(), other.scores, atol=1e-6, rtol=1e-6)
