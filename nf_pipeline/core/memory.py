"""Counts the bytes that tensors hold on a device while a block trains.

On the CPU `LiveBytes` sees every operator through the dispatcher and follows storages by weak references; on
a GPU `CudaPeak` asks the caching allocator. Both answer the same questions (`PeakMeter`). `LiveBytes` counts
fake tensors too, so prediction and measurement share one definition of a byte.

What is counted: tensor storages, each once however many views it has. What is not: the CUDA context, Python,
and on the CPU two things: scratch inside a kernel (oneDNN reorders: about one copy of a convolution's
weights, 18 % of a step of 512 -> 512 channels) and the loader's host buffers, which play the part of pinned
host memory: a batch counts from its conversion to float32 on.

Does not know units, budgets or training. Entry function: `measure_peak`.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose schema says "alias of an argument" although they change the storage or its size.
_RESIZING = frozenset({"aten::resize_", "aten::resize_as_", "aten::set_"})

Trackable = torch.Tensor | nn.Module | torch.optim.Optimizer


class PeakMeter(Protocol):
    """What a worker asks about its device's memory.

    A meter measures while it is entered; it may be entered many times and keeps its counts in between. Leave
    it before a generator yields: it may be a dispatch mode of the current thread.
    """

    @property
    def current_bytes(self) -> int:
        """Bytes held now."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes held since the start or the last `reset_peak`."""

    def track(self, *owners: Trackable) -> None:
        """Counts tensors that were made outside the meter."""

    def reset_peak(self) -> None:
        """Lowers the peak to the bytes held now."""

    def __enter__(self) -> Self:
        """Starts measuring."""

    def __exit__(self, *exc_info: Any) -> None:
        """Stops measuring."""


def measure_peak(device: torch.device) -> PeakMeter:
    """Returns the meter for a device: the allocator's on a GPU, tracked tensor bytes elsewhere."""
    return CudaPeak(device) if device.type == "cuda" else LiveBytes(device)


def total_bytes(device: torch.device) -> int | None:
    """Returns all memory of a GPU; None for a CPU, whose memory is everybody's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def free_bytes(device: torch.device) -> int:
    """Returns what is free on a GPU now that this process has its context there."""
    return torch.cuda.mem_get_info(device)[0]


class LiveBytes(TorchDispatchMode):
    """Live tensor storage bytes of one device, real or fake.

    Every operator's results are looked at once, after it ran, when its inputs and outputs both live. A
    storage counts from then until its last reference goes, wherever that is held (Python, autograd's saved
    tensors, an optimiser): storages keep one Python object for life, and a weak reference to it calls back
    when it dies. Views and in-place results share a storage and add nothing. Tensors on memory that no
    operator made, such as `torch.from_numpy` and `torch.tensor`, and their views are uncounted until `track`.

    Operators that run in other threads (a loader's) are not seen: dispatch modes belong to a thread.

    Args:
        device: whose tensors count.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self._current = 0
        self._peak = 0
        self._sizes: dict[int, int] = {}  # address of the C++ storage -> bytes
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def current_bytes(self) -> int:
        """Bytes held now."""
        return self._current

    @property
    def peak_bytes(self) -> int:
        """Most bytes held since the start or the last `reset_peak`."""
        return self._peak

    def reset_peak(self) -> None:
        """Lowers the peak to the bytes held now."""
        self._peak = self._current

    def track(self, *owners: Trackable) -> None:
        """Counts tensors that were made outside the meter.

        Args:
            owners: tensors; modules (parameters, buffers and gradients); optimisers (their state).
        """
        for owner in owners:
            for tensor in _tensors_of(owner):
                self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator and counts what it made."""
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, torch.Tensor):
            if _makes_storage(func):
                self._count(result)
        elif isinstance(result, (tuple, list)):
            self._count_all(func, result)
        return result

    def _count_all(self, func: Any, results: Iterable[Any]) -> None:
        if _makes_storage(func):
            for result in results:
                if isinstance(result, torch.Tensor):
                    self._count(result)

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        address, num_bytes = storage._cdata, storage.nbytes()
        known_bytes = self._sizes.get(address)
        if known_bytes is None:
            self._references[address] = weakref.ref(storage, self._make_forget(address))
        if known_bytes != num_bytes:
            self._sizes[address] = num_bytes
            self._current += num_bytes - (known_bytes or 0)
            self._peak = max(self._peak, self._current)

    def _make_forget(self, address: int) -> Callable[[Any], None]:
        # No reference to self: meters must not live as long as the tensors they saw.
        meter_reference = weakref.ref(self)

        def forget(_: Any) -> None:
            meter = meter_reference()
            if meter is not None:
                meter._current -= meter._sizes.pop(address)
                del meter._references[address]

        return forget


class CudaPeak:
    """The caching allocator's own count of a GPU: allocated bytes, rounded as the allocator rounds.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset_peak()

    @property
    def current_bytes(self) -> int:
        """Bytes allocated now."""
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak_bytes(self) -> int:
        """Most bytes allocated since the start or the last `reset_peak`."""
        return torch.cuda.max_memory_allocated(self._device)

    def track(self, *owners: Trackable) -> None:
        """Does nothing: the allocator knows every tensor."""

    def reset_peak(self) -> None:
        """Lowers the peak to the bytes allocated now."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def __enter__(self) -> Self:
        """Does nothing: the allocator counts always."""
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Does nothing."""


@functools.cache
def _makes_storage(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is None or schema.name in _RESIZING or "out" in schema.overload_name.split("_"):
        return True
    return any(result.alias_info is None for result in schema.returns)


def _tensors_of(owner: Trackable) -> Iterator[torch.Tensor]:
    if isinstance(owner, torch.Tensor):
        yield owner
    elif isinstance(owner, nn.Module):
        yield from owner.buffers()
        for parameter in owner.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    else:
        for state in owner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
