"""Which stages a rank holds, and the gradient norm of a rank with two of them.

4 ranks                 0   1   2   3
dualpipe    lane >      0   1   2   3
            lane <      3   2   1   0
dualpipev   lane >      0   1   2   3
                        7   6   5   4
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import RuleError
from dualpipe.megatron import schedule_of, stages_of
from dualpipe.megatron.placement import placement
from dualpipe.schedule import DOWN, UP, Chunk
from dualpipe.testing.launch import launch
from reference.megatron import production
from reference.megatron.case import Case
from tests.megatron.ranks import CASE
from tests.megatron.test_planted_faults import complaint

V = Case(schedule="dualpipev", clip=0.0, microbatches=4, steps=1, timeout=10)


def test_a_rank_holds_a_stage_and_its_mirror_image_or_both_ends_of_a_v():
    two_way, v = placement("dualpipe", 4), placement("dualpipev", 4)
    assert [two_way.chunks(rank) for rank in (0, 2)] == [
        (Chunk(UP, 0), Chunk(DOWN, 3)),
        (Chunk(DOWN, 1), Chunk(UP, 2)),
    ]
    assert [v.chunks(rank) for rank in (0, 3)] == [(Chunk(UP, 0), Chunk(UP, 7)), (Chunk(UP, 3), Chunk(UP, 4))]
    assert (two_way.stages, two_way.ends()) == (4, [(UP, 3), (DOWN, 0)])
    assert (v.stages, v.ends()) == (8, [(UP, 0)])
    assert (two_way.other(2), v.other(2)) == (Chunk(DOWN, 1), Chunk(UP, 5))


@pytest.mark.parametrize(("schedule", "ranks"), [("dualpipe", 3), ("dualpipe", 1), ("dualpiepv", 4)])
def test_an_unknown_schedule_or_an_odd_pipeline_of_dualpipe_is_refused(schedule, ranks):
    with pytest.raises(RuleError):
        placement(schedule, ranks)


def test_the_flags_select_the_schedule_and_the_number_of_stages():
    args = SimpleNamespace(pipeline_model_parallel_size=4, use_dualpipe=False, use_dualpipev=False)
    assert (schedule_of(args), stages_of(args)) == (None, 4)
    args.use_dualpipev = True
    assert (schedule_of(args), stages_of(args)) == ("dualpipev", 8)
    args.use_dualpipe = True
    assert (schedule_of(args), stages_of(args)) == ("dualpipe", 4)


def norm_of_a_rank_summed_first():
    from dualpipe.megatron import optimizer

    optimizer.add_norms_by_stage = lambda built, model, groups: None


def second_stage_built_with_the_generators_of_the_first():
    from contextlib import nullcontext

    from dualpipe.megatron import model

    model.seeded_for = lambda distance: nullcontext()


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (norm_of_a_rank_summed_first, "gradient norm"),
        (second_stage_built_with_the_generators_of_the_first, "loss of microbatch"),
    ],
    ids=["norm", "seed"],
)
def test_a_planted_fault_of_dualpipev_is_found(plant, says):
    found = complaint(V, plant)
    assert says in found, found or "nothing was found"


def test_a_config_with_the_number_of_ranks_as_its_pipeline_size_is_refused():
    def rank(context):
        real = production.transformer_config
        production.transformer_config = lambda case: real(CASE)
        with pytest.raises(RuleError, match=r"must be the number of stages, .*: got 2 for 4 stages"):
            production.run_rank(V, context)

    launch(2, rank, V.limit).values()
