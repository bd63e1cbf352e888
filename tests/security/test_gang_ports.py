"""Workers that train a block together listen for one another only where they were told to meet."""

import pytest
from gang_work import listening_addresses
from gangs import run_gang


@pytest.mark.parametrize("size", [2, 3])
def test_gang_that_meets_on_loopback_listens_nowhere_else(size: int) -> None:
    for addresses in run_gang(listening_addresses, size):
        assert set(addresses) == {"127.0.0.1"}
