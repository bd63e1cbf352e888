"""Bits of samples come back as they went, and what cannot be them is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.hits import Hits


@given(st.lists(st.booleans(), max_size=70))
def test_hits_come_back_from_integers_and_text(right):
    right_N = np.array(right, bool)
    hits = Hits.of(right_N)
    assert (hits.total, hits.num_samples) == (sum(right), len(right))
    assert [hits.bits >> idx & 1 for idx in range(len(right))] == right
    assert Hits.from_text(hits.to_text(), len(right)) == hits
    np.testing.assert_array_equal(hits.unpacked(), right_N)


def test_text_takes_a_sixth_of_a_byte_per_sample():
    assert len(Hits(0, 100_000).to_text()) < 17_000


@pytest.mark.parametrize(("text", "num_samples"), [("AQ==", 0), ("AQ==", 9), ("gA==", 7), ("AQ", 8), ("ä", 8)])
def test_text_of_other_samples_is_refused(text, num_samples):
    with pytest.raises(ValueError, match=r"base64|samples|ASCII"):
        Hits.from_text(text, num_samples)
