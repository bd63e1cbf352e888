"""What a process of a run takes of its host's memory does not grow with the data.

Every stage runs in a process of its own, as in workflows/benchmarks/host_memory.py, which measures it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "workflows" / "benchmarks"
MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


@pytest.fixture(scope="module")
def host_memory() -> ModuleType:
    """The benchmark, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import host_memory

        return host_memory


@pytest.fixture
def arguments(host_memory: ModuleType) -> Callable[..., argparse.Namespace]:
    """Makes arguments: large uncompressed files, small images, so that what is kept too long shows at once."""

    def make(*given: str) -> argparse.Namespace:
        stored = ["--format", "BMP", "--image-size", "160", "--rows-per-file", "50", "--set", "data.image_size=64"]
        run = ["--shard-bytes", "256KiB", "--memory-budget", "8MiB"]
        return host_memory.parse_arguments([*stored, *run, *given])

    return make


def test_ingest_and_training_take_no_more_memory_for_eight_times_the_data(
    host_memory: ModuleType, arguments: Callable[..., argparse.Namespace], tmp_path: Path
) -> None:
    small, large = 500, 4000
    peaks = {}
    for num_images in (small, large):
        folder = tmp_path / str(num_images)
        stages = ("ingest", "plan", "block-000") if num_images == small else ("ingest", "block-000")
        if num_images == large:
            folder.mkdir()
            (folder / "plan.json").write_bytes((tmp_path / str(small) / "plan.json").read_bytes())
        measured = host_memory.measure_stages(arguments(), folder, num_images, stages)
        peaks[num_images] = {usage.process: usage.peak_bytes for usage in measured}
    # Files: 307 MB instead of 38. Images and activations of the first block: 111 MB instead of 14.
    assert peaks[large]["ingest"] - peaks[small]["ingest"] < 96 * MIB
    assert peaks[large]["block-000"] - peaks[small]["block-000"] < 48 * MIB
    assert peaks[large]["ingest"] < 400 * MIB, "reading images needs no torch"


@pytest.mark.slow
@pytest.mark.ray
def test_every_process_of_a_run_takes_no_more_memory_for_sixteen_times_the_data(
    host_memory: ModuleType, arguments: Callable[..., argparse.Namespace]
) -> None:
    usages = list(host_memory.measure_sizes(arguments("--images", "500", "--factors", "1", "16")))
    for process in {usage.process for usage in usages}:
        small, large = (usage.peak_bytes for usage in usages if usage.process == process)
        assert large - small < 96 * MIB, process
    assert {usage.process for usage in usages} > {"driver", "ingest", "plan", "block-000", "model"}
