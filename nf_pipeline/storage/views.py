"""Several views of a split: the same samples, each changed in another way, stored as splits of their own.

All views have the same rows in the same order, cut into the same shards. An epoch reads one whole view, the next one
the next view, after the last the first again [ours]: every sample once an epoch, nothing is read or held beside what
one view takes, and within as many epochs as there are views every sample is seen in each of them. The first epoch
reads the view that is written first. Deliberately knows nothing of how views differ. Entries: `view_split`,
`ViewReader`.
"""

from collections.abc import Generator, Sequence
from typing import Any

from nf_pipeline.storage.reader import ShardList, ShardReader
from nf_pipeline.storage.shards import ShardInfo


def view_split(view: int) -> str:
    """Returns the name under which a view of the train split is stored: the first one is the split itself."""
    return "train" if view == 0 else f"train-view{view}"


class ViewReader:
    """Reads one view an epoch; otherwise a `ShardReader`, with the memory of one.

    Args:
        first: reader of the first view.
        others: shards of the other views, in order.
        first_epoch: number of the epoch that reads the first view.
    """

    def __init__(
        self, first: ShardReader, others: Sequence[Sequence[ShardInfo] | ShardList], *, first_epoch: int = 0
    ) -> None:
        self._views = [first, *map(first.beside, others)]
        self._first_epoch = first_epoch

    @property
    def num_rows(self) -> int:
        """Samples of the part."""
        return self._views[0].num_rows

    @property
    def num_rows_total(self) -> int:
        """Samples of the whole split."""
        return self._views[0].num_rows_total

    def num_batches(self, *, even: bool = False) -> int:
        """Batches of one epoch."""
        return self._views[0].num_batches(even=even)

    def step_sizes(self) -> list[int]:
        """Samples of every even batch of one epoch, over all parts of the split."""
        return self._views[0].step_sizes()

    def batches(self, *, epoch: int, **options: Any) -> Generator[Any, None, None]:
        """Yields one epoch of the view whose turn it is; see `ShardReader.batches`."""
        view = self._views[(epoch - self._first_epoch) % len(self._views)]
        return view.batches(epoch=epoch, **options)
