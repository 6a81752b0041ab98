import pytest
import torch

from malleable.lightning_modules.functional.keyed_random import keyed_gumbel, keyed_integers, keyed_normal, keyed_uniform


def test_numbers_are_uniform_and_uncorrelated():
    draws = keyed_uniform(torch.arange(200)[:, None], torch.arange(500))
    assert draws.dtype == torch.float32
    assert ((draws > 0) & (draws < 1)).all()
    counts = torch.histc(draws, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 44  # chi-square, 19 degrees of freedom, p = 0.001
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.25
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.4


def test_numbers_are_those_of_the_published_mixing_function():
    # files of negatives must not change with a release, nor with a device
    def mix(value):
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    assert mix(0) == 0xE220A8397B1DCDAF  # first number of SplitMix64 from seed 0
    seeds, counters = torch.tensor([[3], [2**31 - 2], [-7], [2**62]]), torch.tensor([0, 1, 2**40, -1])
    expected = [
        [((mix((mix(seed % 2**64) + counter) % 2**64) >> 41) + 0.5) / 2**23 for counter in counters.tolist()] for seed in seeds[:, 0].tolist()
    ]
    assert keyed_uniform(seeds, counters).tolist() == expected


def test_integers_are_uniform():
    draws = keyed_integers(torch.arange(200)[:, None], torch.arange(500), 20)
    assert draws.dtype == torch.int64
    counts = torch.bincount(draws.flatten(), minlength=20)
    assert len(counts) == 20
    assert ((counts - 5000) ** 2 / 5000).sum() < 44  # chi-square, 19 degrees of freedom, p = 0.001
    # Integers of 63 bits: no number of a large range is left out or more frequent, as it would be with 23 bits.
    draws = keyed_integers(torch.arange(1000)[:, None], torch.arange(500), 3 << 24)
    assert len(draws.unique()) > 490_000
    assert (draws % 2).float().mean() == pytest.approx(0.5, abs=0.003)


def test_normal_numbers():
    draws = keyed_normal(torch.arange(200)[:, None], torch.arange(500))
    assert draws.isfinite().all()
    assert draws.mean().abs() < 0.015
    assert draws.std() == pytest.approx(1, abs=0.01)
    assert (draws.abs() > 1.96).float().mean() == pytest.approx(0.05, abs=0.005)
    neighbours = torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.02


def test_the_largest_of_logits_and_gumbel_numbers_is_a_draw_from_their_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = (logits + keyed_gumbel(torch.arange(20_000)[:, None], torch.arange(4))).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.015, rtol=0)
