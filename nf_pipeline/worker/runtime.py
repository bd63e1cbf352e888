"""Where and how a stage computes: threads, memory cap and seeds."""

import ctypes
import threading

import torch

_this_thread = threading.local()


def set_threads(num_threads: int) -> None:
    """Fixes the number of CPU threads: it decides the order of sums, so it decides the bits of the result."""
    torch.set_num_threads(num_threads)


def compute_alone() -> None:
    """Has the calling thread compute without OpenMP's helpers; all other threads keep theirs.

    For threads beside the one that trains. With more helpers than cores libgomp sends idle ones to sleep at once
    instead of letting them wait for the next kernel, which is there in microseconds: on two cores, batches of 16
    trained at 40 % of the speed. `torch.set_num_threads` would change the training thread's number too.
    """
    if getattr(_this_thread, "is_alone", False):
        return
    torch.get_num_threads()  # gives a new thread torch's number, once
    openmp = ctypes.CDLL(torch._C.__file__)
    if hasattr(openmp, "omp_set_num_threads"):
        openmp.omp_set_num_threads(1)
    _this_thread.is_alone = True


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
