import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.units import format_accuracy, format_bytes, format_error, parse_bytes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("300MiB", 300 * 2**20),
        ("6 GiB", 6 * 2**30),
        ("1.5g", 3 * 2**29),
        ("64MB", 64_000_000),
        ("4096", 4096),
        (4096, 4096),
        ("12 b", 12),
    ],
)
def test_parse_bytes_understands_the_usual_spellings(text: str | int, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "MiB", "-3MiB", "3 apples", "0", "0.0001B", "1e9", "nan", "٣MiB"])
def test_parse_bytes_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="got"):
        parse_bytes(text)


@given(st.integers(min_value=1, max_value=2**62))
def test_parse_bytes_is_exact_for_plain_counts(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes


def test_format_bytes_keeps_one_decimal() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 64 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "64.0 MiB",
        "3.0 TiB",
    ]


@pytest.mark.parametrize(("digits", "accuracy", "error"), [(1, "41.3 %", "0.413"), (2, "41.28 %", "0.4128")])
def test_accuracies_and_errors_are_written_equally_exactly(digits: int, accuracy: str, error: str) -> None:
    assert (format_accuracy(0.4128, digits), format_error(0.4128, digits)) == (accuracy, error)
