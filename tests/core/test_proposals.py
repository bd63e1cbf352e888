"""Ways to form units: each covers the network, none comes twice, memory decides how long they grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.proposals import grow_spans, propose
from nf_pipeline.plans import UnitSpan


def names(train: TrainConfig, num_layers: int = 8, max_batch_size: int = 128) -> list[str]:
    proposals = propose(
        train, num_layers, max_batch_size, lambda span, batch: (span.stop - span.start) * batch <= 256
    )
    return [proposal.name for proposal in proposals]


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 50))
def test_grown_units_cover_all_layers_and_are_as_long_as_they_fit(
    num_layers: int, segment: int, longest: int
) -> None:
    spans = grow_spans(num_layers, segment, lambda span: span.stop - span.start <= longest)
    assert [layer for span in spans for layer in range(span.start, span.stop)] == list(range(num_layers))
    assert all(span.stop - span.start == longest for span in spans[:-1])


def test_layer_that_fits_nowhere_is_a_unit_of_its_own() -> None:
    spans = grow_spans(4, 0, lambda span: span.start > 0)
    assert spans == (UnitSpan(0, 1), UnitSpan(1, 4))


def test_unit_of_one_segment_is_not_checkpointed() -> None:
    assert [span.segment_layers for span in grow_spans(5, 2, lambda span: span.stop <= 2 or span.start >= 2)] == [
        0,
        2,
    ]


def test_auto_goes_from_backpropagation_to_a_head_on_every_layer() -> None:
    assert names(TrainConfig()) == [
        "backpropagation",
        "backpropagation, checkpoint every layer",
        "backpropagation, checkpoint every 2 layers",
        "a head on every layer",
        "a head every 2 layers",
        "a head every 3 layers",
        "units for batch 64",
    ]  # units for batch 32 are the whole network


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"local": "layer"}, ["a head on every layer"]),
        ({"unit_layers": 3}, ["a head every 3 layers"]),
        ({"local": "layer", "unit_layers": 2}, ["a head every 2 layers"]),
    ],
)
def test_forced_units_are_the_only_proposal(settings: dict, expected: list[str]) -> None:
    assert names(TrainConfig(**settings)) == expected


def test_blocks_are_never_even_units() -> None:
    assert "backpropagation" in names(TrainConfig(local="block"))
    assert not [name for name in names(TrainConfig(local="block")) if name.startswith("a head")]


def test_units_are_not_grown_for_more_than_the_largest_batch() -> None:
    grown = {name.split(",")[0] for name in names(TrainConfig(), max_batch_size=50) if name.startswith("units")}
    assert grown <= {"units for batch 50", "units for batch 32"}


@given(st.integers(1, 30), st.integers(1, 200))
def test_no_proposal_comes_twice(num_layers: int, max_batch_size: int) -> None:
    proposals = propose(TrainConfig(), num_layers, max_batch_size, lambda span, batch: span.stop * batch <= 1000)
    assert len({proposal.spans for proposal in proposals}) == len(proposals) >= 1
    for proposal in proposals:
        assert [layer for span in proposal.spans for layer in range(span.start, span.stop)] == list(range(num_layers))
