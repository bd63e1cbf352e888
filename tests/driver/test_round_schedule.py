"""Which rounds may start: tables, and whole runs played through without a cluster."""

import random
from itertools import pairwise

import pytest

from nf_pipeline.driver.round_schedule import MAX_ROUNDS_AHEAD, Round, RoundSchedule


def schedule(done: list[int], num_rounds: int, *, overlap: bool = False) -> RoundSchedule:
    return RoundSchedule(done, num_rounds, overlap=overlap)


def test_sequential_run_starts_one_block_after_the_other() -> None:
    plan = schedule([0, 0, 0], 1)
    order = []
    while not plan.is_finished:
        (work,) = plan.ready()
        plan.start(work)
        assert plan.ready() == []
        plan.finish(work)
        order.append(work.block_idx)
    assert order == [0, 1, 2]


def test_block_starts_on_what_is_being_written_only_if_it_may_overlap() -> None:
    for overlap in (False, True):
        plan = schedule([0, 0, 0], 1, overlap=overlap)
        plan.start(Round(0, 0))
        plan.publish(Round(0, 0))
        assert plan.ready() == ([Round(1, 0)] if overlap else [])


def test_rounds_of_all_blocks_run_side_by_side_once_the_pipeline_is_full() -> None:
    plan = schedule([2, 1, 0], 4)
    assert plan.ready() == [Round(2, 0), Round(1, 1), Round(0, 2)]


def test_block_waits_for_the_reader_of_its_rounds() -> None:
    ahead = MAX_ROUNDS_AHEAD
    assert Round(0, ahead - 1) in schedule([ahead - 1, 0], 9).ready()
    assert Round(0, ahead) not in schedule([ahead, 0], 9).ready()


def test_round_is_retired_when_neither_its_block_nor_the_next_reads_it_again() -> None:
    assert schedule([3, 1, 1], 4).retired() == [Round(0, 0)]
    assert schedule([3, 2, 2], 4).retired() == [Round(0, 0), Round(0, 1), Round(1, 0), Round(2, 0)]


def test_last_round_of_a_block_is_never_retired() -> None:
    retired = schedule([4, 4], 4).retired()
    assert Round(0, 3) not in retired and Round(1, 3) not in retired


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("overlap", [False, True])
def test_every_order_of_events_ends_and_never_reads_what_is_missing_or_stores_too_much(
    seed: int, overlap: bool
) -> None:
    dice = random.Random(seed)
    num_blocks, num_rounds = dice.randint(1, 5), dice.randint(1, 6)
    plan, running, published = schedule([0] * num_blocks, num_rounds, overlap=overlap), [], set()
    while not plan.is_finished:
        for work in plan.ready():
            before = Round(work.block_idx - 1, work.round_idx)
            assert work.block_idx == 0 or plan.done[before.block_idx] > before.round_idx or before in published
            assert before not in plan.retired()
            plan.start(work)
            running.append(work)
        assert running, "nothing runs and nothing may start"
        # An input is committed before the round that reads it.
        able = [w for w in running if w.block_idx == 0 or plan.done[w.block_idx - 1] > w.round_idx]
        work = dice.choice(able)
        if work not in published and dice.random() < 0.5:
            published.add(work)
            plan.publish(work)
            continue
        running.remove(work)
        plan.finish(work)
        assert all(ours - theirs <= MAX_ROUNDS_AHEAD for ours, theirs in pairwise(plan.done) if num_rounds > 1)
        for block_idx, count in enumerate(plan.done[:-1]):
            kept = [r for r in range(count) if Round(block_idx, r) not in plan.retired()]
            assert len(kept) <= MAX_ROUNDS_AHEAD + 1


def test_blocks_that_a_run_ends_without_neither_start_nor_go_on() -> None:
    plan = schedule([0, 0, 0], 1, overlap=True)
    plan.start(Round(0, 0))
    plan.publish(Round(0, 0))
    plan.start(Round(1, 0))
    plan.finish(Round(0, 0))
    assert plan.has_input(Round(1, 0))
    plan.end_after(1)
    assert plan.is_finished
    assert plan.ready() == []
    assert not plan.has_input(Round(1, 0))


def test_block_that_runs_others_again_waits_for_the_commits_of_all_of_them() -> None:
    plan = RoundSchedule([1, 0, 0], 1, overlap=True, sources=[-1, 0, 0])
    first, second = Round(1, 0), Round(2, 0)
    assert plan.ready() == [first]
    plan.start(first)
    plan.publish(first)
    assert not plan.has_input(second), "shards that are being written are not its input, and weights are missing"
    plan.finish(first)
    assert plan.ready() == [second]


def test_block_that_reads_the_images_may_start_once_the_blocks_before_it_are_trained() -> None:
    plan = RoundSchedule([0, 0], 1, overlap=True, sources=[-1, -1])
    assert plan.ready() == [Round(0, 0)]
    plan.start(Round(0, 0))
    assert plan.ready() == []
    plan.finish(Round(0, 0))
    assert plan.ready() == [Round(1, 0)]
