"""The theorems are about tables and sizes; these tests check the planner's choice for each rank, up to a size.

The expected plans are written from the description in ``dualpipe/schedule/generate.py``, not from its code.
"""

from functools import partial

import pytest

from dualpipe.schedule import DOWN, UP, Chunk
from dualpipe.schedule.generate import (
    MIDDLE,
    MIDDLE_ALL,
    MIDDLE_TAIL,
    ONE_F_ONE_B,
    OUTER,
    OUTER_ALL,
    OUTER_TAIL,
    PLANS,
    ZB1P,
    Plan,
)
from proofs.theorems import families

LARGEST = 130
FAMILIES = {family.name: family for family in families()}


def assumed_dualpipe(ranks, microbatches, rank, outer=OUTER, middle=MIDDLE):
    mirror = ranks - 1 - rank
    upper = rank < mirror
    near, far = sorted((rank, mirror))
    own, other = (UP, DOWN) if upper else (DOWN, UP)
    return Plan(
        middle if far - near == 1 else outer,
        {"N": ranks // 2, "H": microbatches // 2, "h": near, "odd": near & 1},
        (Chunk(own, near), Chunk(other, far)),
        {UP: tuple(range(ranks)), DOWN: tuple(range(ranks))[::-1]},
    )


def assumed_dualpipev(ranks, microbatches, rank, outer=OUTER, middle=MIDDLE):
    return Plan(
        middle if rank + 1 == ranks else outer,
        {"N": ranks, "H": microbatches, "h": rank, "odd": rank & 1},
        (Chunk(UP, rank), Chunk(UP, 2 * ranks - 1 - rank)),
        {UP: tuple(range(ranks)) + tuple(range(ranks))[::-1]},
    )


def assumed_one_lane(table):
    def assumed(ranks, microbatches, rank):
        sizes = {"P": ranks, "M": microbatches, "r": rank}
        return Plan(table, sizes, (Chunk(UP, rank),), {UP: tuple(range(ranks))})

    return assumed


ASSUMED = {
    "dualpipe": assumed_dualpipe,
    "dualpipev": assumed_dualpipev,
    "dualpipe-late-tail": partial(assumed_dualpipe, outer=OUTER_TAIL, middle=MIDDLE_TAIL),
    "dualpipe-late-all": partial(assumed_dualpipe, outer=OUTER_ALL, middle=MIDDLE_ALL),
    "dualpipev-late-tail": partial(assumed_dualpipev, outer=OUTER_TAIL, middle=MIDDLE_TAIL),
    "dualpipev-late-all": partial(assumed_dualpipev, outer=OUTER_ALL, middle=MIDDLE_ALL),
    "1f1b": assumed_one_lane(ONE_F_ONE_B),
    "zb1p": assumed_one_lane(ZB1P),
}


def differences(name, planner):
    """The first size and rank whose plan differs from the assumed one."""
    step = 2 if name.startswith("dualpipe-") or name == "dualpipe" else 1
    fewest = 2 if name.startswith("dualpipe") else 1
    for ranks in range(step, LARGEST + 1, step):
        for microbatches in (fewest * ranks, fewest * ranks + step, 1000):
            for rank in range(ranks):
                if planner(ranks, microbatches, rank) != ASSUMED[name](ranks, microbatches, rank):
                    return ranks, microbatches, rank
    return None


@pytest.mark.parametrize("name", PLANS)
def test_the_planner_gives_the_tables_what_the_theorems_assume(name):
    assert differences(name, PLANS[name]) is None


@pytest.mark.parametrize("name", PLANS)
def test_each_plan_is_of_the_one_kind_of_rank_that_has_its_table(name):
    family = FAMILIES[name]
    for ranks in range(2, LARGEST + 1, 2):
        for rank in range(ranks):
            plan = PLANS[name](ranks, 1000, rank)
            values = family.values(plan.sizes, "")
            kinds = [kind for kind in family.ranks if all(constraint.holds(values) for constraint in kind.domain)]
            assert [kind.table for kind in kinds] == [plan.table]


def test_a_planner_that_is_wrong_at_large_sizes_alone_is_noticed():
    def capped(ranks, microbatches, rank):
        plan = PLANS["1f1b"](ranks, microbatches, rank)
        return Plan(plan.table, {**plan.sizes, "r": min(rank, 15)}, plan.chunks, plan.routes)

    assert differences("1f1b", capped) == (17, 17, 16)
