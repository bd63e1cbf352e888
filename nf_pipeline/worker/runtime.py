"""Where and how a stage computes: threads, memory cap and seeds."""

import torch


def set_threads(num_threads: int) -> None:
    """Fixes the number of CPU threads: it decides the order of sums, so it decides the bits of the result."""
    torch.set_num_threads(num_threads)


def cap_device_memory(device: torch.device, budget_bytes: int | None) -> None:
    """Lets the allocator of a GPU hand out no more than the budget; None lifts the cap. A CPU has none.

    The CUDA context comes on top: the cap is the caching allocator's.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = 1.0 if budget_bytes is None else min(1.0, budget_bytes / total)
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def seed_everything(*parts: int) -> None:
    """Seeds torch's generators from several numbers, such as seed, block and epoch (dropout draws from them)."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part) % 2**63
    torch.manual_seed(mixed)
