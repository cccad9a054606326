"""Schedules of sail-sg's zero-bubble scheduler, as lists of nodes: read with their batches of messages, and proved."""

from dataclasses import dataclass
from enum import Enum

import pytest

from dualpipe.schedule import COMPUTE, UP, ScheduleError
from dualpipe.schedule.generate import zb1p
from dualpipe.schedule.text import dumps
from dualpipe.schedule.zero_bubble import from_nodes
from proofs.prove import prove


class Type(Enum):
    """Some of their types."""

    F = "F"
    B = "B"
    W = "W"
    BW = "BW"
    SEND_FORWARD = "SEND_FORWARD"
    RECV_FORWARD = "RECV_FORWARD"
    SEND_BACKWARD = "SEND_BACKWARD"
    RECV_BACKWARD = "RECV_BACKWARD"
    POST_VALIDATION = "POST_VALIDATION"
    S = "S"


class Direction(Enum):
    """Theirs."""

    NEXT = 0
    PREV = 1


@dataclass
class Node:
    """The attributes of their nodes that matter here."""

    type: Type
    stage: int
    microbatch: int
    layer_group_idx: int | None
    comm_peer_stage: int | None = None
    comm_direction: Direction | None = None
    seq_split_idx: int = 0


def compute(kind, rank, mb, group=None):
    return Node(Type[kind], rank, mb, rank if group is None else group)


def message(kind, rank, mb, peer):
    return Node(Type[kind], rank, mb, rank, peer, Direction.NEXT if peer > rank else Direction.PREV)


ORDER = [
    [
        Node(Type.POST_VALIDATION, 0, 0, None),
        compute("F", 0, 0),
        message("SEND_FORWARD", 0, 0, 1),
        compute("F", 0, 1),
        message("RECV_BACKWARD", 0, 0, 1),
        message("SEND_FORWARD", 0, 1, 1),
        compute("B", 0, 0),
        message("RECV_BACKWARD", 0, 1, 1),
        compute("W", 0, 0),
        compute("BW", 0, 1),
    ],
    [
        message("RECV_FORWARD", 1, 0, 0),
        compute("F", 1, 0),
        compute("B", 1, 0),
        message("SEND_BACKWARD", 1, 0, 0),
        message("RECV_FORWARD", 1, 1, 0),
        compute("F", 1, 1),
        compute("BW", 1, 1),
        message("SEND_BACKWARD", 1, 1, 0),
        compute("W", 1, 0),
    ],
]


def test_messages_between_two_computes_are_a_batch_that_ends_with_what_the_next_compute_takes():
    assert dumps(from_nodes(ORDER, "zb")) == (
        "schedule zb\n"
        "lane > 0 1\n"
        "rank 0: 0F0> 0SF0>@1 0F1> 0RB0>@1 0SF1>@1 0B0> 0RB1>@1 0W0> 0B1>+0W1>\n"
        "rank 1: 1RF0>@0 1F0> 1B0> 1SB0>@0+1RF1>@0 1F1> 1B1>+1W1> 1SB1>@0 1W0>\n"
    )


def test_what_such_a_schedule_does_wrong_is_refuted():
    checks = prove(from_nodes(ORDER)).checks
    assert checks["deadlock"].verdict.word == "proved", "rank 0 receives before it sends"
    assert checks["accumulation"].verdict.word == "refuted", "rank 1 runs W1 before W0"


def test_a_batch_has_the_order_of_their_runtime():
    middle = [
        message("SEND_FORWARD", 1, 0, 2),
        message("RECV_FORWARD", 1, 1, 0),
        message("SEND_BACKWARD", 1, 0, 0),
        message("RECV_BACKWARD", 1, 1, 2),
        compute("F", 1, 5),
    ]
    order = [[compute("F", 0, 0)], middle, [compute("F", 2, 0)]]
    program = from_nodes(order).programs[1]
    assert [str(op) for op in program[0]] == ["1SB0>@0", "1RF1>@0", "1SF0>@2", "1RB1>@2"]


def test_lists_without_messages_get_them():
    ours = zb1p(3, 6)
    order = [
        [compute(str(op.kind), rank, op.mb) for slot in program for op in slot if op.kind in COMPUTE]
        for rank, program in enumerate(ours.programs)
    ]
    read = from_nodes(order)
    assert read.only(COMPUTE).programs == ours.only(COMPUTE).programs
    assert prove(read).verdict == "proved"


def test_a_v_has_its_layer_groups_on_the_ranks_that_run_them():
    forwards = [(0, 0), (1, 1), (1, 2), (0, 3)]
    order = [[compute("F", rank, 0, group) for own, group in forwards if own == rank] for rank in (0, 1)]
    assert from_nodes(order).routes == {UP: (0, 1, 1, 0)}


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([Node(Type.S, 0, 0, 0)], "rank 0 has S; make the schedule without vocabulary parallelism"),
        ([Node(Type.F, 0, 0, 0, seq_split_idx=1)], "make it without sequence splits"),
        ([Node(Type.F, 0, 0, None)], "layer_group_idx None"),
        ([compute("F", 0, 0, 1)], "numbered from 0 without gaps: there are 1"),
        ([], "there are none"),
    ],
)
def test_what_is_no_schedule_of_one_lane_is_refused(nodes, says):
    with pytest.raises(ScheduleError, match=says):
        from_nodes([nodes])
    with pytest.raises(ScheduleError, match="ranks 0 and 1 run layer group 0"):
        from_nodes([[compute("F", 0, 0)], [compute("F", 1, 0, 0)]])
