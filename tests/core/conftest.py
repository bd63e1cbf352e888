"""Fixtures that several tests of the core use."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small only lose by waiting for other threads, most of all on a busy machine."""
    import torch  # not all tests of this folder need it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
