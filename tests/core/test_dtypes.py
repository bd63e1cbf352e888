"""The two tables of number types say the same."""

from nf_pipeline.core.dtypes import TORCH_DTYPES
from nf_pipeline.dtypes import ITEM_BYTES


def test_torch_types_have_the_names_and_sizes_that_storage_counts_with() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == ITEM_BYTES
    assert all(str(dtype) == f"torch.{name}" for name, dtype in TORCH_DTYPES.items())
