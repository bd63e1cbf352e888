"""Whole runs on a real Ray of several nodes: placement by memory, lost nodes, gangs, rounds, overlap."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.doctor import GREETING_STAGE
from nf_pipeline.driver.preview import preview
from nf_pipeline.driver.run import train
from nf_pipeline.driver.status import read_status
from nf_pipeline.driver.stop_request import StopRequest
from nf_pipeline.errors import ConfigError, RunInterrupted
from nf_pipeline.events import EpochDone, Event, Note, Publishing, StageFailed, StageStarted
from nf_pipeline.executors import open_executor
from nf_pipeline.executors.base import Resources
from nf_pipeline.worker_resources import CPU_MEMORY, GPU_MEMORY

pytestmark = pytest.mark.ray

MakeConfig = Callable[..., RunConfig]
KIB = 2**10
MIB = 2**20


class Nodes:
    """A cluster of raylets on this machine that tests add to and take from."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.address = self.cluster.address

    def add(self, *, gpu: bool = False, **resources: float) -> object:
        node = self.cluster.add_node(num_cpus=1, num_gpus=int(gpu), resources=resources)
        self.cluster.wait_for_nodes()
        return node

    def lose_node_of(self, worker: str) -> None:
        """Kills the raylet whose child a worker process is, given as "host:pid"."""
        parent = int(Path(f"/proc/{pid_of(worker)}/stat").read_text().rsplit(")", 1)[1].split()[1])
        for node in self.cluster.list_all_nodes():
            if node.all_processes["raylet"][0].process.pid == parent:
                return self.lose(node)
        raise AssertionError(f"no node started {worker}")

    def lose(self, node: object) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head with one CPU, and two workers that advertise 3 MiB and 8 MiB for training on their CPU."""
    running = Nodes()
    running.add(**{CPU_MEMORY: 3})
    running.add(**{CPU_MEMORY: 8})
    yield running
    running.cluster.shutdown()


@pytest.fixture
def on_cluster(digits_config: MakeConfig, nodes: Nodes) -> MakeConfig:
    """Makes fast configurations that run on the cluster."""

    def make(**changes: object) -> RunConfig:
        joined = {"cluster__executor": "ray", "cluster__address": nodes.address, "cluster__placement_timeout_s": 20}
        return digits_config(**{**joined, **changes})

    return make


def started(events: list[Event]) -> dict[str, str]:
    return {event.stage: event.worker for event in events if isinstance(event, StageStarted)}


def test_auto_takes_the_smallest_class_and_larger_workers_for_what_does_not_fit_it(on_cluster: MakeConfig) -> None:
    summary = train(on_cluster(memory__budget_bytes="auto", train__epochs=1, memory__min_batch_size=64))
    budgets = [block["budget_bytes"] for block in summary["blocks"]]
    assert summary["memory_budget_bytes"] == 3 * MIB
    assert set(budgets) == {3 * MIB, 8 * MIB}
    assert all(block["measured_peak_bytes"] <= block["budget_bytes"] for block in summary["blocks"])


def test_block_that_needs_more_than_the_small_workers_have_runs_on_the_large_one(
    on_cluster: MakeConfig, tmp_path: Path
) -> None:
    events: list[Event] = []
    train(on_cluster(memory__budget_bytes="8MiB", train__epochs=1, cluster__overlap=False), on_event=events.append)
    plan = json.loads((tmp_path / "runs" / "run" / "plan.json").read_text())
    needing = [block for block in plan["blocks"] if block["predicted_peak_bytes"] > 3 * MIB]
    assert needing
    placed = started(events)
    assert len({placed[f"block-{block['block_idx']:03d}"] for block in needing}) == 1


def test_plan_counts_the_workers_that_could_hold_each_block(on_cluster: MakeConfig) -> None:
    seen = preview(on_cluster(memory__budget_bytes="auto", memory__min_batch_size=64))
    assert [worker.memory_bytes for worker in seen.workers] == [3 * MIB, 8 * MIB]
    fitting = [1 if block.budget_bytes == 8 * MIB else 2 for block in seen.plan.blocks]
    assert set(fitting) == {1, 2}
    assert seen.placement["workers_that_fit"] == fitting


def test_budget_that_no_worker_has_fails_before_anything_is_read(on_cluster: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan asks for 1 CPU, 0 GPU, 9 cpu_mem_mib .* 8 cpu_mem_mib"):
        train(on_cluster(memory__budget_bytes="9MiB"))
    assert not (tmp_path / "runs" / "run" / "ingest").exists()


def test_gpu_blocks_ask_for_a_gpu_and_its_memory(on_cluster: MakeConfig, nodes: Nodes) -> None:
    gpu = nodes.add(gpu=True, **{GPU_MEMORY: 3500})
    try:
        with pytest.raises(ConfigError, match=r"1 GPU, 6144 gpu_mem_mib .* 1 GPU, 3500 gpu_mem_mib"):
            train(on_cluster(memory__budget_bytes="6GiB", train__device="auto"))
    finally:
        nodes.lose(gpu)


def test_workers_decide_the_default_number_of_threads(on_cluster: MakeConfig) -> None:
    with open_executor(on_cluster().cluster) as executor:
        assert executor.default_threads("auto") == 1


def test_impossible_gang_fails_before_anything_is_read(on_cluster: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training asks for 99 workers with 1 CPU, 0 GPU, 3 cpu_mem_mib"):
        train(on_cluster(memory__budget_bytes="3MiB", train__workers_per_block=99))
    assert not (tmp_path / "runs" / "run" / "ingest").exists()


def test_gpu_stage_ends_its_process_so_that_its_memory_is_free(on_cluster: MakeConfig, nodes: Nodes) -> None:
    gpu = nodes.add(gpu=True, **{GPU_MEMORY: 3500})
    try:
        with open_executor(on_cluster().cluster) as executor:
            asked = Resources(num_cpus=1, device="cuda", memory_bytes=3500 * MIB)
            pids = set()
            for _ in range(2):
                (hello,) = executor.run("greet", GREETING_STAGE, None, asked)
                pids.add(int(hello.text.rpartition(":")[2]))
            assert len(pids) == 2
            _wait_until_gone(pids)
    finally:
        nodes.lose(gpu)


def _wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a GPU worker outlived its stage"
        time.sleep(0.1)


def test_pipelined_run_equals_the_inline_one_bit_for_bit(on_cluster: MakeConfig, digits_config: MakeConfig) -> None:
    rounds = {"train__mode": "pipelined", "train__epochs": 3, "train__augment": "flip"}
    inline = train(digits_config(run="inline", **rounds))
    events: list[Event] = []
    by_ray = train(on_cluster(run="ray", **rounds), on_event=events.append)
    assert by_ray["weights_checksum"] == inline["weights_checksum"]
    assert [block["attempts"] for block in by_ray["blocks"]] == [1] * len(by_ray["blocks"])
    assert len([event for event in events if isinstance(event, StageStarted) and event.stage == "block-000"]) == 3


def test_pipelined_run_that_is_asked_to_stop_finishes_the_epochs_of_all_its_blocks(
    on_cluster: MakeConfig, digits_config: MakeConfig
) -> None:
    config = on_cluster(run="stopped", train__mode="pipelined", train__epochs=4)
    stop, first, second = StopRequest(), [], []

    def listen(event: Event) -> None:
        first.append(event)
        if isinstance(event, EpochDone) and event.stage == "block-001":
            stop.ask()

    with pytest.raises(RunInterrupted):
        train(config, on_event=listen, stop=stop)
    resumed = train(config, on_event=second.append)
    inline = train(digits_config(run="inline", train__mode="pipelined", train__epochs=4))
    assert resumed["weights_checksum"] == inline["weights_checksum"]
    assert not [event for event in first if isinstance(event, StageFailed)]
    epochs = [(event.stage, event.epoch) for event in [*first, *second] if isinstance(event, EpochDone)]
    assert len(epochs) == len(set(epochs)) == 4 * len(resumed["blocks"])


def test_node_lost_in_the_middle_of_a_block_is_replaced_and_the_weights_stay_the_same(
    on_cluster: MakeConfig, digits_config: MakeConfig, nodes: Nodes
) -> None:
    inline = train(digits_config(run="inline", train__epochs=12, memory__budget_bytes="12MiB"))
    nodes.add(**{CPU_MEMORY: 12})
    nodes.add(**{CPU_MEMORY: 12})
    lost, events = [], []

    def lose_once(event: Event) -> None:
        events.append(event)
        if isinstance(event, EpochDone) and event.stage == "block-000" and not lost:
            lost.append(event.epoch)
            nodes.lose_node_of(started(events)["block-000"])

    summary = train(on_cluster(run="ray", train__epochs=12, memory__budget_bytes="12MiB"), on_event=lose_once)
    assert lost
    failed = [event for event in events if isinstance(event, StageFailed)]
    assert [event.error for event in failed] == ["WorkerLost"]
    again = [event for event in events if isinstance(event, StageStarted) and event.stage == "block-000"]
    assert again[-1].resumed_epochs >= 1
    assert any(isinstance(event, Note) and "retry" in event.text for event in events)
    assert summary["weights_checksum"] == inline["weights_checksum"]
    assert summary["blocks"][0]["attempts"] == 2


MANY_SHARDS = {"storage__shard_bytes": 4 * KIB, "data__max_train_images": 1400, "train__epochs": 2}
"""Every sample is a shard, so that writing takes longer than it takes to stop the writer."""


class HeldWriter:
    """Stops the process of the first block when it begins to write, until the next block has started."""

    def __init__(self, then: Callable[[str], None]) -> None:
        self.events: list[Event] = []
        self.released = ""
        self._held = ""
        self._then = then

    def __call__(self, event: Event) -> None:
        """Takes one event of the run."""
        self.events.append(event)
        if isinstance(event, Publishing) and event.stage == "block-000" and not self._held:
            self._held = started(self.events)["block-000"]
            os.kill(pid_of(self._held), signal.SIGSTOP)
        elif isinstance(event, StageStarted) and event.stage == "block-001" and self._held and not self.released:
            self.released = self._held
            self._then(self._held)


def pid_of(worker: str) -> int:
    return int(worker.rpartition(":")[2])


def test_next_block_starts_while_the_block_before_writes_and_ends_with_the_same_weights(
    on_cluster: MakeConfig, digits_config: MakeConfig, nodes: Nodes
) -> None:
    nodes.add(**{CPU_MEMORY: 8})
    inline = train(digits_config(run="inline", **MANY_SHARDS))
    writer = HeldWriter(then=lambda worker: os.kill(pid_of(worker), signal.SIGCONT))
    by_ray = train(on_cluster(run="ray", **MANY_SHARDS), on_event=writer)
    assert writer.released, "block-001 started only when block-000 had ended"
    assert not [event for event in writer.events if isinstance(event, StageFailed)]
    assert by_ray["weights_checksum"] == inline["weights_checksum"]


def test_writer_lost_while_the_next_block_reads_gets_the_only_worker_that_is_left(
    on_cluster: MakeConfig, digits_config: MakeConfig, nodes: Nodes
) -> None:
    # A budget that only two nodes have, one of which is lost: the reader must give way to the writer's next attempt.
    large = {
        **MANY_SHARDS,
        "memory__budget_bytes": "20MiB",
        "memory__max_batch_size": 600,
        "memory__join_threshold": 0.0,
    }
    inline = train(digits_config(run="inline", **large))
    for _ in range(2):
        nodes.add(**{CPU_MEMORY: 20})
    writer = HeldWriter(then=nodes.lose_node_of)
    by_ray = train(on_cluster(run="ray", **large), on_event=writer)
    assert writer.released, "block-001 started only when block-000 had ended"
    failed = [(event.stage, event.error) for event in writer.events if isinstance(event, StageFailed)]
    assert failed == [("block-000", "WorkerLost"), ("block-001", "InputReplaced")]
    assert by_ray["weights_checksum"] == inline["weights_checksum"]
    assert by_ray["blocks"][0]["attempts"] == 2


def test_status_of_a_running_run_is_read_from_the_store_alone(on_cluster: MakeConfig, tmp_path: Path) -> None:
    seen: list[dict] = []

    def look(event: Event) -> None:
        if isinstance(event, EpochDone) and event.epoch == 1 and not seen:
            seen.append(read_status(str(tmp_path / "runs" / "run")))

    train(on_cluster(train__epochs=2), on_event=look)
    (status,) = seen
    assert status["state"] == "running"
    assert {stage["stage"]: stage["state"] for stage in status["stages"]}["block-000"] == "running"


def test_run_ends_early_on_a_cluster_where_it_ends_alone(on_cluster: MakeConfig, tmp_path: Path) -> None:
    hopeless = {"memory__budget_bytes": "3MiB", "data__max_train_images": 200, "train__epochs": 1}
    hopeless |= {"memory__join_threshold": 0.0, "train__lr": 1e-7, "exits__patience": 1}
    alone = {"cluster__executor": "inline", "cluster__address": None, "storage__uri": str(tmp_path / "alone")}
    wanted = train(on_cluster(**hopeless, **alone))
    config = on_cluster(**hopeless)
    summary = train(config)
    assert summary["stopped_early"]
    assert summary["stopped_after_block"] == wanted["stopped_after_block"]
    assert summary["weights_checksum"] == wanted["weights_checksum"]
    # The next block may have begun on what the last one was writing: that is no failure.
    states = [stage["state"] for stage in read_status(f"{config.storage.uri}/{config.run}")["stages"]]
    assert set(states) == {"done", "not needed"}
