"""The same run by the inline executor and by Ray: same weights, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from process_sessions import members, wait_until

from nf_pipeline.config import RunConfig
from nf_pipeline.driver.run import resume, train
from nf_pipeline.errors import ConfigError, PlanError

pytestmark = pytest.mark.ray

MakeConfig = Callable[..., RunConfig]


def test_ray_and_inline_end_with_the_same_weights(digits_config: MakeConfig) -> None:
    inline = train(digits_config(run="inline"))
    by_ray = train(digits_config(run="ray", cluster__executor="ray"))
    assert by_ray["weights_checksum"] == inline["weights_checksum"]
    assert by_ray["executor"] == "ray"
    assert str(os.getpid()) not in {block["worker"].split(":")[1] for block in by_ray["blocks"]}


def test_error_of_a_worker_arrives_whole(digits_config: MakeConfig) -> None:
    with pytest.raises(PlanError) as caught:
        train(digits_config(cluster__executor="ray", memory__budget_bytes="20KiB"))
    assert caught.value.smallest_budget_bytes > caught.value.budget_bytes == 20 * 1024


def test_request_that_no_node_can_hold_fails_with_what_is_missing(digits_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="asks for 999 CPU"):
        train(digits_config(cluster__executor="ray", cluster__num_threads=999))


def test_killed_worker_is_replaced_and_the_weights_stay_the_same(digits_config: MakeConfig) -> None:
    inline = train(digits_config(run="inline", train__epochs=3))
    killed = []

    def kill_once(event: object) -> None:
        if type(event).__name__ == "StageStarted" and event.stage == "block-001" and not killed:
            killed.append(int(event.worker.split(":")[1]))
            os.kill(killed[0], signal.SIGKILL)

    config = digits_config(run="ray", train__epochs=3, cluster__executor="ray")
    summary = train(config, on_event=kill_once)
    assert killed
    assert summary["weights_checksum"] == inline["weights_checksum"]
    assert [block["attempts"] for block in summary["blocks"]][1] == 2


def test_killed_command_leaves_no_process_behind_and_resumes(digits_config: MakeConfig, tmp_path: Path) -> None:
    inline = train(digits_config(run="inline"))
    config = digits_config(run="ray", cluster__executor="ray")
    command = [sys.executable, "-m", "nf_pipeline", "train", "--config", str(_toml(config, tmp_path))]
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    events = Path(config.storage.uri, "ray", "events.jsonl")
    _wait_until(lambda: events.exists() and '"stage": "block-001"' in events.read_text(), driver)
    assert _last_worker(events) in members(driver.pid)
    driver.kill()
    driver.wait(timeout=30)
    wait_until(lambda: not members(driver.pid), "Ray's own processes end too", timeout_s=20)
    assert resume(f"{config.storage.uri}/ray")["weights_checksum"] == inline["weights_checksum"]


def test_driver_on_ray_never_imports_torch(digits_config: MakeConfig) -> None:
    script = (
        "import json, sys\n"
        "from nf_pipeline.config import validate_config\n"
        "from nf_pipeline.driver.run import train\n"
        "train(validate_config(json.load(sys.stdin)))\n"
        "print('torch' in sys.modules)\n"
    )
    config = digits_config(cluster__executor="ray", train__epochs=1)
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=config.model_dump_json(),
        text=True,
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr


def _toml(config: RunConfig, folder: Path) -> Path:
    document = config.model_dump(mode="json", exclude_none=True)
    lines = [f"run = {json.dumps(document.pop('run'))}"]
    for section, fields in document.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    file = folder / "run.toml"
    file.write_text("\n".join(lines))
    return file


def _last_worker(events: Path) -> int:
    started = [json.loads(line) for line in events.read_text().splitlines() if '"StageStarted"' in line]
    return int(started[-1]["worker"].split(":")[1])


def _wait_until(condition: Callable[[], bool], driver: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert driver is None or driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline, "waited 240 s"
        time.sleep(0.05)
