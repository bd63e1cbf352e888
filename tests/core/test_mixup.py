"""Mixed batches: what is mixed with what, how a step trains on it, and that nothing else is drawn."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from nf_pipeline.config import TrainConfig
from nf_pipeline.core.local_unit import LocalUnit
from nf_pipeline.core.mixup import Mix, draw_mix
from nf_pipeline.core.train_step import make_optimizer, train_step

CPU = torch.device("cpu")


def make_unit() -> LocalUnit:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
        return LocalUnit([nn.Conv2d(2, 5, 3, padding=1)], head)


def test_nothing_is_drawn_where_nothing_is_mixed() -> None:
    before = torch.get_rng_state()
    assert draw_mix(0.0, 8, CPU) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_mix_follows_from_the_seed_alone_and_pairs_every_sample_once() -> None:
    mixes = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        mixes += [[draw_mix(0.4, 20, CPU) for _ in range(3)]]
    first, again, other = ([(mix.order_N.tolist(), mix.share) for mix in drawn] for drawn in mixes)
    assert first == again != other
    assert all(sorted(order) == list(range(20)) and 0.0 <= share <= 1.0 for order, share in [*first, *other])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixed_inputs_are_shares_of_two_samples_and_keep_their_layout(layout: torch.memory_format) -> None:
    x_NCHW = torch.randn(4, 3, 5, 6).to(memory_format=layout)
    before = x_NCHW.clone()
    mixed_NCHW = Mix(order_N=torch.tensor([2, 0, 3, 1]), share=0.25).inputs(x_NCHW)
    for row, other in enumerate([2, 0, 3, 1]):
        torch.testing.assert_close(mixed_NCHW[row], 0.25 * before[row] + 0.75 * before[other])
    assert torch.equal(x_NCHW, before)
    assert mixed_NCHW.stride() == x_NCHW.stride()


def test_step_on_a_mix_trains_on_mixed_inputs_and_on_both_labels() -> None:
    x_NCHW, y_N = torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    mix = Mix(order_N=torch.tensor([5, 4, 3, 2, 1, 0]), share=0.7)
    unit, expected = make_unit(), make_unit()
    train = TrainConfig(momentum=0.0, weight_decay=0.0)
    (loss,) = train_step([unit], [make_optimizer(unit, train, 0.1)], x_NCHW, y_N, "fp32", mix=mix)
    _, logits_NK = expected(0.7 * x_NCHW + 0.3 * x_NCHW.flip(0))
    written_out = 0.7 * functional.cross_entropy(logits_NK, y_N)
    written_out = written_out + 0.3 * functional.cross_entropy(logits_NK, y_N.flip(0))
    written_out.backward()
    torch.testing.assert_close(loss, written_out.detach())
    for one, other in zip(unit.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.1 * other.grad)
