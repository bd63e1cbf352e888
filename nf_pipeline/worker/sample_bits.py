"""Random numbers that belong to a sample, whatever batch, order, worker or thread it comes in.

Numbers are hashes: no generator has a state that threads would share. Entries: `hash_samples`, `uniform`.
"""

import numpy as np


def hash_samples(sample_ids: np.ndarray, *parts: int) -> np.ndarray:
    """Mixes every sample's id with numbers such as seed and epoch (splitmix64).

    Source: https://prng.di.unimi.it/splitmix64.c

    Args:
        sample_ids: int64 [N].
        parts: 0 or more each; their order counts.

    Returns:
        uint64 [N].
    """
    state = sample_ids.astype(np.uint64)
    for part in parts:
        state = _mix(state ^ _mix(np.uint64(part) + np.zeros(1, np.uint64)))
    return state


def uniform(bits_N: np.ndarray, draw: int) -> np.ndarray:
    """Draws a number for every sample; other draws are independent of it.

    Args:
        bits_N: uint64, as `hash_samples` gives them.
        draw: 0, 1, ...: which one.

    Returns:
        float64 [N] in [0, 1).
    """
    return (hash_samples(bits_N, draw) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
