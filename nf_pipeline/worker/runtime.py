"""Where and how a stage computes: threads and seeds."""

import torch


def set_threads(num_threads: int) -> None:
    """Fixes the number of CPU threads: it decides the order of sums, so it decides the bits of the result."""
    torch.set_num_threads(num_threads)


def seed_everything(*parts: int) -> None:
    """Seeds torch's generators from several numbers, such as seed, block and epoch (dropout draws from them)."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part) % 2**63
    torch.manual_seed(mixed)
