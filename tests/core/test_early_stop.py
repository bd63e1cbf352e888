"""When training further blocks stops: the rule as a table, and against its formula."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.core.early_stop import reason_to_stop
from nf_pipeline.core.hits import Hits


def stops(num_correct, num_val, patience):
    """Decides on exits that are right on the first samples."""
    blocks = [[Hits((1 << count) - 1, num_val) for count in block] for block in num_correct]
    return reason_to_stop(blocks, patience)


@pytest.mark.parametrize(
    ("num_correct", "patience", "is_over"),
    [
        pytest.param([[500]], 1, False, id="one block has nothing before it"),
        pytest.param([[500], [510]], 1, True, id="a gain within the noise"),
        pytest.param([[500], [520]], 1, False, id="a gain beyond the noise"),
        pytest.param([[500], [400]], 1, True, id="a loss"),
        pytest.param([[300, 500], [510, 400]], 1, True, id="the best of each block's exits counts"),
        pytest.param([[300, 500], [400, 530]], 1, False, id="any exit of the last block may be the better one"),
        pytest.param([[500], [400], [505]], 1, True, id="compared with the best, not with the one right before"),
        pytest.param([[500], [510]], 2, False, id="two blocks of patience need three blocks"),
        pytest.param([[500], [510], [520]], 2, False, id="small gains that add up"),
        pytest.param([[500], [510], [512]], 2, True, id="small gains that do not"),
        pytest.param([[500], [530], [510]], 2, False, id="the first of the last two was better"),
        pytest.param([[1000], [1000]], 1, True, id="nothing is above 100 %"),
        pytest.param([[0], [0]], 1, True, id="nothing was learnt"),
    ],
)
def test_training_stops_when_the_last_blocks_brought_no_better_exit(num_correct, patience, is_over):
    assert (stops(num_correct, 1000, patience) is not None) is is_over


def test_training_never_stops_without_patience():
    assert stops([[900], [100], [100], [100]], 1000, None) is None


def test_gain_that_is_noise_on_few_images_counts_on_many():
    assert stops([[50], [51]], 100, 1) is not None
    assert stops([[50_000], [51_000]], 100_000, 1) is None


def test_reason_gives_both_accuracies_and_the_bar_between_them():
    reason = stops([[500], [510]], 1000, 1)
    assert all(part in reason for part in ("51.0 %", "50.0 %", "51.6 %", "1000 samples"))


@given(st.integers(200, 100_000), st.floats(0.1, 0.9), st.floats(-3.0, 3.0))
def test_bar_is_one_standard_error_above_the_best_earlier_exit(num_val, share, errors):
    error = math.sqrt(share * (1 - share) / num_val)
    earlier, latest = round(num_val * share), round(num_val * (share + errors * error))
    if abs(errors - 1.0) > 0.2 and 0 <= latest <= num_val:  # Wilson's interval differs a little from the formula
        assert (stops([[earlier], [latest]], num_val, 1) is None) is (errors > 1.0)
