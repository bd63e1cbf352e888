"""What a real Ray node exports to Prometheus after a driver has observed a run's events."""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_sessions import free_ports, running, wait_until

pytestmark = pytest.mark.ray

# A process of its own: joining a cluster is for the whole process. It lives until its standard input is closed.
DRIVER = """
    import sys
    import ray
    from nf_pipeline.events import EpochDone, Note, Progress, StageDone, StageFailed
    from nf_pipeline.executors.ray_metrics import RunMetrics

    ray.init(address=sys.argv[1], log_to_driver=False)
    metrics = RunMetrics("first")
    events = [
        Progress(stage="ingest", phase="read", done=5, total=9, images_per_s=400.0),
        Progress(
            stage="block-000", phase="train", done=1, total=2, epoch=1, loss=0.5, images_per_s=10.0, peak_bytes=77
        ),
        EpochDone(
            stage="block-000", epoch=1, num_epochs=2, losses=[1.0, 0.25], val_accuracies=[0.125, 0.75],
            images_per_s=11.0, loader_wait_s=1.5, peak_bytes=78,
        ),
        Progress(stage="block-000", phase="validate", done=1, total=2, epoch=2, images_per_s=9999.0),
        EpochDone(
            stage="block-000", epoch=2, num_epochs=2, losses=[1.0, 0.125], val_accuracies=[0.125, 0.875],
            images_per_s=12.0, loader_wait_s=0.5, peak_bytes=79,
        ),
        Note(stage="block-000", text="nothing to count"),
        StageDone(stage="block-000", result={"shard_bytes": 1000}, seconds=1.0),
        StageDone(stage="model", result={}, seconds=1.0),
        StageFailed(stage="block-001", attempt="a", error="WorkerLost", text="gone"),
        StageFailed(stage="block-001", attempt="b", error="WorkerLost", text="gone"),
    ]
    for event in events:
        metrics.observe(event)
    print("observed", flush=True)
    sys.stdin.read()
"""

EXPECTED = {
    ("images_per_s", "ingest"): 400.0,
    ("loss", "block-000"): 0.125,
    ("images_per_s", "block-000"): 12.0,
    ("peak_bytes", "block-000"): 79.0,
    ("epoch", "block-000"): 2.0,
    ("val_accuracy", "block-000"): 0.875,
    ("loader_wait_s_total", "block-000"): 2.0,
    ("shard_bytes_total", "block-000"): 1000.0,
    ("attempts_failed_total", "block-001"): 2.0,
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for Ray whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="nf-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def scraped(url: str) -> dict[tuple[str, str], float]:
    """Returns the product's series of one scrape by name and block."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    lines = re.findall(r"^ray_nf_pipeline_(\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE)
    assert all('run="first"' in labels for _, labels, _ in lines)
    return {(name, re.search(r'block="([^"]*)"', labels)[1]): float(value) for name, labels, value in lines}


def test_ray_exports_the_numbers_of_a_run(folder: Path) -> None:
    head, client, agent, metrics = free_ports(4)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 32,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    ray = str(Path(sys.executable).with_name("ray"))
    start = [ray, "start", "--head", f"--port={head}", "--num-cpus=0", "--include-dashboard=false", "--block"]
    start += [f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    start += [f"--ray-client-server-port={client}", f"--temp-dir={folder / 'ray'}", "--object-store-memory=100000000"]
    driver = [sys.executable, "-c", textwrap.dedent(DRIVER), f"127.0.0.1:{head}"]
    url = f"http://127.0.0.1:{metrics}/metrics"
    with running(start, environment, folder / "head.log") as node:
        node.wait_for_line("Ray runtime started")
        with running(driver, environment, folder / "driver.log", stdin=subprocess.PIPE) as process:
            process.wait_for_line("observed")
            wait_until(lambda: scraped(url) == EXPECTED, "all series are exported", timeout_s=30)
