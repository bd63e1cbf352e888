"""Numbers as bytes: what comes back is near what was stored, and zero is zero."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nf_pipeline.errors import ConfigError
from nf_pipeline.storage.affine import HEADROOM, Affine, fit_affine
from nf_pipeline.storage.manifest import StageManifest
from nf_pipeline.storage.shard_writer import ShardWriter
from nf_pipeline.storage.shards import TensorSpec, read_shard, shard_schema, spec_of_field

finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
ranges = st.lists(st.tuples(finite, finite).map(sorted), min_size=1, max_size=6)


@settings(deadline=None)
@given(ranges)
def test_every_fitted_range_fits_the_bytes_with_its_headroom(bounds):
    low, high = zip(*bounds, strict=True)
    affine = fit_affine(low, high)
    for (bottom, top), scale, zero_point in zip(bounds, affine.scales, affine.zero_points, strict=True):
        assert zero_point + (1 + HEADROOM) * max(top, 0) / scale <= 255.5
        assert zero_point + (1 + HEADROOM) * min(bottom, 0) / scale >= -0.5


@pytest.mark.parametrize(
    ("low", "high"), [((0.0,), (0.0,)), ((0.0, 0.0), (0.0, 5.0)), ((3.0,), (3.0,)), ((-3.0,), (-3.0,))]
)
def test_constant_channels_are_stored_within_half_a_step(low, high):
    affine = fit_affine(low, high)
    values = np.array([[low]], np.float32).reshape(1, -1)
    steps = np.round(values / np.float32(affine.scales)) + affine.zero_points
    assert (steps >= 0).all() and (steps <= 255).all()
    error = np.abs(affine.decode(steps.astype(np.uint8)) - values)
    assert (error <= 0.51 * np.asarray(affine.scales)).all()


def test_a_channel_that_was_silent_keeps_a_range_of_its_own():
    affine = fit_affine((0.0, 0.0), (0.0, 64.0))
    assert 255 * affine.scales[0] > 0.99


def test_rectified_channels_start_at_zero_and_signed_ones_keep_an_exact_zero():
    affine = fit_affine((0.0, -2.0), (4.0, 1.0))
    assert affine.zero_points[0] == 0 < affine.zero_points[1] < 255
    decoded = affine.decode(np.array([affine.zero_points], np.uint8))
    assert decoded.dtype == np.float32 and not decoded.any()


def test_scales_and_zero_points_are_the_same_after_a_manifest_and_a_shard(store):
    spec = TensorSpec("uint8", (3, 2), affine=fit_affine((-1.5, 0.0, -1e-7), (7 / 3, 1e9, 2e-7)))
    assert spec_of_field(shard_schema(spec).field("tensor")) == spec
    manifest = StageManifest(stage="block-000", fingerprint="f", attempt="a", spec=spec)
    assert StageManifest.from_json(manifest.to_json()).spec == spec
    with ShardWriter(store, lambda idx: f"x/{idx}", spec, 1024) as writer:
        writer.append(np.arange(12, dtype=np.uint8).reshape(2, 6), np.zeros(2, np.int64), np.arange(2))
    assert read_shard(store, writer.close()[0], spec).affine == spec.affine


def test_manifest_of_an_earlier_version_has_no_scales():
    manifest = StageManifest(stage="ingest", fingerprint="f", attempt="a", spec=TensorSpec("uint8", (3, 2, 2)))
    document = manifest.to_json()
    del document["spec"]["affine"]
    assert StageManifest.from_json(document).spec == manifest.spec


@pytest.mark.parametrize(
    ("scales", "zero_points"),
    [
        ((1.0, 1.0), (0,)),
        ((0.0,), (0,)),
        ((-1.0,), (0,)),
        ((float("nan"),), (0,)),
        ((float("inf"),), (0,)),
        ((1,), (0,)),
        (("1",), (0,)),
        ((1.0,), (256,)),
        ((1.0,), (-1,)),
        ((1.0,), (0.5,)),
        ((1.0,), (True,)),
    ],
)
def test_impossible_scales_are_refused(scales, zero_points):
    with pytest.raises(ConfigError, match="affine"):
        Affine(scales, zero_points)


@pytest.mark.parametrize(("dtype", "shape"), [("uint8", (2, 4)), ("float16", (1, 4))])
def test_scales_for_another_shape_or_type_are_refused(dtype, shape):
    with pytest.raises(ConfigError, match="one per channel of uint8"):
        TensorSpec(dtype, shape, affine=Affine((1.0,), (0,)))
