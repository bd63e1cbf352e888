"""Tries learning rates, one short training after the other; every try that is finished is kept.

A try takes about the same seconds whatever the method, and sees the train split at least once; its schedule is a
whole one of so many epochs. The test split is never looked at. Entry class: `Trials`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nf_pipeline.bench.deadline import Deadline
from nf_pipeline.bench.lr_search import best_rate, epochs_for, next_rate
from nf_pipeline.bench.settings import BenchSettings
from nf_pipeline.config import TrainConfig
from nf_pipeline.documents import parse_json

Result = dict[str, Any]
Try = Callable[[float, int, Path], Result | None]
"""(learning rate, epochs, folder of its own) -> what came out; None if time ran out."""


class Trials:
    """The search of one method at one batch, or with one plan.

    Args:
        folder: of the unfinished search.
        deadline: of this process.
        tell: gets a line per try.
    """

    def __init__(
        self, settings: BenchSettings, folder: Path, deadline: Deadline, tell: Callable[[str], None]
    ) -> None:
        self._settings, self._folder, self._deadline, self._tell = settings, folder, deadline, tell

    def run(self, epoch_s: Callable[[], float], attempt: Try) -> Result | None:
        """Tries rates as `next_rate` says.

        Args:
            epoch_s: measures or predicts the seconds of an epoch; asked once.
            attempt: trains.

        Returns:
            The rates, their accuracies and the best one; None if time ran out. Then the same call goes on.
        """
        state = self._read() or {"epochs": self._epochs(epoch_s()), "trials": []}
        self._write(state)
        epochs, trials = state["epochs"], state["trials"]
        while True:
            scores = {trial["lr"]: trial["val_accuracy"] for trial in trials}
            rate = next_rate(scores, TrainConfig().lr, self._settings.search_tries)
            if rate is None:
                return {"status": "done", "lr": best_rate(scores), "epochs": epochs, "trials": trials}
            if trials and not self._deadline.leaves(trials[-1]["train_s"]):
                return None
            self._tell(f"learning rate {rate:g}, {epochs} epochs")
            folder = self._folder / f"lr-{rate:g}"
            result = attempt(rate, epochs, folder)
            if result is None:
                return None
            trials.append(_score(rate, result))
            self._write(state)
            shutil.rmtree(folder, ignore_errors=True)

    def _epochs(self, epoch_s: float) -> int:
        return epochs_for(self._settings.search_seconds, epoch_s, self._settings.epochs)

    def _read(self) -> Result | None:
        path = self._folder / "trials.json"
        return dict(parse_json(path.read_bytes())) if path.exists() else None

    def _write(self, state: Result) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "trials.json.part"
        partial.write_text(json.dumps(state), encoding="utf8")
        partial.replace(self._folder / "trials.json")


def _score(rate: float, result: Result) -> Result:
    accuracy = result.get("best_val_accuracy", result.get("val_accuracy", 0.0))
    score = accuracy if result["status"] == "done" else 0.0
    return {"lr": rate, "val_accuracy": score, "train_s": result.get("train_s", 0.0)}
