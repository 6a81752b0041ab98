"""Decoding on a device: the CPU's lists in float32, and in bfloat16 what scoring every title by itself gives in that precision."""

import pytest
import torch
from small_lm import prompts, random_titles, real, small_lm

from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search
from malleable.lightning_modules.functional.language.trie_sampling import sample

pytestmark = pytest.mark.gpu

TITLES = random_titles(40)
K = 10


def search(device, dtype=torch.float32, num_beams=K, **options):
    model, (ids, mask) = small_lm().to(device, dtype), prompts()
    found = beam_search(model, Trie.build(TITLES), ids.to(device), mask.to(device), num_beams=num_beams, k=K, **options)
    return found.item_ids.cpu(), found.scores.cpu()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
def test_beam_search_equals_that_of_a_cpu(device, renormalize, restricted):
    allowed = torch.arange(len(TITLES)) % 3 > 0 if restricted else None
    items, scores = search(device, renormalize=renormalize, allowed=None if allowed is None else allowed.to(device))
    expected_items, expected_scores = search(torch.device("cpu"), renormalize=renormalize, allowed=allowed)
    assert items.tolist() == expected_items.tolist()
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-4)


def test_samples_equal_those_of_a_cpu(device):
    found = []
    for place in (device, torch.device("cpu")):
        ids, mask = prompts()
        model, seeds = small_lm().to(place), torch.arange(len(ids), device=place)
        drawn = sample(model, Trie.build(TITLES), ids.to(place), mask.to(place), seeds=seeds, num_samples=4)
        found.append(drawn.item_ids.tolist())
    assert found[0] == found[1]


@torch.no_grad()
def score_each_title(model, device):
    """``(B, N)``: each title behind each prompt in a row of its own, in the model's precision, summed in float32."""
    rows = []
    for prompt in real(*prompts()):
        scores = []
        for title in TITLES:
            logits = model(torch.tensor([[*prompt, *title]], device=device)).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1, dtype=torch.float32)
            scores.append(logps.gather(1, torch.tensor(title, device=device)[:, None]).sum())
        rows.append(torch.stack(scores))
    return torch.stack(rows).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exhaustive_search_agrees_with_scoring_each_title(device, dtype):
    """With as many beams as titles the search is exact, up to the rounding of the precision in the layers."""
    items, scores = search(device, dtype, num_beams=len(TITLES))
    expected = score_each_title(small_lm().to(device, dtype), device)
    tolerance = 2e-4 if dtype == torch.float32 else 0.02 * expected.abs().max().item()
    torch.testing.assert_close(scores, expected.gather(1, items), atol=tolerance, rtol=0)
    # The k-th best score leaves nothing out that is better by more than rounding.
    torch.testing.assert_close(scores, expected.sort(1, descending=True).values[:, :K], atol=tolerance, rtol=0)
