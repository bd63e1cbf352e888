"""Who a worker is among those that train one block together."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gang:
    """One member's place.

    Attributes:
        rank: 0-based; rank 0 speaks for all: it checkpoints, reports and commits.
        size: number of members.
        address: "host:port" on rank 0's machine where the members meet; "" for a member that is alone.
    """

    rank: int = 0
    size: int = 1
    address: str = ""


ALONE = Gang()
