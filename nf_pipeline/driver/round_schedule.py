"""Which rounds of which blocks may start: pure decisions, tested without a cluster.

A sequential run has one round per block. In a pipelined one round r of a block reads round r of the block before,
so all blocks can work at the same time, each one round behind the block before it, and the result does not depend
on timing. Entry class: `RoundSchedule`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_ROUNDS_AHEAD = 2
"""A block has finished at most this many rounds more than the block that reads them: it bounds what is stored."""


@dataclass(frozen=True, order=True)
class Round:
    """One round of one block.

    Attributes:
        block_idx, round_idx: 0-based.
    """

    block_idx: int
    round_idx: int


class RoundSchedule:
    """Keeps what is done, running and readable, and says what may start next."""

    def __init__(
        self,
        done: list[int],
        num_rounds: int,
        *,
        overlap: bool,
        found: frozenset[int] = frozenset(),
        sources: Sequence[int] | None = None,
    ) -> None:
        """Begins where earlier drivers ended.

        Args:
            done: committed rounds per block.
            num_rounds: of every block.
            overlap: whether a round may start while its input is still being written.
            found: blocks that are finished, though one before them is not: they are compared with its commit.
            sources: the block whose activations each block reads, -1 for the images; None where each reads those of
                the one before. With several rounds it does.
        """
        self.done = done
        self.num_rounds = num_rounds
        self.num_blocks = len(done)
        self._overlap = overlap
        self._found = found
        self._sources = list(sources) if sources is not None else [idx - 1 for idx in range(len(done))]
        self._running: set[Round] = set()
        self._publishing: set[Round] = set()

    @property
    def is_finished(self) -> bool:
        """Whether every round of every block that is to be trained is committed."""
        return all(count == self.num_rounds for count in self.done[: self.num_blocks])

    def end_after(self, num_blocks: int) -> None:
        """Leaves the later blocks out; one of them that runs has no input any more."""
        self.num_blocks = num_blocks

    def ready(self) -> list[Round]:
        """Lists the rounds that may start now, deepest block first: it has waited longest for its worker."""
        candidates = [Round(block_idx, count) for block_idx, count in enumerate(self.done)]
        return [candidate for candidate in reversed(candidates) if self._may_start(candidate)]

    def start(self, work: Round) -> None:
        """Notes that a round runs."""
        self._running.add(work)

    def publish(self, work: Round) -> None:
        """Notes that a running round's activations can be read as they are written."""
        self._publishing.add(work)

    def withdraw(self, work: Round) -> None:
        """Notes that a running round failed: what it had published will be written anew."""
        self._publishing.discard(work)

    def give_back(self, work: Round) -> None:
        """Notes that a round was ended because its input was withdrawn: it may start when that is there again."""
        self._running.discard(work)

    def finish(self, work: Round) -> None:
        """Notes that a round is committed."""
        self.done[work.block_idx] = work.round_idx + 1  # first: at no moment may its readers miss their input
        self._running.discard(work)
        self._publishing.discard(work)

    def retired(self) -> list[Round]:
        """Lists the rounds that nobody will read again: neither the block itself nor the next one.

        The last round is the block's result and stays.
        """
        last = len(self.done) - 1
        return [
            Round(block_idx, round_idx)
            for block_idx, count in enumerate(self.done)
            for round_idx in range(count - 1)
            if block_idx == last or self.done[block_idx + 1] > round_idx
        ]

    def _may_start(self, work: Round) -> bool:
        if work.round_idx == self.num_rounds or work in self._running:
            return False
        if work.block_idx + 1 < len(self.done):
            ahead = work.round_idx - self.done[work.block_idx + 1]
            if ahead >= MAX_ROUNDS_AHEAD and self.num_rounds > 1:
                return False
        return self.has_input(work)

    def is_found(self, work: Round) -> bool:
        """Whether the round's block was finished before a commit before it went missing."""
        return work.block_idx in self._found

    def has_input(self, work: Round) -> bool:
        """Whether what a round reads, or runs again, is committed or, where that will do, being written."""
        if work.block_idx >= self.num_blocks:
            return False
        source = self._sources[work.block_idx]
        needed = [Round(block_idx, work.round_idx) for block_idx in range(max(source, 0), work.block_idx)]
        missing = [before for before in needed if self.done[before.block_idx] <= before.round_idx]
        if not missing:
            return True
        # Layers that are run again need all of their weights: only the block right before may still be writing.
        is_coming = len(needed) == 1 and source >= 0 and missing[0] in self._publishing
        return self._overlap and is_coming and work.block_idx not in self._found
