import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nf_pipeline.data.base import RawImage
from nf_pipeline.data.shuffle import interleave, shuffle_window


def raws(rows, size=1):
    return [RawImage(row, b"x" * size) for row in rows]


@given(st.integers(0, 100), st.integers(1, 30), st.integers(1, 50))
def test_a_window_loses_and_doubles_nothing(num, max_images, max_bytes):
    rng = np.random.default_rng(0)

    got = [raw.row for raw in shuffle_window(raws(range(num)), rng, max_images=max_images, max_bytes=max_bytes)]

    assert sorted(got) == list(range(num))


def test_a_window_never_holds_more_than_its_bounds():
    ahead = []

    def stream():
        for raw in raws(range(1000), size=10):
            ahead.append(raw)
            yield raw

    window = shuffle_window(stream(), np.random.default_rng(0), max_images=64, max_bytes=200)
    for taken, _ in enumerate(window, start=1):
        assert len(ahead) - taken < 20


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 4), st.integers(1, 10))
def test_interleaving_yields_every_stream_whole_and_in_order(lengths, num_open, run):
    streams = [raws(range(100 * start, 100 * start + length)) for start, length in enumerate(lengths)]

    got = [raw.row for raw in interleave([lambda s=s: iter(s) for s in streams], num_open=num_open, run=run)]

    assert sorted(got) == sorted(raw.row for stream in streams for raw in stream)
    for start in range(len(lengths)):
        own = [row for row in got if row // 100 == start]
        assert own == sorted(own)


def test_interleaving_takes_turns():
    streams = [raws(range(4)), raws(range(10, 14)), raws(range(20, 24))]

    got = [raw.row for raw in interleave([lambda s=s: iter(s) for s in streams], num_open=2, run=2)]

    assert got[:6] == [0, 1, 10, 11, 2, 3]
