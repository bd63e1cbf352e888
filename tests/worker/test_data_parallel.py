"""Gangs of real processes: what they sum, that they train as one, and what happens when one of them is gone."""

import time

import numpy as np
import pytest
import torch
from gang_work import (
    average,
    catch_the_loss,
    come_if_first,
    join_and_leave_twice,
    joined,
    lose_a_member,
    make_block,
    reduce_numbers,
    train,
)
from gangs import MemberFailed, outcomes_of_gang, run_gang

from nf_pipeline.errors import Diverged, WorkerLost
from nf_pipeline.gang import ALONE


def largest_difference(curve, other):
    return (torch.tensor(curve, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).abs().max()


@pytest.mark.parametrize(
    "steps",
    [[(16, 16)] * 20, [(17, 12), (16, 16), (20, 11), (9, 14)] * 5, [(8, 7, 7)] * 20],
    ids=["even", "uneven", "three"],
)
def test_members_train_like_one_process_with_the_whole_batch(steps):
    expected = train(ALONE, steps, "fp32")
    assert len(expected["curve"]) == 20
    assert expected["curve"][-1] < expected["curve"][0]
    for result in run_gang(train, len(steps[0]), steps, "fp32"):
        assert largest_difference(result["curve"], expected["curve"]) < 1e-4


@pytest.mark.parametrize("loss", ["cross_entropy", "infopro"])
def test_members_of_any_size_train_exactly_like_one_process(loss):
    """In float64, where batches of four do not blow up the rounding."""
    steps = [(6, 6), (1, 3), (9, 4), (2, 7)] * 5
    expected = train(ALONE, steps, "fp32", "float64", loss)
    for result in run_gang(train, 2, steps, "fp32", "float64", loss):
        assert largest_difference(result["curve"], expected["curve"]) < 1e-9
        for name, value in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_members_have_the_same_weights_and_losses_to_the_last_bit(precision):
    steps = [(4, 4, 3)] * 8
    first, *others = run_gang(train, 3, steps, precision)
    again = run_gang(train, 3, steps, precision)[0]
    for other in [*others, again]:
        assert other["curve"] == first["curve"]
        assert all(torch.equal(other["weights"][name], value) for name, value in first["weights"].items())


def test_members_that_each_match_the_similarities_of_their_own_part_stay_the_same_and_learn():
    steps = [(12, 9)] * 15
    first, other = run_gang(train, 2, steps, "fp32", "float32", "predsim")
    assert all(torch.equal(other["weights"][name], value) for name, value in first["weights"].items())
    assert any("objective" in name for name in first["weights"])
    curve = torch.tensor(first["curve"])
    assert first["curve"] == other["curve"]
    assert (curve[-3:].mean(0) < 0.9 * curve[:3].mean(0)).all()


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_over(size):
    results = run_gang(reduce_numbers, size)
    ranks = range(size)
    for result in results:
        assert result["total"] == [sum(ranks), size / 2, size * 2**40 + sum(ranks)]
        assert [type(total) for total in result["total"]] == [int, float, int]
        assert result["largest"] == (size - 1, 0.0)
        assert result["union"] == [sum(1 << 5 * rank for rank in ranks), 0, sum(7 << 5 * rank for rank in ranks)]
        assert result["errors"] == [[value for rank in ranks for value in (rank, float(np.float32(0.1)))]]
        ones, powers = sum(rank + 1 for rank in ranks), sum(10**rank for rank in ranks)
        assert result["sums"] == [[ones], [ones], [powers], [powers], [powers], [ones]]
        assert result["losses"] == pytest.approx([sum(rank * (rank + 1) / 3 for rank in ranks)])
        assert result["rows"] == [[rank, rank + 1] for rank in ranks]


def test_gradients_become_those_of_the_mean_over_all_samples():
    for first, without_gradient, frozen in run_gang(average, 2, (1, 3)):
        assert first == pytest.approx([1 * 1 / 4 + 2 * 3 / 4] * 3)
        assert without_gradient is None
        assert frozen is None


def test_a_gang_can_meet_again_at_the_same_address():
    assert run_gang(join_and_leave_twice, 2) == [[3, 3], [3, 3]]


def test_alone_nothing_changes_and_no_group_is_made():
    units = make_block()
    kinds = [type(module) for unit in units for module in unit.modules()]
    loss = torch.tensor(2.5)
    with joined(ALONE) as replicas:
        assert not torch.distributed.is_initialized()
        replicas.convert(units)
        replicas.average_gradients(units[0], 3, 3)
        replicas.barrier()
        assert replicas.averaging(3, 3) is None
        assert replicas.mean_losses([loss], 3, 3)[0] is loss
        assert (replicas.total([1, 2.5]), replicas.largest(7)) == ([1, 2.5], 7)
    assert [type(module) for unit in units for module in unit.modules()] == kinds
    with pytest.raises(ZeroDivisionError), joined(ALONE):
        raise ZeroDivisionError


@pytest.mark.parametrize(("how", "size"), [("is killed", 3), ("raises", 3), ("is killed", 2)])
def test_a_member_that_is_gone_is_a_lost_worker_to_the_others_within_seconds(how, size):
    started = time.monotonic()
    outcomes = outcomes_of_gang(lose_a_member, size, how, timeout_s=50.0)
    assert time.monotonic() - started < 40.0, "the others waited until they gave up"
    assert all(isinstance(outcome, MemberFailed) for outcome in outcomes)
    gone = outcomes.pop(1).cause
    assert gone is None if how == "is killed" else type(gone) is Diverged
    for outcome in outcomes:
        assert type(outcome.cause) is WorkerLost
        assert outcome.cause.stage == "block-003"
        assert f"worker {outcome.rank + 1} of {size} lost one of the others" in str(outcome.cause)


def test_inside_the_context_a_lost_member_is_its_own_error():
    assert outcomes_of_gang(catch_the_loss, 2)[0] == "PeerLost"


def test_members_that_never_come_are_lost_workers():
    failed, absent = outcomes_of_gang(come_if_first, 2)
    assert absent is None
    assert type(failed.cause) is WorkerLost
    assert "worker 1 of 2 did not meet the others at 127.0.0.1:" in str(failed.cause)
