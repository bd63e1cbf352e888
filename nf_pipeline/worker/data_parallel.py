"""Several workers that train one block together, each on its own part of every batch.

Weights are not sent: all members build them from the same seed, or load the same checkpoint, and then make the
same steps, because they sum the same gradients. Knows nothing of shards, schedules or who starts the members.
Entry class: `Replicas`.
"""

import functools
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from nf_pipeline.core.collectives import PeerLost, largest_of_group, sum_over_group
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.results import Results
from nf_pipeline.core.sync_batch_norm import synchronise_batch_norms
from nf_pipeline.errors import WorkerLost
from nf_pipeline.gang import Gang

# Numbers of the host travel by gloo on every device: no GPU is made to wait for them.
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
_INTERFACE = "GLOO_SOCKET_IFNAME"

ResultsT = TypeVar("ResultsT", bound=Results)


class Replicas:
    """This worker's membership of its gang while it is entered; alone it does nothing and costs nothing.

    Every member must call the same methods in the same order. A member that dies, leaves with an error or does not
    answer is a `PeerLost` to the others at their next call; leaving the context turns it into `WorkerLost`.

    Args:
        stage: for errors.
        gang: this worker's place.
        device: where the gradients are.
        join_timeout_s: longest wait for all members to come.
        timeout_s: longest wait for a member that is slow.
    """

    def __init__(
        self,
        stage: str,
        gang: Gang,
        device: torch.device,
        *,
        join_timeout_s: float = 120.0,
        timeout_s: float = 1800.0,
    ) -> None:
        self.gang = gang
        self._stage = stage
        self._device = device
        self._join_timeout = timedelta(seconds=join_timeout_s)
        self._timeout = timedelta(seconds=timeout_s)

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.gang.size == 1

    def __enter__(self) -> "Replicas":
        """Meets the others.

        Raises:
            WorkerLost: not all of them came in time.
        """
        if not self.is_alone:
            try:
                self._join()
            except (RuntimeError, OSError) as error:
                self._leave()
                raise self._not_met(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the gang.

        Raises:
            WorkerLost: in place of a `PeerLost`.
        """
        if self.is_alone:
            return
        self._leave()
        if isinstance(error, (PeerLost, distributed.DistError)):
            raise WorkerLost(
                self._stage,
                f"worker {self.gang.rank + 1} of {self.gang.size} lost one of the others: {error}",
                "look at the others' logs, then resume",
            ) from error

    def convert(self, units: Sequence[LocalUnit]) -> None:
        """Replaces every batch norm by one that normalises over the batches of all members.

        Weights, names and optimisers stay valid. A GPU uses torch's own layer, whose gradients are exact where all
        members have the same number of samples, and off by about 1 / samples of their correction terms elsewhere.
        """
        for unit in () if self.is_alone else units:
            if self._device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(unit)
            else:
                synchronise_batch_norms(unit)

    def averaging(self, num_local: int, num_total: int) -> Callable[[LocalUnit], None] | None:
        """Returns what `train_step` takes as `reduce` for a step with these numbers of samples; None when alone."""
        if self.is_alone:
            return None
        return functools.partial(self.average_gradients, num_local=num_local, num_total=num_total)

    def average_gradients(self, unit: nn.Module, num_local: int, num_total: int) -> None:
        """Turns gradients of this member's mean loss into those of the mean over all members' samples, in place.

        Args:
            unit: after its backward pass.
            num_local: samples of this member in this step.
            num_total: samples of all members in this step.

        Raises:
            PeerLost: a member is gone.
        """
        if self.is_alone:
            return
        gradients = [parameter.grad for parameter in unit.parameters() if parameter.grad is not None]
        for gradient in gradients:
            gradient.mul_(num_local / num_total)
        sum_over_group(gradients)

    def mean_losses(self, losses: Sequence[torch.Tensor], num_local: int, num_total: int) -> list[torch.Tensor]:
        """Returns the losses over all members' samples, the same in every member: so they diverge together.

        Args:
            losses: this member's, one scalar per unit; they stay on the device.
            num_local, num_total: samples of this member, and of all, in this step.

        Raises:
            PeerLost: a member is gone.
        """
        if self.is_alone:
            return list(losses)
        shares = torch.stack(list(losses)) * (num_local / num_total)
        sum_over_group([shares])
        return list(shares.unbind())

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns sums over the members; those of integers (below 2**53) are integers.

        Raises:
            PeerLost: a member is gone.
        """
        if self.is_alone:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        sum_over_group([sums])
        return [
            int(total) if isinstance(own, int) else total for own, total in zip(values, sums.tolist(), strict=True)
        ]

    def union(self, parts: Sequence[ResultsT], first: int, num_samples: int) -> list[ResultsT]:
        """Returns results of which every member has a part of its own, joined.

        Args:
            parts: what each exit made of this member's samples; of as many exits in every member.
            first: place of its first sample among all.
            num_samples: of all members.

        Raises:
            PeerLost: a member is gone.
        """
        if self.is_alone:
            return list(parts)
        placed = [one.spread_over(first, num_samples).to_bytes() for one in parts]
        # What nothing is known of is zero: sums of bytes are the bytes themselves.
        joined, size = bytes(self.total(list(b"".join(placed)))), len(placed[0])
        kind = type(parts[0])
        return [kind.from_bytes(joined[start : start + size], num_samples) for start in range(0, len(joined), size)]

    def largest(self, value: float) -> float:
        """Returns the largest value of all members, an integer if this one's is.

        Raises:
            PeerLost: a member is gone.
        """
        (most,) = self.largest_each([value])
        return int(most) if isinstance(value, int) else most

    def largest_each(self, values: Sequence[float]) -> list[float]:
        """Returns the largest of every value over all members.

        Raises:
            PeerLost: a member is gone.
        """
        if self.is_alone:
            return list(values)
        most = torch.tensor(values, dtype=torch.float64)
        largest_of_group(most)
        return most.tolist()

    def barrier(self) -> None:
        """Waits until every member has come here.

        Raises:
            PeerLost: a member is gone.
        """
        self.total([0])

    def _join(self) -> None:
        host, _, port = self.gang.address.rpartition(":")
        host = host.strip("[]")
        store = distributed.TCPStore(
            host,
            int(port),
            world_size=self.gang.size,
            is_master=self.gang.rank == 0,
            timeout=self._join_timeout,
            master_listen_fd=_listen(host, int(port)) if self.gang.rank == 0 else None,
        )
        distributed.init_process_group(
            _BACKENDS[self._device.type],
            store=store,
            rank=self.gang.rank,
            world_size=self.gang.size,
            timeout=self._timeout,
            pg_options=self._gloo_options(host) if self._device.type == "cpu" else None,
        )

    def _gloo_options(self, host: str) -> Any:
        """Makes gloo listen where the others come from, not where this machine's name points; None leaves it be."""
        if _INTERFACE in os.environ:
            return None
        options = distributed.ProcessGroupGloo._Options()
        options._timeout = self._timeout
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=_own_address(host))]
        return options

    def _leave(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _not_met(self, error: RuntimeError) -> WorkerLost:
        return WorkerLost(
            self._stage,
            f"worker {self.gang.rank + 1} of {self.gang.size} did not meet the others at {self.gang.address} "
            f"within {self._join_timeout.total_seconds():.0f} s: {error}",
            "let the workers reach each other (GLOO_SOCKET_IFNAME names the network interface), then resume",
        )


def _listen(host: str, port: int) -> int:
    """Returns a socket that listens on one address of this machine: torch's own store listens on all of them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family).detach()


def _own_address(host: str) -> str:
    """Returns this machine's address on the way to another one; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]
