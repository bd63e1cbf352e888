"""Where each block's input comes from: stored activations, or an earlier source and the layers in between again.

All seconds are per sample, multiplied at the end by the samples: an epoch has those of the train and the validation
split, the caching pass those of every view of the train split and of the validation split. A pass of block j that
starts from source s (-1: the images) reads `bytes(s)` while the device computes; whichever is slower decides:

    pass(j, s, own) = max(bytes(s) / read_rate, change_s(s),
                          own + sum of forward_s of the blocks s+1 .. j-1 + bytes(s) * load_s + change_s(s))
    block j         = epochs * pass(j, s, train_s of j)                                         trained
                    + pass(j, s, forward_s of j) + bytes(j) / write_rate                        and, if stored, cached

`load_s` is what a byte that is read takes from training: CPU seconds of reading, where training needs the same cores.
`change_s` is what random changes of the images take, of those that a pass changes, and none where it reads what a
block has stored; the second time it stands there, again, only where training needs the same cores.
Writing is priced in full, as if nothing overlapped with it; an epoch reads one view, however many there are. A block
is stored only if a later one reads it, so the choices depend on each other: `choose_sources` looks at every set of
stored blocks that could be the best one.

Knows nothing of torch, stores or devices: rates come from `storage.bandwidth`, seconds from `core.timing`.
Entry: `choose_sources`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nf_pipeline.plans import StoreRates

Mode = Literal["auto", "shards", "recompute"]

IMAGES = -1
"""The source before the first block."""

MAX_OPEN = 256
"""Sets of stored blocks that are followed at a time: all there can be of 8 blocks, the cheapest of more."""


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """What one block takes, per sample.

    Attributes:
        train_s: seconds of one epoch divided by all rows: training steps and validation, without its input.
        forward_s: seconds through its layers in inference mode, heads left out.
        stored_bytes: of its output as it would be stored.
    """

    train_s: float
    forward_s: float
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """What every choice is priced with.

    Attributes:
        blocks: in order.
        image_bytes: of one stored image.
        rows: samples of the train and the validation split.
        stored_rows: samples that a block writes which stores its output: those of every view, each time that it
            publishes them.
        epochs: passes over them while a block trains.
        rates: of the store.
        shares_cores: whether training computes on the cores that decode what is read, and change it.
        change_s: seconds that random changes of one image take.
        changed: parts of the rows of an epoch, and of the stored rows, whose images a pass that starts from them
            changes.
    """

    blocks: tuple[BlockCost, ...]
    image_bytes: int
    rows: int
    stored_rows: int
    epochs: int
    rates: StoreRates
    shares_cores: bool
    change_s: float = 0.0
    changed: tuple[float, float] = (0.0, 0.0)

    def train_s(self, block_idx: int, source: int) -> float:
        """Returns the seconds that all epochs of a block take."""
        change_s = self.change_s * self.changed[0]
        return self.rows * self.epochs * self._pass_s(block_idx, source, self.blocks[block_idx].train_s, change_s)

    def store_s(self, block_idx: int, source: int) -> float:
        """Returns the seconds of the passes that store a block's output."""
        block = self.blocks[block_idx]
        written_s = block.stored_bytes / self.rates.write_bytes_per_s
        change_s = self.change_s * self.changed[1]
        return self.stored_rows * (self._pass_s(block_idx, source, block.forward_s, change_s) + written_s)

    def read_s(self, source: int) -> float:
        """Returns the seconds that the store takes to deliver a source once."""
        return self.rows * self._bytes(source) / self.rates.read_bytes_per_s

    def recompute_s(self, block_idx: int, source: int) -> float:
        """Returns the seconds that the layers between a source and a block take in one epoch."""
        return self.rows * sum(block.forward_s for block in self.blocks[source + 1 : block_idx])

    def total_s(self, sources: Sequence[int]) -> float:
        """Returns the seconds of training all blocks from these sources and of storing those that are read."""
        return sum(
            self.train_s(block_idx, source) + (self.store_s(block_idx, source) if block_idx in sources else 0.0)
            for block_idx, source in enumerate(sources)
        )

    def _pass_s(self, block_idx: int, source: int, own_s: float, change_s: float) -> float:
        between_s = sum(block.forward_s for block in self.blocks[source + 1 : block_idx])
        num_bytes, change_s = self._bytes(source), change_s if source == IMAGES else 0.0
        load_s = num_bytes * self.rates.read_cpu_s_per_byte + change_s if self.shares_cores else 0.0
        return max(num_bytes / self.rates.read_bytes_per_s, change_s, own_s + between_s + load_s)

    def _bytes(self, source: int) -> int:
        return self.image_bytes if source == IMAGES else self.blocks[source].stored_bytes


Fits = Callable[[int, int], bool]
"""(block, source) -> whether the layers between fit the block's budget beside its training step."""


def choose_sources(job: CacheJob, fits: Fits) -> tuple[int, ...]:
    """Finds the sources that take the least time in all.

    Exact: blocks are decided from the front, once for every set of stored blocks that some later block would read.
    Beyond `MAX_OPEN` such sets only the cheapest are followed.

    Args:
        job: rates, seconds and bytes.
        fits: asked for sources before the block right before; that one always fits.

    Returns:
        The source of every block: -1 or an earlier block. Of equal choices the one with later sources.
    """
    search = _Search(job, fits)
    paths: dict[Stored, _Path] = {(IMAGES,): _Path(0.0, ())}
    for block_idx in range(len(job.blocks)):
        following: dict[Stored, _Path] = {}
        for stored, path in paths.items():
            for then, extended in search.extended(block_idx, stored, path):
                if then not in following or extended.order < following[then].order:
                    following[then] = extended
        paths = dict(sorted(following.items(), key=lambda item: item[1].order)[:MAX_OPEN])
    return min(paths.values(), key=lambda path: path.order).sources


def forced_sources(num_blocks: int, mode: Mode, fits: Fits) -> tuple[int, ...]:
    """Returns the sources of `--cache shards` or `recompute`.

    Args:
        num_blocks: of the plan.
        mode: "recompute" starts every block from the images, or from the earliest block from which it fits.
        fits: see `choose_sources`.
    """
    if mode != "recompute":
        return tuple(block_idx - 1 for block_idx in range(num_blocks))
    return tuple(
        next((source for source in range(-1, block_idx - 1) if fits(block_idx, source)), block_idx - 1)
        for block_idx in range(num_blocks)
    )


Stored = tuple[int, ...]
"""Sources that later blocks may read, ascending."""


@dataclass(frozen=True)
class _Path:
    """Blocks decided so far: what they take, and from where they start."""

    seconds: float
    sources: tuple[int, ...]

    @property
    def order(self) -> tuple[float, tuple[int, ...]]:
        """Smaller is better."""
        return self.seconds, tuple(-source for source in self.sources)


class _Search:
    """What every block takes from every source that fits, with and without storing its own output."""

    def __init__(self, job: CacheJob, fits: Fits) -> None:
        self._num_blocks = len(job.blocks)
        self._seconds: list[dict[int, tuple[float, float]]] = []
        for block_idx in range(self._num_blocks):
            sources = [s for s in range(-1, block_idx) if s == block_idx - 1 or fits(block_idx, s)]
            trained = {source: job.train_s(block_idx, source) for source in sources}
            self._seconds.append({s: (trained[s], trained[s] + job.store_s(block_idx, s)) for s in sources})

    def extended(self, block_idx: int, stored: Stored, path: _Path) -> Iterator[tuple[Stored, _Path]]:
        """Yields how a path may go on: the block keeps nothing, or stores what a later block would read."""
        for is_stored, there in ((False, stored), (True, (*stored, block_idx))):
            source = self._best(block_idx, stored, is_stored)
            then = self._still_read(block_idx + 1, there)
            if source is not None and (block_idx in then) == is_stored:
                seconds = path.seconds + self._seconds[block_idx][source][is_stored]
                yield then, _Path(seconds, (*path.sources, source))

    def _best(self, block_idx: int, stored: Stored, is_stored: bool) -> int | None:
        seconds = self._seconds[block_idx]
        usable = [source for source in stored if source in seconds]
        return min(usable, key=lambda source: (seconds[source][is_stored], -source), default=None)

    def _still_read(self, first: int, stored: Stored) -> Stored:
        """Drops what no block from `first` on would choose, however many blocks are stored in between."""
        later = range(first, self._num_blocks)
        chosen = {self._best(block, stored, is_stored) for block in later for is_stored in (False, True)}
        return tuple(sorted(chosen - {None}))
