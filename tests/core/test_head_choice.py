"""Heads that the planner names: the strongest that fit, weaker ones before batches get too small."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nf_pipeline.config import RunConfig
from nf_pipeline.core import timing
from nf_pipeline.core.drafts import Draft, PlanJob, draft_plan
from nf_pipeline.core.head_choice import choose_heads
from nf_pipeline.core.heads import HEADS, STRENGTH
from nf_pipeline.core.layers import cut
from nf_pipeline.core.models import build_model
from nf_pipeline.core.planner import make_plan
from nf_pipeline.core.proposals import Proposal, propose
from nf_pipeline.core.search import LARGE_ENOUGH
from nf_pipeline.errors import PlanError
from nf_pipeline.plans import Plan
from nf_pipeline.samples import InputSpec, TargetSpec

FACTS = {
    "inputs": InputSpec(shape=(3, 16, 16)),
    "target": TargetSpec(size=10),
    "split_rows": {"train": 900, "val": 100},
}


@pytest.fixture(scope="module", autouse=True)
def hasty_timing() -> Iterator[None]:
    """What is measured need not be exact here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timing, "TIMING_S", 0.2)
        yield


@functools.cache
def plan_with(budget: int, head: str = "auto", good: int = 32, **train: object) -> Plan:
    document = {
        "model": {"name": "convnet"},
        "memory": {"budget_bytes": budget, "good_batch_size": good},
        "train": {"device": "cpu", "head": head, **(train or {"unit_layers": 1})},
    }
    return make_plan(RunConfig.model_validate(document), **FACTS)


def job_for(model: str, budget: int, image_shape: tuple[int, int, int]) -> PlanJob:
    memory = {"budget_bytes": budget}
    train = {"device": "cpu", "head": "auto", "unit_layers": 1}
    cfg = RunConfig.model_validate({"model": {"name": model}, "memory": memory, "train": train})
    cut_model = cut(
        build_model(model, inputs=InputSpec(shape=image_shape), num_outputs=10, seed=0), InputSpec(shape=image_shape)
    )
    return PlanJob(
        cfg=cfg,
        memory=cfg.memory,
        budgets=(budget,),
        cap_name="memory.max_batch_size",
        cut_model=cut_model,
        inputs=InputSpec(shape=image_shape),
        target=TargetSpec(size=10),
        split_rows=FACTS["split_rows"],
        device=torch.device("cpu"),
    )


def estimated(job: PlanJob, proposal: Proposal) -> Draft:
    return draft_plan(job, proposal, job.estimate(proposal.spans))


def batches_of_units(draft: Draft) -> list[int]:
    return [block.batch_size for block in draft.blocks for _ in range(*block.units)]


def stronger_ones(proposal: Proposal) -> Iterator[Proposal]:
    """Yields the proposal with one head stronger, by as many steps as there are."""
    for position, span in enumerate(proposal.spans[:-1]):
        for head in STRENGTH[: STRENGTH.index(span.head)]:
            spans = [*proposal.spans]
            spans[position] = span._replace(head=head)
            yield replace(proposal, spans=tuple(spans))


def heads_of(plan: Plan) -> list[str]:
    return [unit.head for unit in plan.units]


def smallest_batch(plan: Plan) -> int:
    return min(block.batch_size for block in plan.blocks)


def test_strength_names_heads_and_ends_with_the_one_that_takes_least() -> None:
    assert set(STRENGTH) <= set(HEADS)
    needed = []
    for head in STRENGTH:
        with pytest.raises(PlanError) as caught:
            plan_with(2**16, head)
        needed.append(caught.value.smallest_budget_bytes)
    assert min(needed) == needed[-1]


def test_loose_budget_takes_the_strongest_everywhere_but_on_the_models_own_classifier() -> None:
    plan = plan_with(2**30)
    assert heads_of(plan) == [STRENGTH[0]] * 5 + [""]
    assert plan.blocks[0].reason.endswith(f"heads: 5 x {STRENGTH[0]}, the model's own")


@pytest.mark.parametrize("budget", [2_500_000, 6_000_000])
def test_no_head_lowers_a_batch_below_what_trains_well_where_a_weaker_one_would_not(budget: int) -> None:
    plan, weakest = plan_with(budget), plan_with(budget, STRENGTH[-1])
    assert smallest_batch(plan) >= min(32, smallest_batch(weakest))
    assert max(block.predicted_peak_bytes for block in plan.blocks) <= budget


# The second one's last layers reach no good batch with any head, and the first one's none with the strongest.
@pytest.mark.parametrize(
    ("model", "budget", "image_shape"),
    [
        ("convnet", 6_000_000, (3, 16, 16)),
        ("vgg11_bn", 30_000_000, (3, 32, 32)),
        ("resnet18", 60_000_000, (3, 32, 32)),
    ],
)
def test_any_head_that_were_stronger_would_lower_a_batch(
    model: str, budget: int, image_shape: tuple[int, int, int]
) -> None:
    job = job_for(model, budget, image_shape)
    (proposal,) = propose(job.cfg.train, job.num_layers, job.memory.max_batch_size, lambda span, size: True)
    chosen = choose_heads(job, proposal, job.estimate)
    before = batches_of_units(estimated(job, chosen))
    assert {span.head for span in chosen.spans} - {"", STRENGTH[0]}, "some had to give way"
    for stronger in stronger_ones(chosen):
        try:
            after = batches_of_units(estimated(job, stronger))
        except PlanError:
            continue
        assert any(new < min(32, old) for old, new in zip(before, after, strict=True)), stronger.spans


def test_less_memory_never_makes_all_heads_stronger() -> None:
    ranks = []
    for budget in (2_500_000, 6_000_000, 2**30):
        ranks.append(sum(STRENGTH.index(head) for head in heads_of(plan_with(budget)) if head))
    assert ranks[0] > ranks[-1] == 0
    assert ranks == sorted(ranks, reverse=True)


def test_smaller_good_batch_allows_stronger_heads() -> None:
    strict, lenient = (heads_of(plan_with(3_500_000, good=good)) for good in (128, 4))
    assert strict != lenient
    assert all(STRENGTH.index(b) <= STRENGTH.index(a) for a, b in zip(strict[:-1], lenient[:-1], strict=True))


def test_budget_that_suffices_for_the_weakest_heads_alone_still_makes_a_plan() -> None:
    with pytest.raises(PlanError) as caught:
        plan_with(2**16, STRENGTH[-1])
    plan = plan_with(caught.value.smallest_budget_bytes)
    assert STRENGTH[-1] in heads_of(plan)


def test_searched_plan_names_a_head_for_every_unit_of_every_candidate() -> None:
    plan = plan_with(8_000_000, local="auto", loss="predsim")
    assert "" not in heads_of(plan)[:-1]
    assert all("heads: " in block.reason for block in plan.blocks)
    several = [candidate for candidate in plan.candidates if candidate.num_units > 1]
    assert several and all(candidate.name.endswith("heads as they fit") for candidate in several)
    # Of a head every three layers the batch is a little smaller with any head, and it may be the fastest.
    assert smallest_batch(plan) >= LARGE_ENOUGH * max(min(candidate.batch_sizes) for candidate in plan.candidates)
