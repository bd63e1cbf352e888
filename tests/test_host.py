import os
from pathlib import Path

import pytest

from nf_pipeline import host


@pytest.mark.parametrize(("text", "cpus"), [("50000 100000\n", 0.5), ("max 100000\n", None), ("odd", None)])
def test_usable_cpus_respects_the_limit_of_a_container(
    text: str, cpus: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "CGROUP_CPU_LIMIT", tmp_path / "absent")
    unlimited = host.usable_cpus()
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(host, "CGROUP_CPU_LIMIT", tmp_path / "cpu.max")
    assert host.usable_cpus() == (unlimited if cpus is None else cpus)
    assert unlimited >= 1


def test_a_fraction_of_a_cpu_still_gives_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("30000 100000")
    monkeypatch.setattr(host, "CGROUP_CPU_LIMIT", tmp_path / "cpu.max")
    assert host.available_threads() == 1


def test_worker_name_ends_with_the_process() -> None:
    assert host.worker_name().endswith(f":{os.getpid()}")
