import math

import pytest
import torch
from small_lm import random_titles, small_lm

from malleable.lightning_modules.functional.language.grounding import embed_texts, nearest_titles

TEXTS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
TITLES = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))


def naive(popularity=None, gamma=0.0):
    """Distances by two loops over rows and titles."""
    rows = []
    for text in TEXTS.tolist():
        distances = [math.dist(text, title) for title in TITLES.tolist()]
        if popularity is not None:
            low, high = min(distances), max(distances)
            least, most = min(popularity), max(popularity)
            distances = [
                ((distance - low) / (high - low)) * (1 + (value - least) / (most - least)) ** -gamma
                for distance, value in zip(distances, popularity, strict=True)
            ]
        rows.append(distances)
    return torch.tensor(rows)


def test_nearest_titles_equal_a_loop():
    expected = naive().sort(dim=1)
    found = nearest_titles(TEXTS, TITLES, k=4)
    assert torch.equal(found.item_ids, expected.indices[:, :4])
    torch.testing.assert_close(found.scores, -expected.values[:, :4])


def test_popularity_reduces_distances():
    popularity = [3, 0, 50, 7, 7, 1, 0, 2, 100, 4, 9]
    expected = naive(popularity, 2.0).sort(dim=1)
    found = nearest_titles(TEXTS, TITLES, k=11, popularity=torch.tensor(popularity), gamma=2.0)
    torch.testing.assert_close(-found.scores, expected.values, atol=1e-6, rtol=1e-5)
    assert torch.equal(found.item_ids, expected.indices)
    each_row = torch.tensor(popularity).expand(5, -1)
    assert torch.equal(nearest_titles(TEXTS, TITLES, k=11, popularity=each_row, gamma=2.0).item_ids, found.item_ids)
    # equal popularity says nothing
    assert torch.equal(nearest_titles(TEXTS, TITLES, k=3, popularity=torch.ones(11), gamma=2.0).item_ids, naive().sort(dim=1).indices[:, :3])


def test_a_large_common_offset_does_not_change_distances():
    found = nearest_titles(TEXTS + 3000, TITLES + 3000, k=11)
    assert torch.equal(found.item_ids, naive().sort(dim=1).indices)


def test_filters_hold_and_missing_items_are_padded():
    allowed = torch.zeros(5, 11, dtype=torch.bool)
    allowed[:, 3] = allowed[1:, 8] = True
    found = nearest_titles(TEXTS, TITLES, k=3, allowed=allowed)
    assert found.item_ids[0].tolist() == [3, -1, -1]
    assert found.scores[0, 1:].tolist() == [-torch.inf] * 2
    assert all(set(row) == {3, 8, -1} for row in found.item_ids[1:].tolist())
    assert nearest_titles(TEXTS, TITLES, k=13, allowed=allowed[1]).item_ids.shape == (5, 13)
    assert (nearest_titles(TEXTS, TITLES, k=13).item_ids[:, 11:] == -1).all()


@pytest.mark.parametrize(("gamma", "popularity"), [(-1.0, torch.ones(11)), (1.0, None)])
def test_a_gamma_that_cannot_be_used_is_refused(gamma, popularity):
    with pytest.raises(ValueError, match="gamma must be 0, or > 0 with a popularity for each item; got gamma="):
        nearest_titles(TEXTS, TITLES, k=1, popularity=popularity, gamma=gamma)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_are_embedded_by_their_last_token(kind):
    model, texts = small_lm(kind), random_titles(9)
    embeddings = embed_texts(model, texts, batch_size=4)
    for text, embedding in zip(texts, embeddings, strict=True):
        expected = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        embed_texts(model, [[3], []])
