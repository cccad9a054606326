"""Schedules of JaxPP and of Piper, as their tasks and their directives."""

from enum import Enum
from typing import NamedTuple

import pytest

from dualpipe.schedule import COMPUTE, B, F, ScheduleError, W
from dualpipe.schedule.generate import generate
from dualpipe.schedule.jaxpp import from_tasks
from dualpipe.schedule.piper import from_directives
from dualpipe.schedule.text import dumps
from proofs.prove import prove
from proofs.verdict import Refuted

Type = Enum("Type", ["FWD", "BWD", "BWD_I", "BWD_W"])


class Task(NamedTuple):
    """The attributes of their tasks that matter here; in some versions of theirs a tuple too."""

    stage_id: int
    mubatch_idx: int
    fwd_or_bwd: Enum


class FusedTask(tuple):
    """As theirs: a tuple of tasks."""


def tasks_of(schedule):
    """The computes of a schedule as JaxPP writes them: B and W in one slot as BWD, other slots of several as fused."""
    words = {(F,): Type.FWD, (B, W): Type.BWD, (B,): Type.BWD_I, (W,): Type.BWD_W}
    for program in schedule.only(COMPUTE).programs:
        row = [None]
        for slot in program:
            kinds = tuple(op.kind for op in slot)
            if kinds in words:
                row.append(Task(slot[0].stage, slot[0].mb, words[kinds]))
            else:
                row.append(FusedTask(Task(op.stage, op.mb, words[op.kind,]) for op in slot))
        yield [*row, None]


def directives_of(schedule):
    """The computes of a schedule as Piper writes them, on two devices for each rank."""
    (lane,) = schedule.lanes
    yield {"op": "split", "filter": {}, "dim_name": "MB", "num_microbatches": schedule.microbatches[lane]}
    for stage, rank in enumerate(schedule.routes[lane]):
        yield {"op": "place", "filter": {"PP": stage}, "devices": [rank + schedule.ranks, rank], "stream": "pp"}
        yield {"op": "replicate", "filter": {"PP": stage}, "devices": [rank, rank + schedule.ranks]}
    for program in reversed(schedule.only(COMPUTE).programs):
        groups = []
        for slot in program:
            whole = [op.task for op in slot if op.kind is B and op._replace(kind=W) in slot]
            words = {F: "F", B: "BI", W: "BW"}
            groups.append(
                [
                    {"PP": op.stage, "MB": op.mb, "PASS": "B" if op.task in whole else words[op.kind]}
                    for op in slot
                    if op.kind is not W or op.task not in whole
                ]
            )
        yield {"op": "order", "filters": groups}


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb1p", "zbv", "dualpipev"])
def test_the_orders_of_both_are_read_and_proved(name):
    ours = generate(name, 4, 8)
    for read in (from_tasks([*tasks_of(ours)], "theirs"), from_directives(directives_of(ours), "theirs")):
        assert read.routes == ours.routes
        assert read.only(COMPUTE).programs == ours.only(COMPUTE).programs
        assert not any(isinstance(check.verdict, Refuted) for check in prove(read, smt=False).checks.values())


def test_a_fused_task_is_a_slot_and_an_idle_step_is_left_out():
    first = [Task(0, 0, Type.FWD), None, FusedTask([Task(0, 1, Type.FWD), Task(0, 0, Type.BWD)]), Task(0, 1, Type.BWD)]
    last = [None, Task(1, 0, Type.FWD), Task(1, 0, Type.BWD_I), Task(1, 0, Type.BWD_W), Task(1, 1, Type.FWD)]
    read = from_tasks([first, [*last, FusedTask([Task(1, 1, Type.BWD_I), Task(1, 1, Type.BWD_W)])]])
    assert dumps(read.only(COMPUTE)) == (
        "lane > 0 1\nrank 0: 0F0> 0F1>+0B0>+0W0> 0B1>+0W1>\nrank 1: 1F0> 1B0> 1W0> 1F1> 1B1>+1W1>\n"
    )


def test_a_task_of_another_type_is_refused():
    with pytest.raises(ScheduleError, match="rank 0 has EVAL of microbatch 2 at stage 0; use one of these"):
        from_tasks([[Task(0, 2, Enum("Other", ["EVAL"]).EVAL)]])


def piper(*orders, places=((0, [0]), (1, [1])), microbatches=2):
    placed = [{"op": "place", "filter": {"PP": stage}, "devices": devices} for stage, devices in places]
    split = {"op": "split", "filter": {}, "dim_name": "MB", "num_microbatches": microbatches}
    return from_directives([*placed, split, *({"op": "order", "filters": order} for order in orders)])


def at(stage, mb, word):
    return {"PP": stage, "MB": mb, "PASS": word}


def test_ranks_are_the_sets_of_devices_in_ascending_order():
    order = [[at(0, 0, "F")], [at(0, 0, "B")]], [[at(1, 0, "F")], [at(1, 0, "BI")], [at(1, 0, "BW")]]
    read = piper(*order, places=((0, [3, 1]), (1, [2, 0])))
    assert dumps(read.only(COMPUTE)) == "lane > 1 0\nrank 0: 1F0> 1B0> 1W0>\nrank 1: 0F0> 0B0>+0W0>\n"


@pytest.mark.parametrize(
    ("orders", "says"),
    [
        ([[[at(0, 0, "F")], [at(1, 0, "F")]]], r"is for the ranks \[0, 1\]; give one"),
        ([[[at(0, 0, "F")]], [[at(0, 0, "B")]]], r"the ranks \[0\], which have one already"),
        ([[[at(0, 0, "F")]]], "rank 1 has none"),
        ([[[at(2, 0, "F")]]], r"names PP 2, and there are place directives for \[0, 1\]"),
        ([[[at(0, "*", "F")]]], "a filter gives one number for MB"),
        ([[[{"PP": 0, "PASS": "F"}]]], "a filter gives one number for MB"),
        ([[[at(0, 0, "FWD")]]], "PASS, one of F, B, BI, BW"),
        ([[[at(0, 0, "F") | {"EP": 0}]]], "an order's filter has PP, the microbatch and PASS"),
    ],
)
def test_directives_that_are_no_order_of_every_rank_are_refused(orders, says):
    with pytest.raises(ScheduleError, match=says):
        piper(*orders)


def test_a_stage_on_two_places_is_refused():
    with pytest.raises(ScheduleError, match=r"PP 0 is on \[0\] and on \[1\]"):
        piper([[at(0, 0, "F")]], places=((0, [0]), (0, [1])))
