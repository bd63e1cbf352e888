"""LiveBytes against byte counts worked out by hand, and once against the allocator."""

import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nf_pipeline.core.memory import CudaPeak, LiveBytes, measure_peak

CPU = torch.device("cpu")
KIB = 1024


def floats(num_bytes: int) -> torch.Tensor:
    return torch.ones(num_bytes // 4)


def test_a_new_tensor_counts_its_storage() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
        assert meter.current_bytes == KIB
        y = x.double()
    assert (meter.current_bytes, meter.peak_bytes) == (3 * KIB, 3 * KIB)
    assert y.sum() == KIB // 4


def test_a_freed_tensor_leaves_the_current_bytes_and_stays_in_the_peak() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(4 * KIB)
        del x
        assert (meter.current_bytes, meter.peak_bytes) == (0, 4 * KIB)
        y = floats(KIB)
    assert (meter.current_bytes, meter.peak_bytes) == (y.nbytes, 4 * KIB)


def test_tensors_freed_outside_the_meter_are_noticed() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
    del x
    assert meter.current_bytes == 0


def test_views_share_one_storage_and_keep_it_alive() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
        views = [x.view(16, -1), x[3:5], x.detach(), x.expand(4, -1), *x.split(64)]
        assert meter.current_bytes == KIB
        del x
        assert meter.current_bytes == KIB
        views.clear()
        assert meter.current_bytes == 0


def test_in_place_operators_add_nothing() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
        x.add_(1).mul_(2).relu_()
        nn.functional.relu(x, inplace=True)
        x[2:4].zero_()
    assert meter.peak_bytes == KIB


def test_out_arguments_and_resizes_count_the_new_size() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
        result = torch.empty(0)
        torch.add(x, x, out=result)
        assert meter.current_bytes == 2 * KIB
        result.resize_(KIB)
        assert meter.current_bytes == 5 * KIB


def test_operators_with_several_results_count_each() -> None:
    x_NCHW = torch.randn(2, 4, 8, 8)
    with LiveBytes(CPU) as meter:
        values, indices = nn.functional.max_pool2d(x_NCHW, 2, return_indices=True)
    assert (values.nbytes, indices.nbytes) == (512, 1024)
    assert meter.current_bytes == 512 + 1024


def test_tensors_saved_for_backward_count_until_the_backward_pass() -> None:
    weight = torch.ones(256, requires_grad=True)
    with LiveBytes(CPU) as meter:
        meter.track(weight)
        loss = (weight * 2).exp().exp().sum()
        # weight, both results of exp (each saved by its backward), the loss; the product is gone.
        assert meter.current_bytes == 3 * KIB + 4
        loss.backward()
        assert meter.current_bytes == 2 * KIB + 4  # weight and its gradient
        weight.grad = None
        assert meter.current_bytes == KIB + 4


def test_tensors_made_before_entering_count_once_tracked() -> None:
    x, linear = floats(KIB), nn.Linear(16, 16)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
    linear(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    weights = (16 * 16 + 16) * 4
    meter = LiveBytes(CPU)
    meter.track(x, linear, optimizer)
    meter.track(x.view(2, -1), linear)
    assert meter.current_bytes == meter.peak_bytes == KIB + 3 * weights
    del x
    optimizer.zero_grad()
    assert meter.current_bytes == 2 * weights


def test_module_buffers_are_tracked_with_the_module() -> None:
    meter = LiveBytes(CPU)
    meter.track(nn.BatchNorm2d(8))
    gc.collect()
    assert meter.peak_bytes == 4 * 8 * 4 + 8


def test_numpy_memory_counts_only_when_tracked() -> None:
    array = np.ones((4, 64), dtype=np.float32)
    with LiveBytes(CPU) as meter:
        host = torch.from_numpy(array)
        view = host.view(8, 32).view(torch.uint8)
        assert meter.current_bytes == 0
        x = host.to(torch.float64)
        assert meter.current_bytes == 2 * KIB
        meter.track(host)
        assert meter.current_bytes == 3 * KIB
        del host, x
        assert meter.current_bytes == KIB
        del view
        assert meter.current_bytes == 0


def test_counts_survive_leaving_and_entering_again() -> None:
    meter = LiveBytes(CPU)
    with meter:
        x = floats(KIB)
    unseen = floats(4 * KIB)
    with meter:
        y = floats(2 * KIB)
    assert (meter.current_bytes, meter.peak_bytes) == (3 * KIB, 3 * KIB)
    assert len(unseen) + len(x) + len(y) == 7 * 256


def test_reset_peak_starts_from_what_is_held() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
        y = floats(8 * KIB)
        del y
        meter.reset_peak()
        assert meter.peak_bytes == KIB
        x = floats(2 * KIB)  # the old one dies after the new one is made
    assert meter.peak_bytes == 3 * KIB
    assert x.nbytes == 2 * KIB


def test_other_devices_do_not_count() -> None:
    with LiveBytes(CPU) as meter:
        torch.ones(KIB, device="meta") + 1
    assert meter.peak_bytes == 0


def test_a_meter_may_die_before_the_tensors_it_saw() -> None:
    with LiveBytes(CPU) as meter:
        x = floats(KIB)
    reference = weakref.ref(meter)
    del meter
    gc.collect()
    assert reference() is None, "the tensors it saw keep the meter alive"
    del x  # calls back a meter that is gone


def test_an_error_inside_leaves_the_meter() -> None:
    meter = LiveBytes(CPU)
    with pytest.raises(RuntimeError, match="size"), meter:
        torch.ones(3) + torch.ones(4)
    floats(KIB)
    assert meter.peak_bytes == 7 * 4


def allocator_peak(run: Callable[[], object], trace: Path) -> int:
    """The most bytes that the CPU allocator handed out while running, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf8"))["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(num_bytes for _, num_bytes in allocations))


def test_the_peak_of_a_training_step_is_that_of_the_cpu_allocator(tmp_path: Path) -> None:
    # Small channels: a large convolution's backward pass takes scratch that is no tensor, see the module.
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 256, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    def step() -> None:
        loss = model(torch.randn(32, 3, 32, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    meter = LiveBytes(CPU)
    with meter:
        step()
    assert meter.peak_bytes == pytest.approx(allocator_peak(step, tmp_path / "trace.json"), rel=0.01)


def test_measure_peak_picks_the_meter_of_the_device() -> None:
    assert isinstance(measure_peak(CPU), LiveBytes)


@pytest.mark.gpu
def test_cuda_peak_reads_the_allocator() -> None:
    meter = measure_peak(torch.device("cuda"))
    before_bytes = meter.current_bytes
    with meter:
        x = torch.ones(2**18, device="cuda")
        del x
    assert isinstance(meter, CudaPeak)
    assert meter.peak_bytes == before_bytes + 2**20
    assert meter.current_bytes == before_bytes
