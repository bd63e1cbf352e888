"""What the processes of a gang do in the tests: functions that a fresh process can import.

Each is called with the process's place; `ALONE` gives the one process with the whole batch to compare with.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.collectives import PeerLost, gather_from_group, sum_over_group
from nf_pipeline.core.hits import Hits
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.memory import LiveBytes
from nf_pipeline.core.objectives import UnitEnd, build_objective
from nf_pipeline.core.sample_errors import SampleErrors
from nf_pipeline.core.sync_batch_norm import synchronise_batch_norms
from nf_pipeline.core.train_step import make_optimizer, train_step
from nf_pipeline.errors import Diverged
from nf_pipeline.gang import Gang
from nf_pipeline.samples import InputSpec, TargetSpec
from nf_pipeline.worker.data_parallel import Replicas

CPU = torch.device("cpu")
CFG = TrainConfig(momentum=0.9, weight_decay=1e-3)


def joined(gang: Gang, **options: Any) -> Replicas:
    """Returns the membership of a gang of the tests."""
    return Replicas("block-003", gang, CPU, **{"join_timeout_s": 30.0, "timeout_s": 60.0, **options})


def own_rows(gang: Gang, sizes: Sequence[int]) -> slice:
    """Returns the rows of a batch that a member computes: its own, or all when it is alone."""
    start = sum(sizes[: gang.rank])
    return slice(start, start + sizes[gang.rank]) if gang.size > 1 else slice(None)


@dataclass(frozen=True, kw_only=True)
class NormCase:
    """Inputs for two batch norms in a row.

    Attributes:
        sizes: samples per member.
        rest: shape of one sample, C first.
        options: of the native layers.
        layout: torch memory format of the input.
        dtype_name: of the inputs; weights of bfloat16 inputs are float32.
    """

    sizes: tuple[int, ...]
    rest: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous_format"
    dtype_name: str = "float64"

    @property
    def dtype(self) -> torch.dtype:
        """Type of the inputs."""
        return getattr(torch, self.dtype_name)


def normalise(gang: Gang, cases: Sequence[NormCase]) -> list[dict[str, torch.Tensor]]:
    """Two training passes and one in evaluation mode for every case.

    The loss is a mean over samples, as in training, and not the same for every sample. Gradients come back as
    those of the loss of the whole batch.
    """
    with joined(gang):
        return [_normalise_case(gang, case) for case in cases]


def train(
    gang: Gang,
    sizes: Sequence[Sequence[int]],
    precision: str,
    dtype_name: str = "float32",
    loss: str = "cross_entropy",
) -> dict[str, Any]:
    """Trains a block of two units step by step; reports losses over the whole batch.

    Args:
        sizes: per step, samples per member.
        precision: as `train_step` takes it.
        dtype_name: of weights and inputs.
        loss: as `train.loss` names it.
    """
    dtype = getattr(torch, dtype_name)
    with joined(gang) as replicas:
        units = [unit.to(dtype) for unit in make_block(loss=loss)]
        optimizers = [make_optimizer(unit, CFG, 0.05) for unit in units]
        replicas.convert(units)
        generator = torch.Generator().manual_seed(11)
        curve = []
        for step_sizes in sizes:
            num_total, rows = sum(step_sizes), own_rows(gang, step_sizes)
            y_N = torch.randint(0, 4, (num_total,), generator=generator)
            x_NCHW = torch.randn(num_total, 3, 8, 8, generator=generator) + y_N.view(-1, 1, 1, 1) / 2
            num_own = len(y_N[rows])
            reduce = replicas.averaging(num_own, num_total)
            x_NCHW = x_NCHW[rows].to(dtype)
            losses = train_step(units, optimizers, x_NCHW, y_N[rows], precision, reduce, sample_N=x_NCHW)
            curve.append([float(loss) for loss in replicas.mean_losses(losses, num_own, num_total)])
        return {"curve": curve, "weights": _state(nn.ModuleList(units))}


def measure_step(gang: Gang, batch_size: int, precision: str) -> int:
    """Returns the peak bytes of the second training step of a block."""
    with joined(gang) as replicas:
        units = make_block(width=24)
        optimizers = [make_optimizer(unit, CFG, 0.05) for unit in units]
        replicas.convert(units)
        meter = LiveBytes(CPU)
        meter.track(*units)
        reduce = replicas.averaging(batch_size, batch_size * gang.size)
        for _ in range(2):
            meter.reset_peak()
            with meter:
                x_NCHW, y_N = torch.ones(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.int64)
                train_step(units, optimizers, x_NCHW, y_N, precision, reduce)
        return meter.peak_bytes


def measure_layer(gang: Gang, shape: Sequence[int], dtype_name: str) -> int:
    """Returns the peak bytes of one batch norm's forward and backward pass, its input not counted."""
    with joined(gang):
        dtype = getattr(torch, dtype_name)
        net = nn.Sequential(nn.BatchNorm2d(shape[1]))
        synchronise_batch_norms(net)
        x_NCHW = torch.ones(*shape, dtype=dtype, requires_grad=True)
        with LiveBytes(CPU) as meter:
            out_NCHW = net(x_NCHW)
            out_NCHW.backward(torch.ones_like(out_NCHW))
        return meter.peak_bytes


def reduce_numbers(gang: Gang) -> dict[str, Any]:
    """Returns what every collective makes of numbers that differ by rank."""
    with joined(gang) as replicas:
        rank = gang.rank
        own = [Hits(bits, 5) for bits in (1, 0, 7)]
        errors = [SampleErrors.of(np.array([rank, 0.1]))]
        large = torch.full((600, 1024), float(rank + 1))
        striped = torch.full((2, 300, 16, 64), float(rank + 1)).contiguous(memory_format=torch.channels_last)
        small = [torch.full((rows,), float(10**rank)) for rows in (1, 7, 3)]
        other = torch.full((2, 2), rank + 1, dtype=torch.float64)
        sum_over_group([small[0], large, small[1], other, striped, small[2]])
        replicas.barrier()
        return {
            "total": replicas.total([rank, 0.5, 2**40 + rank]),
            "largest": (replicas.largest(rank), replicas.largest(-float(rank))),
            "union": [part.bits for part in replicas.union(own, 5 * rank, 5 * gang.size)],
            "errors": [part.errors_N.tolist() for part in replicas.union(errors, 2 * rank, 2 * gang.size)],
            "sums": [sorted(set(each.flatten().tolist())) for each in (large, striped, *small, other)],
            "losses": [float(loss) for loss in replicas.mean_losses([torch.tensor(float(rank))], rank + 1, 3)],
            "rows": gather_from_group(torch.tensor([rank, rank + 1])).tolist(),
        }


def average(gang: Gang, sizes: Sequence[int]) -> list[Any]:
    """Averages gradients that are the rank; one parameter has none, one is frozen."""
    with joined(gang) as replicas:
        module = nn.ParameterList([torch.ones(3), torch.ones(2), torch.ones(4)])
        module[2].requires_grad_(False)
        module[0].grad = torch.full((3,), float(gang.rank + 1))
        replicas.average_gradients(module, sizes[gang.rank], sum(sizes))
        return [None if parameter.grad is None else parameter.grad.tolist() for parameter in module]


def lose_a_member(gang: Gang, how: str) -> None:
    """Trains until one of the members is killed, or leaves with an error."""
    with joined(gang) as replicas:
        units = make_block()
        optimizers = [make_optimizer(unit, CFG, 0.05) for unit in units]
        replicas.convert(units)
        for step in range(1000):
            if gang.rank == 1 and step == 2:
                _end(how)
            x_NCHW, y_N = torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
            train_step(units, optimizers, x_NCHW, y_N, "fp32", replicas.averaging(4, 4 * gang.size))


def catch_the_loss(gang: Gang) -> str:
    """Returns the error as it is inside the context."""
    with joined(gang) as replicas:
        if gang.rank == 1:
            _end("is killed")
        try:
            replicas.barrier()
        except PeerLost as error:
            return type(error).__name__
    return "nothing"


def join_and_leave_twice(gang: Gang) -> list[int]:
    """Meets the same gang twice at the same address."""
    sums = []
    for _ in range(2):
        with joined(gang) as replicas:
            sums += replicas.total([gang.rank + 1])
    return sums


def come_if_first(gang: Gang) -> None:
    """Joins; all others stay away."""
    if gang.rank == 0:
        with joined(gang, join_timeout_s=1.0):
            pass


def make_block(width: int = 6, loss: str = "cross_entropy") -> list[LocalUnit]:
    """Returns two small units with batch norms of both kinds, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return [_make_unit(3, width, loss), _make_unit(width, width + 2, loss)]


def _make_unit(in_channels: int, out_channels: int, loss: str) -> LocalUnit:
    layer = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(out_channels, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 4),
    )
    inputs = InputSpec(shape=(3, 8, 8))
    end = UnitEnd(out_shape=(out_channels, 8, 8), target=TargetSpec(size=4), inputs=inputs)
    objective = build_objective(loss, end, seed=out_channels)
    return LocalUnit([layer, nn.Conv2d(out_channels, out_channels, 3, padding=1)], head, objective=objective)


def _normalise_case(gang: Gang, case: NormCase) -> dict[str, torch.Tensor]:
    shape, rows = (sum(case.sizes), *case.rest), own_rows(gang, case.sizes)
    net = nn.Sequential(_make_norm(case), nn.Tanh(), _make_norm(case))
    synchronise_batch_norms(net)
    generator = torch.Generator().manual_seed(5)
    seen = {}
    for step in range(2):
        x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 7
        factors = torch.randn(shape, generator=generator, dtype=torch.float64)
        own = x[rows].to(case.dtype, memory_format=getattr(torch, case.layout)).requires_grad_()
        passed = _one_pass(gang, case, net, own, factors[rows].to(case.dtype))
        seen |= {f"step {step} {name}": value for name, value in passed.items()}
    seen["eval output"] = net.eval()(own)
    return {name: value.detach().clone() for name, value in seen.items()} | _state(net)


def _one_pass(
    gang: Gang, case: NormCase, net: nn.Module, own: torch.Tensor, factors: torch.Tensor
) -> dict[str, torch.Tensor]:
    net.zero_grad(set_to_none=True)
    out = net(own)
    # One process has the mean over all samples; several have means over their own.
    (out * factors).flatten(1).mean(dim=1).mean().backward()
    share = 1.0 if gang.size == 1 else case.sizes[gang.rank] / sum(case.sizes)
    gradients = [parameter.grad * share for parameter in net.parameters()]
    if gang.size > 1:
        sum_over_group(gradients)
    named = {f"gradient {idx}": gradient for idx, gradient in enumerate(gradients)}
    return {"output": out, "input gradient": own.grad * share, **named}


def _make_norm(case: NormCase) -> nn.Module:
    """Returns a native layer with weights that are not all alike."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(case.rest)]
    norm = kind(case.rest[0], **case.options).to(torch.promote_types(case.dtype, torch.float32))
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, -1.5, case.rest[0]))
            norm.bias.copy_(torch.linspace(0.4, -0.6, case.rest[0]))
    return norm


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"state {name}": value.detach().clone() for name, value in module.state_dict().items()}


def _end(how: str) -> None:
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise Diverged("block-003", "the loss is NaN")


def listening_addresses(gang: Gang) -> list[str]:
    """Joins, exchanges a number and returns the addresses that this member listens on meanwhile."""
    import psutil

    with Replicas("block-000", gang, torch.device("cpu"), join_timeout_s=60.0) as replicas:
        assert replicas.total([1]) == [gang.size]
        connections = psutil.Process().net_connections(kind="inet")
        addresses = [socket.laddr.ip for socket in connections if socket.status == psutil.CONN_LISTEN]
        replicas.barrier()
    return addresses
