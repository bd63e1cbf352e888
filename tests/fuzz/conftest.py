"""Prints what the fuzz tests tried; NF_FUZZ_REPORT names a file that gets the same as JSON."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cases import FOUND, TRIED, scratch_folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Ends a session that ran fuzz tests with their table."""
    if not TRIED:
        return
    terminalreporter.section("fuzz: target, cases, findings")
    for target in sorted(TRIED):
        terminalreporter.line(f"{target:<40} {TRIED[target]:>9,} {FOUND[target]:>4}")
    terminalreporter.line(f"{'all':<40} {TRIED.total():>9,} {FOUND.total():>4}")


def pytest_sessionfinish() -> None:
    """Writes the report that NF_FUZZ_REPORT asks for, and clears up."""
    shutil.rmtree(scratch_folder())
    if TRIED and (report := os.environ.get("NF_FUZZ_REPORT")):
        rows = [{"target": name, "cases": TRIED[name], "findings": FOUND[name]} for name in sorted(TRIED)]
        Path(report).write_text(json.dumps(rows, indent=1), encoding="utf8")
