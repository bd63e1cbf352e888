import pytest

from nf_pipeline.data.split_names import split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005.parquet", "train"),
        ("data/validation.parquet", "val"),
        ("test/train.parquet", "train"),
        ("test/0001.parquet", "test"),
        ("dev_0.parquet", "val"),
        ("TRAIN.parquet", "train"),
        ("trainer.parquet", None),
        ("0001.parquet", None),
        ("my-train.parquet", None),
    ],
)
def test_split_is_told_by_the_first_word_of_the_innermost_name(name, split):
    assert split_of(name) == split
