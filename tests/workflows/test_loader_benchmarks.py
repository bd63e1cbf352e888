"""The loader's benchmark runs on the shipped digits, and the tables of both say what their numbers say."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "workflows" / "benchmarks"


@pytest.fixture
def shard_types(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of types, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import shard_types

    return shard_types


def test_loader_benchmark_measures_every_format_and_names_what_is_not_installed(tmp_path: Path) -> None:
    output = tmp_path / "loader.json"
    command = [sys.executable, str(BENCHMARKS / "loader.py"), "--rows", "300", "--repeats", "1"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rates = {rate["name"]: rate for rate in json.loads(output.read_text())["rates"]}
    ours = [name for name in rates if name.startswith("nf_pipeline, local")]
    assert len(ours) == 8
    assert sum(name.endswith("as float32") for name in ours) == 4
    for name in ours:
        assert all(share > 0 for share in rates[name]["of_limits"]) and len(rates[name]["of_limits"]) == 2
        assert all(rates[limit]["stored_mb_s"] > 0 for limit in rates[name]["limits"])
    peers = [rate for name, rate in rates.items() if name.partition(" ")[0] in ("webdataset", "litdata")]
    assert all(rate["note"] == "not installed" or rate["stored_mb_s"] > 0 for rate in peers) and len(peers) == 2
    assert output.with_suffix(".md").read_text() in done.stdout + "\n"


def test_table_of_types_compares_every_run_with_float32_of_its_own_seed(shard_types: ModuleType) -> None:
    times = {
        "write_s": 1.0,
        "loader_wait_s": 0.1,
        "train_s": 9.0,
        "fed_wait_s": 0.1,
        "fed_train_s": 5.0,
        "run_s": 12.0,
    }
    results = [
        shard_types.Result(
            kind=kind, seed=seed, shard_bytes=2**20, last_val=base + change, chosen_test=base + change, **times
        )
        for seed, base in ((0, 0.5), (1, 0.7))
        for kind, change in (("float32, none", 0.0), ("uint8, none", 0.01))
    ]
    table = shard_types.render_table(results).splitlines()
    assert len(table) == 4
    assert "61.00 ± 14.14 | +1.00 ± 0.00" in table[3]
    assert "| 2.0% | 10.0 |" in table[3]
