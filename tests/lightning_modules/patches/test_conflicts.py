import pytest
import torch

from malleable.lightning_modules.patches.conflicts import find_conflicts
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch

CAPITAL = {"prompt": "The capital of {} is", "subject": "France"}


def patch(deltas, requests=(), **fields):
    return Patch(kind="alpha_edit", deltas=deltas, base=dict.fromkeys("abc", ""), requests=requests, **fields)


def low_rank(seed, rank=2):
    draws = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(6, rank, generator=draws), torch.randn(rank, 8, generator=draws))


def test_overlap_equals_dense_computation():
    new, old = low_rank(1), low_rank(2, rank=3)
    (conflict,) = find_conflicts(patch({"a": new, "b": new}), [patch({"a": old, "c": old})])
    (overlap,) = conflict.overlaps
    one, two = new.dense(), old.dense()
    rows = torch.linalg.svd(two).Vh[:3].T
    assert overlap.tensor == "a"
    assert overlap.cosine == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), rel=1e-4)
    assert overlap.share_in_rows == pytest.approx(float(((one @ rows).norm() / one.norm()) ** 2), rel=1e-4)


def test_required_patch_is_not_a_conflict():
    below = patch({"a": low_rank(1)}, [{**CAPITAL, "target": " Lyon"}])
    above = patch({"a": low_rank(2)}, [{**CAPITAL, "target": " Rome"}], requires=[below.id])
    assert find_conflicts(above, [below]) == []
    assert len(find_conflicts(below, [above])) == 1


def test_patches_of_different_tensors_do_not_conflict():
    assert find_conflicts(patch({"a": low_rank(1)}), [patch({"b": low_rank(1)})]) == []


@pytest.mark.parametrize("name", ["target", "target_new"])
def test_same_prompt_with_two_targets_is_a_conflict(name):
    old = patch({"a": low_rank(1)}, [{**CAPITAL, name: " Lyon"}, {"prompt": "{} speaks", "subject": "Goethe", name: " German"}])
    new = patch({"b": low_rank(1)}, [{**CAPITAL, name: " Rome"}, {"prompt": "{} speaks", "subject": "Goethe", name: " German"}])
    (conflict,) = find_conflicts(new, [old])
    assert [(theirs[name], ours[name]) for theirs, ours in conflict.contradictions] == [(" Lyon", " Rome")]
    assert '["The capital of {} is", "France"]: " Lyon" in that patch, " Rome" in the new one' in str(conflict)


def test_requests_without_prompts_do_not_contradict():
    assert find_conflicts(patch({}, [{"concept": "Snoopy"}]), [patch({}, [{"concept": "Mickey", "target": "mouse"}])]) == []


def test_text_of_a_conflict():
    factored, dense = (patch({"a": delta}, title="Lyon") for delta in (low_rank(1), Delta(low_rank(1).dense())))
    (first,), (second,) = (find_conflicts(patch({"a": low_rank(1)}), [other]) for other in (factored, dense))
    assert str(first) == f"conflict with {factored.id} (alpha_edit: Lyon):\n  a: cosine +1.000, 100.0% of the new change is in its row space"
    assert str(second) == f"conflict with {dense.id} (alpha_edit: Lyon):\n  a: cosine +1.000"
