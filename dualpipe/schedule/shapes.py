"""The exchange of shapes before activations, for microbatches whose tensors differ in shape.

A receiver must know the shape of a tensor before it posts the receive.  So before each slot with activations comes a
slot in which the two ends of each of these messages meet, where the sender gives the shape::

    3SF0>+3RF1<                  3AR>@6+3AR<@11   3SF0>+3RF1<

Each directed edge has a group of its own.  A gradient has the shape of its activation and needs no exchange.  In the
value an exchange is a collective, which waits for all that a run waits for and more, so a proof holds for the run.

The further wait can add a deadlock: interleaved 1F1B has one.  DualPipe and DualPipeV have none at any size that was
tried; the theorems for all sizes are about the schedules without an exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dualpipe.schedule.on_demand import OnDemand
from dualpipe.schedule.op import COLLECTIVES, RF, SF, Kind, Op, Program, Slot
from dualpipe.schedule.value import Schedule

EXCHANGE = Kind.AR
"""The kind of the ops of an exchange."""


def with_shape_exchange(schedule: Schedule) -> Schedule:
    """The schedule with an exchange of shapes before each slot with activations, and without other collectives."""
    edges = _edges(schedule)

    def program(rank: int) -> Program:
        return tuple(made for slot in schedule.programs[rank] for made in _exchanged(schedule, rank, slot, edges))

    programs: Sequence[Program] = OnDemand(schedule.ranks, program, schedule.microbatches)
    if not isinstance(schedule.programs, OnDemand):
        programs = tuple(programs)
    return Schedule(schedule.routes, programs, schedule.name, tuple(edges), failures=schedule.failures)


def _edges(schedule: Schedule) -> dict[tuple[int, int], int]:
    """The number of each (sender, receiver) of activations, in order of lane and stage."""
    found: dict[tuple[int, int], int] = {}
    for route in schedule.routes.values():
        for edge in pairwise(route):
            if edge[0] != edge[1]:
                found.setdefault(edge, len(found))
    return found


def _exchanged(schedule: Schedule, rank: int, slot: Slot, edges: dict[tuple[int, int], int]) -> list[Slot]:
    kept = tuple(op for op in slot if op.kind not in COLLECTIVES)
    shapes = []
    for op in kept:
        peer = schedule.peer(op) if op.kind in (SF, RF) else None
        edge = (rank, peer) if op.kind is SF else (peer, rank)
        if edge in edges:
            shapes.append(Op(EXCHANGE, op.lane, op.stage, 0, edges[edge]))
    return [made for made in (tuple(shapes), kept) if made]
