"""Split by prompt, and the other answers of unpaired rows."""

import numpy as np
import pytest

from malleable.datamodules.preference.split import PreferenceSplit, other_rows, split_by_prompt
from malleable.datamodules.sample_ids import text_hashes

PROMPTS = text_hashes(f"prompt {number // 3}" for number in range(900))
IDS = text_hashes(f"row {number}" for number in range(900)).view(np.int64) & np.int64(2**62 - 1)


def of(parts, prompts=PROMPTS):
    return {name: set(prompts[rows].tolist()) for name, rows in parts.items()}


def test_all_rows_of_a_prompt_are_in_one_split():
    parts = split_by_prompt(PROMPTS, (0.2, 0.1), seed=0)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(900))
    prompts = of(parts)
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]
    assert 40 < len(prompts["val"]) < 80
    assert 15 < len(prompts["test"]) < 45
    numbers = of(split_by_prompt(PROMPTS, (7, 5.0), seed=0))
    assert (len(numbers["val"]), len(numbers["test"])) == (7, 5)


def test_the_split_of_a_prompt_depends_on_its_content_and_the_seed_only():
    whole = of(split_by_prompt(PROMPTS, (0.2, 0.1), seed=0))
    part = of(split_by_prompt(PROMPTS[::-1][:600], (0.2, 0.1), seed=0), PROMPTS[::-1][:600])
    assert all(part[name] <= whole[name] for name in whole)
    assert of(split_by_prompt(PROMPTS, (0.2, 0.1), seed=1)) != whole
    assert of(split_by_prompt(PROMPTS, (0.2, 0.3), seed=0))["val"] == whole["val"]


def test_a_split_has_at_least_one_prompt_and_leaves_training_prompts():
    assert {name: len(rows) for name, rows in split_by_prompt(PROMPTS[:30], (1e-9, None), 0).items()} == {"train": 27, "val": 3}
    with pytest.raises(ValueError, match="200 validation and 100 test prompts leave no training prompt: the source has 300 distinct prompts"):
        split_by_prompt(PROMPTS, (200, 100), 0)


def test_sizes_of_given_splits_have_no_effect():
    split = PreferenceSplit(val_size=0.1, test_size=20)
    assert split.sizes({"train"}) == (0.1, 20)
    assert split.sizes({"train", "val"}) == (None, 20)
    assert split.sizes({"train", "val", "test"}) == (None, None)


@pytest.mark.parametrize("options", [{"val_size": 0}, {"val_size": 1.5}, {"test_size": -1}, {"train_limit": 0}])
def test_settings_out_of_range_are_errors(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be "):
        PreferenceSplit(**options)


def test_the_other_row_has_another_prompt_and_is_used_evenly():
    other = other_rows(PROMPTS, IDS, seed=0)
    assert (PROMPTS[other] != PROMPTS).all()
    assert np.bincount(other).max() <= 3
    assert (other_rows(PROMPTS, IDS, seed=1) != other).mean() > 0.9


def test_the_other_row_depends_on_ids_not_on_the_order_or_on_most_other_rows():
    other = IDS[other_rows(PROMPTS, IDS, seed=0)]
    reverse = IDS[::-1][other_rows(PROMPTS[::-1], IDS[::-1], seed=0)]
    assert (reverse[::-1] == other).all()
    fewer = IDS[:-1][other_rows(PROMPTS[:-1], IDS[:-1], seed=0)]
    assert (fewer != other[:-1]).sum() == (other[:-1] == IDS[-1]).sum()


def test_rows_of_one_prompt_use_each_other():
    assert sorted(other_rows(PROMPTS[:3], IDS[:3], 0).tolist()) == [0, 1, 2]
    assert (other_rows(PROMPTS[:3], IDS[:3], 0) != np.arange(3)).all()
    assert other_rows(PROMPTS[:1], IDS[:1], 0).tolist() == [0]
