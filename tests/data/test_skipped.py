import pytest

from nf_pipeline.data.skipped import MAX_LISTED, SkippedImages
from nf_pipeline.errors import DataError


def test_errors_are_the_default_policy_and_name_the_flag():
    with pytest.raises(DataError, match=r"a.parquet, row 3: the sample cannot be read: junk") as caught:
        SkippedImages("error").add("a.parquet, row 3", "junk")
    assert "--on-bad-image skip" in str(caught.value)


def test_skipping_counts_all_and_lists_the_first():
    skipped = SkippedImages("skip")
    for row in range(MAX_LISTED + 20):
        skipped.add(f"row {row}", "junk")

    assert skipped.num_images == MAX_LISTED + 20
    assert len(skipped.listed) == MAX_LISTED
    assert skipped.summary().startswith("120 samples skipped that cannot be read, the first: row 0: junk")
