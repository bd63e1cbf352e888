"""Which rows of a split one of several readers takes, and the sizes of its batches.

Readers that train together step together: every part has as many even batches as every other. With n parts
and batches of b that are as many steps as one reader takes with batches of n * b. Plain arithmetic, nothing
is read here. Entry points: `Part` and `divide_rows`.
"""

from dataclasses import dataclass

from nf_pipeline.errors import InternalError


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a split: rows [index * rows // count, (index + 1) * rows // count) in stored order.

    Invariants: the parts of a split are disjoint, cover it, and differ by one row at most.

    Attributes:
        index: 0-based.
        count: number of parts.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InternalError(f"part: want 0 <= index < count, got index {self.index} of {self.count}")

    def rows(self, num_rows: int) -> range:
        """Returns the part's rows of a split of `num_rows`."""
        return range(self.index * num_rows // self.count, (self.index + 1) * num_rows // self.count)


WHOLE = Part()


def part_rows(num_rows: int, count: int) -> list[int]:
    """Returns the number of rows of every part of a split."""
    return [len(Part(index=index, count=count).rows(num_rows)) for index in range(count)]


def divide_rows(num_rows: int, batch_size: int, *, even: bool, part: Part = WHOLE) -> list[int]:
    """Returns the size of every batch of an epoch.

    There are ceil(rows / batch_size) batches, rows being the part's own, or for even ones those of the largest
    part. Even batches differ by one sample at most, so that no step of training rests on a few samples, and
    none on a single one, which batch normalisation refuses. Two cases leave a row out to keep these promises:
    of an odd number of rows in batches of two the last, if there is one part (of several, others have samples
    in the same step); and rows that other parts have no counterpart for, in batches of one.

    Args:
        num_rows: samples of the whole split.
        batch_size: no batch is larger.
        even: larger batches come first; False gives full batches and a short last one.
        part: whose batches.
    """
    num_own = len(part.rows(num_rows))
    if not even:
        full, rest = divmod(num_own, batch_size)
        return [batch_size] * full + ([rest] if rest else [])
    if part.count == 1 and batch_size == 2 and num_rows > 2:
        return [2] * (num_rows // 2)
    return _even_sizes(num_own, _num_steps(num_rows, batch_size, part.count), batch_size)


def step_sizes(num_rows: int, batch_size: int, count: int) -> list[int]:
    """Returns the samples of every training step over all parts: the sums of their even batches."""
    parts = [Part(index=index, count=count) for index in range(count)]
    sizes = [divide_rows(num_rows, batch_size, even=True, part=part) for part in parts]
    return [sum(step) for step in zip(*sizes, strict=True)]


def _num_steps(num_rows: int, batch_size: int, count: int) -> int:
    smallest, largest = num_rows // count, -(-num_rows // count)
    return min(smallest, -(-largest // batch_size))  # no part may have a step without a sample


def _even_sizes(num_rows: int, num_batches: int, batch_size: int) -> list[int]:
    if not num_batches:
        return []
    size, num_larger = divmod(min(num_rows, num_batches * batch_size), num_batches)
    return [size + 1] * num_larger + [size] * (num_batches - num_larger)
