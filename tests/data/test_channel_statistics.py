import numpy as np

from nf_pipeline.data.channel_statistics import ChannelStatistics


def test_statistics_equal_numpys_over_all_batches():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 5, 4), np.uint8)
    statistics = ChannelStatistics(3)
    for start in range(0, 50, 7):
        statistics.add(images[start : start + 7])

    scaled = images / 255
    np.testing.assert_allclose(statistics.mean(), scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.std(), scaled.std(axis=(0, 2, 3)), rtol=1e-12)


def test_a_constant_channel_can_still_be_divided_by():
    statistics = ChannelStatistics(1)
    statistics.add(np.full((2, 1, 3, 3), 9, np.uint8))

    assert statistics.std() == [1 / 255]
