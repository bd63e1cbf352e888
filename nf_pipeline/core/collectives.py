"""Sums, maxima and gathers over the processes of the default group, and one error when a process is gone.

Every process must make the same calls in the same order. Only tensors travel, nothing is pickled. Knows
nothing of training, and not how the group came to be. Entry points: `sum_over_group`, `gather_from_group`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import distributed

BUCKET_BYTES = 2**20


class PeerLost(RuntimeError):
    """Another process of the group died, left or did not answer in time."""


def is_in_group() -> bool:
    """Whether this process belongs to a group with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sum_over_group(tensors: Sequence[torch.Tensor]) -> None:
    """Replaces every tensor by its sum over the group; the same bits in every process.

    Large tensors are summed where they are. Small ones travel together, because a call costs as much as some
    hundred kilobytes: they take `BUCKET_BYTES` at most for the time of the call.

    Args:
        tensors: of the same shapes, types and device in every process.

    Raises:
        PeerLost: a process is gone.
    """
    _for_each_bucket(tensors, _sum_in_place)


def pack_as_for_sum(tensors: Sequence[torch.Tensor]) -> None:
    """Takes the memory that `sum_over_group` does, in a process without a group; every tensor stays as it is."""
    _for_each_bucket(tensors, lambda _: None)


def largest_of_group(tensor: torch.Tensor) -> None:
    """Replaces every element by its maximum over the group.

    Raises:
        PeerLost: a process is gone.
    """
    with _watched():
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)


def gather_from_group(row: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all processes, stacked in the order of their ranks.

    Args:
        row: contiguous, of the same shape and type in every process.

    Raises:
        PeerLost: a process is gone.
    """
    rows = row.new_empty((distributed.get_world_size(), *row.shape))
    with _watched():
        distributed.all_gather(list(rows), row)
    return rows


def _for_each_bucket(tensors: Iterable[torch.Tensor], change: Callable[[torch.Tensor], None]) -> None:
    """Has every tensor changed in place, small ones packed into one."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1:
            change(bucket[0])
        else:
            packed = torch.cat([tensor.reshape(-1) for tensor in bucket])
            change(packed)
            for tensor, part in zip(bucket, packed.split([each.numel() for each in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups neighbours of one type while they fit a bucket."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        fits = sum(each.nbytes for each in bucket) + tensor.nbytes <= BUCKET_BYTES
        if bucket and not (fits and tensor.dtype == bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _sum_in_place(tensor: torch.Tensor) -> None:
    with _watched():
        distributed.all_reduce(tensor)


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own for a closed connection
        raise PeerLost(str(error).partition(". ")[0]) from error  # a second sentence wishes good luck
