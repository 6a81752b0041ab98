"""Random numbers that depend on a key only, so that a row gets the same numbers in any batch, on any rank and on any device.

Shapes: ``seeds`` and ``counter`` broadcast to the shape of the result.
"""

from __future__ import annotations

import math

from torch import Tensor


def keyed_uniform(seeds: Tensor, counter: Tensor) -> Tensor:
    """Draw from the uniform distribution on the open interval (0, 1).

    Args:
        seeds: int64.
        counter: int64, broadcast against ``seeds``; each pair (seed, counter) gives an independent number.

    Returns:
        float32.

    Source:
        Steele, Lea, Flood (2014), Fast Splittable Pseudorandom Number Generators: the mixing function of SplitMix64.
        Differs: used as a hash of (seed, counter).
    """
    bits = _shift(mix(mix(seeds) + counter), 41)  # 23 bits plus 0.5 are exact in float32
    return (bits.float() + 0.5) * 2.0**-23


def keyed_integers(seeds: Tensor, counter: Tensor, high: int) -> Tensor:
    """Draw from the uniform distribution on the integers 0 to ``high - 1``.

    Args:
        seeds: int64.
        counter: int64, broadcast against ``seeds``; each pair (seed, counter) gives an independent number.
        high: Number of integers, > 0.

    Returns:
        int64.
    """
    return _shift(mix(mix(seeds) + counter), 1) % high


def keyed_normal(seeds: Tensor, counter: Tensor) -> Tensor:
    """Draw from the standard normal distribution.

    Args:
        seeds: int64.
        counter: int64, broadcast against ``seeds``; each pair (seed, counter) gives an independent number.

    Returns:
        float32.

    Source:
        Box and Muller (1958), A Note on the Generation of Random Normal Deviates.
    """
    radius = (-2 * keyed_uniform(seeds, 2 * counter).log()).sqrt()
    return radius * (2 * math.pi * keyed_uniform(seeds, 2 * counter + 1)).cos()


def keyed_gumbel(seeds: Tensor, counter: Tensor) -> Tensor:
    """Draw from the standard Gumbel distribution; ``(logits + draws).argmax()`` is then a draw from the softmax of the logits.

    Args:
        seeds: int64.
        counter: int64, broadcast against ``seeds``; each pair (seed, counter) gives an independent number.

    Returns:
        float32.
    """
    return -(-keyed_uniform(seeds, counter).log()).log()


def mix(value: Tensor) -> Tensor:
    """Apply the mixing function of SplitMix64 to int64 values, modulo 2**64."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right logically, i.e. fill with zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
