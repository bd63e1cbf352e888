"""Faults at random times while a driver works on a run, for the soak; every choice follows from a seed.

Entry: `Chaos`.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

import psutil
from fault_proxy import Answer, At, Fault, Hang, Reset, Rule, Throttle
from fault_scene import Scene

MIB = 2**20
LONGEST_OUTAGE_S = 8.0
AWAKE_TIMEOUT_S = 5.0


class Chaos:
    """A thread that breaks things around one run.

    Args:
        scene: where the run is.
        run: name of the run, by which its workers are known.
        uses_s3: whether its store can be broken too.
        choices: decides what, and when.
        within_s: faults happen in so many seconds from now.

    Attributes:
        driver: process of the driver, when there is one; set by whoever starts it.
        happened: fault -> how often.
    """

    def __init__(
        self, scene: Scene, run: str, *, uses_s3: bool, choices: random.Random, num_faults: int, within_s: float
    ) -> None:
        self.driver: int | None = None
        self.happened: Counter[str] = Counter()
        self._scene = scene
        self._run = run
        kinds: dict[str, Callable[[random.Random], bool]] = {
            "worker killed": self._kill_worker,
            "worker frozen": self._freeze_worker,
            "driver killed": lambda _: self._signal_driver(signal.SIGKILL),
            "driver interrupted": lambda _: self._signal_driver(signal.SIGINT),
            "raylet lost": self._lose_raylet,
        }
        if uses_s3:
            kinds |= {"S3 restarted": self._restart_server, "S3 broken for a while": self._break_server}
        names = choices.choices(list(kinds), k=num_faults)
        times = sorted(choices.uniform(0.0, within_s) for _ in names)
        self._plan = [(at_s, name, kinds[name]) for at_s, name in zip(times, names, strict=True)]
        self._choices = choices
        self._num_missing = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="chaos", daemon=True)

    def replace_nodes(self) -> None:
        """Adds a node for each that was lost; Ray wants the main thread for that."""
        while self._num_missing:
            self._scene.raylets.add()
            self._num_missing -= 1

    def __enter__(self) -> "Chaos":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def _work(self) -> None:
        began = time.monotonic()
        for at_s, name, strike in self._plan:
            if self._ended.wait(max(0.0, began + at_s - time.monotonic())):
                return
            with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has just ended by itself
                self.happened[name] += strike(self._choices)

    def _worker(self, choices: random.Random) -> psutil.Process | None:
        found = workers_of_run(self._run)
        return choices.choice(found) if found else None

    def _kill_worker(self, choices: random.Random) -> bool:
        worker = self._worker(choices)
        if worker is not None:
            worker.kill()
        return worker is not None

    def _freeze_worker(self, choices: random.Random) -> bool:
        worker = self._worker(choices)
        if worker is None:
            return False
        worker.suspend()
        self._ended.wait(choices.uniform(0.5, AWAKE_TIMEOUT_S))
        worker.resume()
        return True

    def _signal_driver(self, number: int) -> bool:
        driver = self.driver
        if driver is None or not psutil.pid_exists(driver):
            return False
        os.kill(driver, number)
        return True

    def _lose_raylet(self, choices: random.Random) -> bool:
        worker = self._worker(choices)
        if worker is None:
            return False
        self._scene.raylets.lose_node_of(worker.pid)
        self._num_missing += 1
        return True

    def _restart_server(self, choices: random.Random) -> bool:
        self._scene.server.kill()
        self._ended.wait(choices.uniform(0.0, LONGEST_OUTAGE_S))
        self._scene.server.start()
        return True

    def _break_server(self, choices: random.Random) -> bool:
        faults: list[Fault] = [Answer(status=500), Answer(status=503), Reset(), Hang(), Throttle(bytes_per_s=MIB)]
        share = choices.choice(["", "PUT", "GET"])
        rule = Rule(fault=choices.choice(faults), at=choices.choice(list(At)), method=share, times=None)
        with self._scene.proxy.breaking(rule):
            self._ended.wait(choices.uniform(0.5, LONGEST_OUTAGE_S))
        return True


def workers_of_run(run: str) -> list[psutil.Process]:
    """Lists the Ray workers that work on a run at this moment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if line.startswith(f"ray::{run}/"):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)
