"""The NVIDIA cards of this machine as their driver describes them, and which of them this process may use.

Loads the driver's library only when asked; a machine without a driver simply has no cards. Knows nothing of torch
and of Ray. Entries: `read_driver`, `visible_gpus`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nf_pipeline.errors import ConfigError

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card, or one slice of a card that is cut up by MIG.

    Attributes:
        index: position of the card in the driver's list, in PCI order; slices have that of their card.
        uuid: "GPU-..." of a card, "MIG-..." of a slice.
        name: as the vendor calls it, "Tesla T4".
        total_bytes: what programs can allocate, without what the driver keeps; None if the card does not say.
        free_bytes: what of it is free now; None if the card does not say.
        is_slice: whether it is a slice.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    is_slice: bool = False


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What the NVIDIA driver of this machine has.

    Attributes:
        version: of the driver, "" without one.
        gpus: every card or slice, in PCI order, whatever CUDA_VISIBLE_DEVICES says.
        problem: why there is no driver to ask, "" if there is one.
        fix: one action if something is to be mended, "" if the machine just has no driver.
    """

    version: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    fix: str = ""


def read_driver() -> Driver:
    """Asks the driver for its cards.

    Raises:
        ConfigError: there is a driver and it fails.
    """
    try:
        import pynvml
    except ImportError:
        return Driver(problem="no module pynvml", fix="pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(problem=f"no NVIDIA driver ({error})")
    try:
        return Driver(version=_text(pynvml.nvmlSystemGetDriverVersion()), gpus=tuple(_all_gpus(pynvml)))
    except pynvml.NVMLError as error:
        fix = "run nvidia-smi; reload the driver or restart the machine"
        raise ConfigError(f"the NVIDIA driver fails: {error}", fix) from None
    finally:
        pynvml.nvmlShutdown()


def visible_gpus(gpus: Sequence[Gpu], environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Returns the cards that CUDA_VISIBLE_DEVICES leaves, in its order; all if it is not set.

    Takes what CUDA takes: positions, and UUIDs of cards or slices, which may be cut short. An empty text or -1
    leaves none; what stands behind a -1 is not looked at. A position here means PCI order, which is CUDA's only
    where CUDA_DEVICE_ORDER=PCI_BUS_ID is set or all cards are alike.

    Raises:
        ConfigError: an entry names no card of this machine, or the same one as another entry.
    """
    wanted = environment.get(VISIBLE_DEVICES)
    if wanted is None or not gpus:
        return list(gpus)
    found: list[Gpu] = []
    for entry in (part.strip() for part in wanted.split(",")) if wanted.strip() else ():
        if entry in ("-1", "NoDevFiles"):  # the second is what some schedulers write for "none"
            break
        found += find_gpus(gpus, entry, f"{VISIBLE_DEVICES}={wanted}")
    if len({gpu.uuid for gpu in found}) < len(found):
        raise ConfigError(f"{VISIBLE_DEVICES}={wanted} names a GPU twice", "name every GPU once")
    return found


def find_gpus(gpus: Sequence[Gpu], entry: str, where: str) -> list[Gpu]:
    """Returns the card that a position or the beginning of a UUID names, or all slices of that card.

    Args:
        gpus: to choose from.
        entry: "0", "GPU-8932f937" or "MIG-...".
        where: what to blame in the error, "--gpu 3".

    Raises:
        ConfigError: none or several fit.
    """
    if entry.isascii() and entry.isdigit():
        found = [gpu for gpu in gpus if gpu.index == int(entry)]
    elif entry.startswith(("GPU-", "MIG-")):
        found = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    else:
        found = []
    if not found or len({gpu.index for gpu in found}) > 1:
        known = ", ".join(f"{gpu.index} ({gpu.uuid}, {gpu.name})" for gpu in gpus) or "none"
        raise ConfigError(
            f"{where} names {'no' if not found else 'more than one'} GPU; there are: {known}", "name one"
        )
    return found


def _all_gpus(nvml: ModuleType) -> Iterator[Gpu]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        slices = list(_slices(nvml, handle))
        for part in slices:
            yield _describe(nvml, part, index, is_slice=True)
        if not slices:
            yield _describe(nvml, handle, index)


def _slices(nvml: ModuleType, handle: Any) -> Iterator[Any]:
    mode = _unless_unsupported(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or not mode[0]:
        return
    for slice_idx in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        part = _unless_unsupported(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slice_idx)
        if part is not None:
            yield part


def _describe(nvml: ModuleType, handle: Any, index: int, *, is_slice: bool = False) -> Gpu:
    memory = _unless_unsupported(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    if memory is None:  # drivers before 510 know only the first version, which counts what they keep as usable
        memory = _unless_unsupported(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=None if memory is None else memory.total - getattr(memory, "reserved", 0),
        free_bytes=None if memory is None else memory.free,
        is_slice=is_slice,
    )


def _unless_unsupported(nvml: ModuleType, ask: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return ask(*arguments)
    except nvml.NVMLError:  # consumer cards know no MIG, and a card that is cut up may hide its memory
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # older nvidia-ml-py returns bytes
