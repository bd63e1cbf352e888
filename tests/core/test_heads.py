"""The auxiliary heads."""

import pytest
import torch
from torch import nn

from nf_pipeline.core.heads import HEADS, HeadSite, build_head, head_site
from nf_pipeline.errors import ConfigError

SHAPES = [
    *((1, 8, 8), (64, 32, 32), (16, 7, 5), (512, 2, 2), (2048, 1, 1), (3, 1, 9)),
    *((16, 40), (3, 1), (5, 3), (8, 4, 5, 6), (2, 1, 1, 1), (12,), (1,)),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small tensors gain nothing from threads, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head_of(name, shape=(16, 8, 8), num_classes=10, seed=0, downstream=(24, 32)):
    return build_head(name, HeadSite(in_shape=shape, num_outputs=num_classes, downstream=downstream), seed)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_head_maps_features_to_logits_and_trains(name, shape):
    head = head_of(name, shape, num_classes=7).train()
    logits = head(torch.randn(2, *shape))
    logits.square().sum().backward()
    assert logits.shape == (2, 7)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize(("channels", "filters"), [(1, 8), (8, 8), (9, 9), (64, 64), (256, 256), (512, 256)])
def test_adaptive_head_has_as_many_filters_as_channels_within_limits(channels, filters):
    head = head_of("adaptive", (channels, 8, 8), num_classes=10)
    assert head.conv.weight.shape == (filters, channels, 3, 3)
    assert head.linear.weight.shape == (10, 4 * filters)
    expected = 9 * channels * filters + 2 * filters + 4 * filters * 10 + 10
    assert sum(p.numel() for p in head.parameters()) == expected


@pytest.mark.parametrize("channels", [1, 64, 512])
def test_classic_head_has_256_filters_everywhere(channels):
    assert head_of("classic", (channels, 8, 8)).conv.out_channels == 256


def test_mlp_sr_head_shrinks_the_map_before_it_computes():
    head, maps = head_of("mlp_sr", (64, 30, 17)), []
    head.conv0.register_forward_hook(lambda module, args, out: maps.append(tuple(out.shape)))
    head.eval()(torch.randn(2, 64, 30, 17))
    assert maps == [(2, 64, 8, 5)]
    kinds = [type(m) for m in head if not isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.ReLU)]
    pools = [nn.AdaptiveAvgPool2d]
    assert kinds == [*pools, *[nn.Conv2d] * 3, *pools, nn.Flatten, *[nn.Linear] * 4]


def test_heads_names_in_the_state_dict_are_stable():
    names = [name.partition(".")[0] for name in head_of("adaptive").state_dict()]
    assert list(dict.fromkeys(names)) == ["conv", "bn", "linear"]


@pytest.mark.parametrize("name", HEADS)
def test_head_depends_on_its_seed_only(name):
    before = torch.get_rng_state()
    first = head_of(name, seed=2**62)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(2)
    again, other = head_of(name, seed=2**62), head_of(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_unknown_head_lists_near_names():
    with pytest.raises(ConfigError, match=r"train\.head: got 'adaptve', unknown head") as error:
        head_of("adaptve")
    assert "adaptive" in error.value.fix


def test_head_on_maps_of_four_sides_is_an_error():
    with pytest.raises(ConfigError, match=r"\(2, 3, 4, 5, 6\) per sample, want at most 3 sides"):
        head_site([(16, 8, 8), (2, 3, 4, 5, 6), (10,)], 1, 10)


@pytest.mark.parametrize(("shape", "kernel", "num_cells"), [((16, 40), (3,), 4), ((16, 5, 6, 7), (3, 3, 3), 8)])
def test_head_convolves_along_every_side_and_keeps_several_cells(shape, kernel, num_cells):
    head = head_of("classic", shape)
    assert head.conv.weight.shape == (256, 16, *kernel)
    assert head.linear.in_features == 256 * num_cells


def test_head_on_a_vector_is_linear_layers_without_pools():
    head = head_of("adaptive", (12,), num_classes=5)
    assert [type(part) for part in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [part.out_features for part in head_of("auglocal", (12,)) if isinstance(part, nn.Linear)] == [24, 32, 10]


@pytest.mark.parametrize(("layer_idx", "widths"), [(0, (8, 8, 16)), (2, (16,)), (3, (32,))])
def test_site_takes_widths_from_layers_with_as_many_sides(layer_idx, widths):
    shapes = [(4, 30), (8, 15), (8, 15), (64,), (16, 7), (32,)]
    assert head_site(shapes, layer_idx, 3).downstream == widths


def test_auglocal_head_halves_series_and_volumes_too():
    strides = [part.stride for part in head_of("auglocal", (8, 30)) if isinstance(part, nn.Conv1d)]
    assert strides == [(2,), (2,)]
    strides = [part.stride for part in head_of("auglocal", (8, 1, 2, 9)) if isinstance(part, nn.Conv3d)]
    assert strides == [(1, 2, 2), (1, 1, 2)]


def test_site_says_what_lies_before_and_after():
    shapes = [(16, 8, 8), (16, 8, 8), (32, 4, 4), (64, 2, 2), (64,)]
    site = head_site(shapes, 1, 7)
    assert (site.in_shape, site.num_outputs, site.num_upstream, site.downstream) == ((16, 8, 8), 7, 2, (32, 64))


def convolutions(head):
    return [part for part in head if isinstance(part, nn.Conv2d)]


VGG = [*[(16, 32, 32)] * 2, *[(32, 16, 16)] * 2, *[(64, 8, 8)] * 3, *[(128, 4, 4)] * 3, *[(128, 2, 2)] * 3]


def test_auglocal_head_has_fewer_layers_the_deeper_it_stands():
    depths = []
    for layer_idx in range(len(VGG) - 1):
        head = build_head("auglocal", head_site(VGG, layer_idx, 10), 0)
        depths.append(len(convolutions(head)))
    assert depths == sorted(depths, reverse=True)
    assert (depths[0], depths[-1], set(depths)) == (5, 1, {1, 2, 3, 4, 5})


def test_auglocal_head_takes_widths_evenly_from_the_layers_that_follow_and_halves_maps():
    head = build_head("auglocal", head_site(VGG, 0, 10), 0)
    assert [part.out_channels for part in convolutions(head)] == [32, 64, 128, 128, 128]
    sizes = []
    for part in convolutions(head):
        part.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[2:])))
    head.eval()(torch.randn(1, *VGG[0]))
    assert sizes == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert head.linear.in_features == 128


@pytest.mark.parametrize(("shape", "strides"), [((8, 1, 1), [(1, 1)] * 2), ((8, 1, 9), [(1, 2)] * 2)])
def test_auglocal_head_keeps_what_cannot_be_halved(shape, strides):
    assert [part.stride for part in convolutions(head_of("auglocal", shape))] == strides


def test_auglocal_head_before_layers_without_maps_has_one_layer_of_its_own_width():
    head = head_of("auglocal", (24, 4, 4), downstream=())
    assert [part.out_channels for part in convolutions(head)] == [24]
