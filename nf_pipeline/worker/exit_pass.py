"""Runs the exits of the final model over a split of the images, in stored order.

Of the validation split the logits are kept, as many as memory should hold, for temperatures and thresholds; of the
test split only what every exit made of each sample, and of classes how sure it was. Knows nothing of how exits are
chosen. Entry class: `ExitPass`.

Shapes: E exits, N samples, C channels, H, W, K outputs.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.core.early_exit_model import all_logits, confidence
from nf_pipeline.core.exit_model import ExitModel, own_units
from nf_pipeline.core.hits import Hits
from nf_pipeline.core.metrics import results_kind
from nf_pipeline.core.results import Results
from nf_pipeline.data.held_out import HeldOutLabels
from nf_pipeline.events import Progress
from nf_pipeline.samples import TargetSpec
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.reader import Batch, ShardReader
from nf_pipeline.storage.store import Store
from nf_pipeline.worker.progress_clock import ProgressClock

MAX_LOGITS, MAX_EXIT_LOGITS = 2**24, 2**22
"""Numbers of all exits and of one: of images with 1,000 classes 4,000 for one exit, 1,000 for 16.

Four bytes each, twice while they are joined, and some copies of one exit's in float64 while it is calibrated: 300 MiB
at most.
"""


@dataclass(frozen=True, kw_only=True)
class LadderOfExits:
    """A final model and the exits before its own.

    Attributes:
        final: in inference mode, on the device to run it on, like the heads.
        heads: of the exits before its own; none where it stands alone.
        stops: layers before each of them.
    """

    final: ExitModel
    heads: Sequence[nn.Module] = ()
    stops: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What the exits made of a split.

    Attributes:
        confidence_EN: float32, probability of each prediction, with the exit's temperature.
        right_EN: whether it is the label.
        unscaled_N: float32, probability of the last exit's prediction without its temperature.
    """

    confidence_EN: np.ndarray
    right_EN: np.ndarray
    unscaled_N: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LookAtTest:
    """What the look at the test split found.

    Attributes:
        results: of the last exit.
        scores: how sure exits were; None where they predict no classes.
    """

    results: Results
    scores: Scores | None = None


def measure(outputs_NK: torch.Tensor, labels: np.ndarray, target: TargetSpec) -> np.ndarray:
    """Returns what an exit's results are made of, see `nf_pipeline.core.results.Results.of`.

    Args:
        outputs_NK: logits, or standardised values, on the host.
        labels: as they are stored: int64 [N], or float32 [N, K] in their own units.
        target: what they are.
    """
    wanted, scale = torch.from_numpy(labels), own_units(target)
    return results_kind(target).measure(outputs_NK, wanted if scale is None else scale.standardised(wanted)).numpy()


class ExitPass:
    """Passes over the splits of the ingested images.

    Args:
        store, ingest: where the images are, and their manifest.
        exits: what runs.
        batch_size: images at a time.
        device: that the model is on.
        stage: for events.
    """

    def __init__(
        self,
        store: Store,
        ingest: StageManifest,
        exits: LadderOfExits,
        *,
        batch_size: int,
        device: torch.device,
        stage: str,
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._exits = exits
        self._batch_size = batch_size
        self._device = device
        self._stage = stage

    def logits(self, split: str) -> Generator[Progress, None, tuple[list[torch.Tensor], torch.Tensor]]:
        """Runs the exits over a split with labels, or over the first samples of a large one.

        Returns:
            logits_NK of every exit, on the host, and labels_N.
        """
        found: list[list[torch.Tensor]] = []
        labels: list[torch.Tensor] = []
        of_one = 0

        def keep(logits: list[torch.Tensor], batch: Batch) -> bool:
            nonlocal of_one
            found.append(logits)
            labels.append(torch.from_numpy(batch.labels.copy()))
            of_one += logits[-1].numel()
            return of_one < MAX_EXIT_LOGITS and of_one * len(logits) < MAX_LOGITS

        yield from self._run(split, keep)
        return [torch.cat(parts) for parts in zip(*found, strict=True)], torch.cat(labels)

    def look(
        self, labels: HeldOutLabels, target: TargetSpec, temperatures: Sequence[float] | None
    ) -> Generator[Progress, None, LookAtTest]:
        """Runs the exits over the test split, whose labels are kept apart.

        Args:
            target: what they predict.
            temperatures: of every exit; None where there are none, and the last exit alone counts.
        """
        if temperatures is None:
            return LookAtTest(results=(yield from self.results("test", labels, target)))
        scores = yield from self.scores("test", labels, temperatures)
        return LookAtTest(results=Hits.of(scores.right_EN[-1]), scores=scores)

    def results(self, split: str, labels: HeldOutLabels, target: TargetSpec) -> Generator[Progress, None, Results]:
        """Runs the exits over a whole split whose labels are kept apart, and measures the last one."""
        measured: list[np.ndarray] = []

        def keep(outputs: list[torch.Tensor], batch: Batch) -> bool:
            measured.append(measure(outputs[-1], labels.of(batch.sample_ids), target))
            return True

        yield from self._run(split, keep)
        return results_kind(target).of(np.concatenate(measured))

    def scores(
        self, split: str, labels: HeldOutLabels, temperatures: Sequence[float]
    ) -> Generator[Progress, None, Scores]:
        """Runs the exits over a whole split of classified samples whose labels are kept apart."""
        sure: list[np.ndarray] = []
        right: list[np.ndarray] = []
        unscaled: list[np.ndarray] = []

        def keep(logits: list[torch.Tensor], batch: Batch) -> bool:
            labels_N = torch.from_numpy(labels.of(batch.sample_ids))
            scaled = zip(logits, temperatures, strict=True)
            sure.append(torch.stack([confidence(one, temperature) for one, temperature in scaled]).numpy())
            right.append(torch.stack([one.argmax(dim=1) == labels_N for one in logits]).numpy())
            unscaled.append(confidence(logits[-1]).numpy())
            return True

        yield from self._run(split, keep)
        return Scores(
            confidence_EN=np.concatenate(sure, axis=1),
            right_EN=np.concatenate(right, axis=1),
            unscaled_N=np.concatenate(unscaled),
        )

    def _run(self, split: str, keep: Callable[[list[torch.Tensor], Batch], bool]) -> Generator[Progress, None, None]:
        """Hands every batch's outputs on, until there are no more or they are not wanted any more."""
        spec, exits = self._ingest.spec, self._exits
        reader = ShardReader(self._store, self._ingest.shards[split], spec, batch_size=self._batch_size)
        clock, done = ProgressClock(), 0
        with closing(reader.batches(seed=0, epoch=0, shuffle=False)) as batches:
            for batch in batches:
                stored_N = torch.from_numpy(batch.tensors).view(TORCH_DTYPES[spec.dtype]).view(-1, *spec.shape)
                logits = all_logits(exits.final, exits.heads, exits.stops, stored_N.to(self._device))
                done += len(batch.sample_ids)
                if not keep([one.float().cpu() for one in logits], batch):
                    break
                if clock.is_due():
                    total, rate = reader.num_rows, clock.rate(done)
                    yield Progress(stage=self._stage, phase="validate", done=done, total=total, images_per_s=rate)
