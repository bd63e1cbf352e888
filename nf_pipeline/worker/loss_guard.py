"""Watches the losses of one epoch without slowing the steps down.

Losses stay on the device; every few steps they are fetched together, so a GPU is not made to wait each step.
"""

from collections.abc import Sequence

import torch

from nf_pipeline.core.objectives import Objective
from nf_pipeline.errors import Diverged

CHECK_EVERY = 16
EXPLODED_TIMES_CHANCE = 100.0


class LossGuard:
    """Collects per-unit losses and raises when one is NaN, infinite or far above chance.

    Args:
        stage: for the error.
        objectives: of the block's units, in order.
        num_outputs: a score per class, or each value.
        epoch: 0-based, for the error.
    """

    def __init__(self, stage: str, objectives: Sequence[Objective], num_outputs: int, epoch: int) -> None:
        self._stage = stage
        self._epoch = epoch
        self._limits = [objective.limit(num_outputs, EXPLODED_TIMES_CHANCE) for objective in objectives]
        self._pending: list[torch.Tensor] = []
        self._checked: list[list[float]] = []

    def add(self, losses: list[torch.Tensor]) -> None:
        """Takes one step's losses, one scalar per unit of the block."""
        self._pending.append(torch.stack(losses))
        if len(self._pending) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Fetches what is pending.

        Raises:
            Diverged: names epoch, step and unit of the first bad loss.
        """
        if not self._pending:
            return
        values = torch.stack(self._pending).tolist()
        self._pending.clear()
        for losses in values:
            for unit, (loss, limit) in enumerate(zip(losses, self._limits, strict=True)):
                if not loss <= limit:
                    raise Diverged(
                        self._stage,
                        f"loss {loss:g} of unit {unit} in epoch {self._epoch + 1}, step {len(self._checked)} "
                        f"(limit {limit:.0f})",
                        "lower --set train.lr, or raise train.warmup_epochs",
                    )
            self._checked.append(losses)

    def last_loss(self) -> float | None:
        """Returns the newest fetched loss of the last unit."""
        return self._checked[-1][-1] if self._checked else None

    def mean_losses(self) -> list[float]:
        """Returns the mean of all fetched losses, per unit."""
        steps = max(1, len(self._checked))
        return [sum(column) / steps for column in zip(*self._checked, strict=True)]
