"""Z3 for one size, the second of the two methods: each check as facts of difference logic (``proofs.difference``).

Facts describe the programs and what the check requires; all of them can hold together exactly if the check holds.  The
formulations differ from those of ``proofs.search``, and the two share nothing but the schedule value:

complete
    Counts: as many ops as there are microbatches from 0 to the largest, and as many distinct ones.
order
    Times: each rank's ops of a microbatch come one after the other as written, and each after what it needs.
messages
    Pairs by *content*, not by position: the receives that belong to the sends of an ordered pair are in the order of
    the sends, and each message has both its ends.
memory
    A chain of counts: how many more microbatches are live from one allocating slot to the next.
accumulation
    Times: the B of a stage come one after the other as written, and in microbatch order; likewise the W.

``deadlock`` is in ``proofs.deadlock_smt``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from dualpipe.schedule import (
    COLLECTIVES,
    COMPUTE,
    MESSAGES,
    RECEIVES,
    SENDS,
    Chunk,
    Kind,
    Lane,
    Op,
    Placed,
    Schedule,
    Task,
)
from proofs.difference import Contradiction, Link, Problem, decide, joined
from proofs.memory import Bound
from proofs.solver import SHARED, Solver
from proofs.verdict import Proved, Refuted, Unknown, Verdict

WHERE = "{0.op} in slot {0.slot} of rank {0.rank}"
BEHIND = Link("rank {0.rank} has {0.op} in slot {0.slot} and {1.op} behind it in slot {1.slot}")
GROWS = Link("rank {0} holds {gap} more in slot {2} than in slot {1}")


def verdict(problem: Problem, timeout_s: float | None = None, solver: Solver = SHARED) -> Verdict:
    """The verdict of Z3: a contradiction refutes, and its facts in words are the core."""
    answer = decide(problem, timeout_s, solver)
    match answer:
        case None:
            return Proved()
        case Unknown():
            return answer
        case Contradiction(core):
            return Refuted(None, tuple(map(str, joined(core))))


def complete(schedule: Schedule) -> Problem:
    problem = Problem("complete")
    zero = problem.variable("zero")
    numbers: dict[tuple[Lane, int, Kind], list[int]] = defaultdict(list)
    strays = total = 0
    for placed in schedule:
        kind, lane, stage, mb, _ = placed.op
        if kind in COMPUTE:
            total += 1
            strays += placed.rank != schedule.routes[lane][stage]
            numbers[lane, stage, kind].append(mb)

    def count(name: str, is_now: int, least: int, most: int | None, what: str) -> None:
        variable = problem.variable(name)
        problem.exactly(zero, variable, is_now, "{0}: there are {1}", what, is_now)
        problem.later(zero, variable, "{0}: there must be {1} or more", what, least, gap=least)
        if most is not None:
            problem.later(variable, zero, "{0}: there may be {1} at most", what, most, gap=-most)

    count("computes", total, 1, None, "computes")
    count("strays", strays, 0, 0, "computes on a rank that does not hold their stage")
    for lane, route in schedule.routes.items():
        expected = schedule.microbatches[lane]
        for stage in range(len(route)):
            for kind in (Kind.F, Kind.B, Kind.W):
                found = numbers[lane, stage, kind]
                what = f"{kind} of stage {stage} on lane {lane}"
                name = f"{stage}{kind}{lane}"
                count(f"{name} all", len(found), 0, expected, what)
                count(f"{name} distinct", len(set(found)), expected, None, f"{what}, each microbatch counted once")
    return problem


def order(schedule: Schedule) -> Problem:
    problem = Problem("order")
    rows: dict[tuple[int, Lane, int], list[Placed]] = defaultdict(list)
    for placed in schedule:
        rows[placed.rank, placed.op.lane, placed.op.mb].append(placed)
    for row in rows.values():
        times = list(_in_a_row(problem, row))
        first: dict[Op, int] = {}
        for placed, time in zip(row, times, strict=True):
            first.setdefault(placed.op.bare, time)
        for placed, time in zip(row, times, strict=True):
            if placed.op.kind in RECEIVES:
                continue
            for need in schedule.needs(placed.op):
                if need not in first:
                    first[need] = problem.variable(f"{need} r{placed.rank} never")
                    problem.later(time, first[need], "rank {0.rank} has no {1}", placed, need)
                problem.later(first[need], time, WHERE + " needs {1}", placed, need)
    _reductions(problem, schedule)
    return problem


def _reductions(problem: Problem, schedule: Schedule) -> None:
    """Every W of a stage comes before the last reduction of its gradients."""
    rows: dict[tuple[int, Chunk], list[Placed]] = defaultdict(list)
    for placed in schedule:
        if placed.op.kind in (Kind.W, Kind.RG):
            rows[placed.rank, placed.op.chunk].append(placed)
    for row in rows.values():
        reductions = [at for at, placed in enumerate(row) if placed.op.kind is Kind.RG]
        if reductions:
            times = list(_in_a_row(problem, row))
            for at, placed in enumerate(row):
                if placed.op.kind is Kind.W:
                    problem.later(times[at], times[reductions[-1]], WHERE + " is reduced", placed)


def accumulation(schedule: Schedule) -> Problem:
    problem = Problem("accumulation")
    rows: dict[tuple[int, Kind, Chunk], list[Placed]] = defaultdict(list)
    for placed in schedule:
        if placed.op.kind in (Kind.B, Kind.W):  # B adds the gradients of parameters outside linear layers
            rows[placed.rank, placed.op.kind, placed.op.chunk].append(placed)
    for row in rows.values():
        times = list(_in_a_row(problem, row))
        by_microbatch = sorted(range(len(row)), key=lambda index: (row[index].op.mb, index))
        for one, other in pairwise(by_microbatch):
            rule = "{1.op} must be added after {0.op}"
            problem.later(times[one], times[other], rule, row[one], row[other])
    return problem


def messages(schedule: Schedule) -> Problem:
    problem = Problem("messages")
    zero = problem.variable("zero")
    peers: dict[tuple[int, Op, int | None], Placed] = {}
    sends: dict[tuple[int, int], list[Placed]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Placed]] = defaultdict(list)
    for placed in schedule:
        op = placed.op
        if op.kind not in MESSAGES:
            continue
        peer = schedule.peer(op)
        peers.setdefault((placed.rank, Op(op.kind, op.lane, op.stage, 0), peer), placed)
        if peer is not None and schedule.crosses(op):
            (sends if op.kind in SENDS else receives)[
                (placed.rank, peer) if op.kind in SENDS else (peer, placed.rank)
            ].append(placed)
    for number, ((_, _, peer), placed) in enumerate(peers.items()):
        _joins_neighbours(problem, zero, number, placed, peer, schedule)
    for pair in sorted(sends.keys() | receives.keys()):
        _same_order(problem, zero, schedule, pair, sends[pair], receives[pair])
    for number, members in enumerate(schedule.groups):
        _same_collectives(problem, zero, schedule, number, members)
    return problem


def _same_collectives(problem: Problem, zero: int, schedule: Schedule, number: int, members: tuple[int, ...]) -> None:
    """All members of a group have equally many collectives, and their k-th ones have the same kind and stage."""
    rows: dict[int, list[Placed]] = defaultdict(list)
    for placed in schedule:
        if placed.op.kind in COLLECTIVES and placed.op.peer == number:
            rows[placed.rank].append(placed)
    total = problem.variable(f"collectives of group {number}")
    contents: dict[tuple[Kind, int], int] = {}
    what: dict[int, int] = {}
    for rank in members:
        text = "rank {0} joins {1} collectives of group {2}"
        problem.exactly(zero, total, len(rows[rank]), text, rank, len(rows[rank]), number)
        for nth, placed in enumerate(rows[rank]):
            if nth not in what:
                what[nth] = problem.variable(f"collective {nth} of group {number}")
            stage = -1 if placed.op.kind is Kind.AR else placed.op.stage
            content = contents.setdefault((placed.op.kind, stage), len(contents))
            problem.exactly(zero, what[nth], content, WHERE + " is collective {1} of group {2}", placed, nth, number)
    for stranger in rows.keys() - set(members):
        outside = problem.variable(f"rank {stranger} outside of group {number}")
        problem.later(zero, outside, WHERE + " joins a group without its rank", rows[stranger][0])
        problem.later(outside, zero, "only members join a collective", gap=0)


def _joins_neighbours(
    problem: Problem, zero: int, number: int, placed: Placed, peer: int | None, schedule: Schedule
) -> None:
    neighbour = schedule.neighbour(placed.op)
    if peer is None or neighbour is None or not schedule.crosses(placed.op):
        nowhere = problem.variable(f"nowhere {number}")
        problem.later(zero, nowhere, WHERE + " joins no two ranks", placed)
        problem.later(nowhere, zero, "every message joins two ranks", gap=0)
        return
    for role, is_now, wanted in (
        ("other end", peer, neighbour),
        ("own rank", placed.rank, schedule.rank_of(placed.op)),
    ):
        variable = problem.variable(f"{role} {number}")
        problem.exactly(zero, variable, is_now, WHERE + " has as its {1} rank {2}", placed, role, is_now)
        problem.exactly(zero, variable, wanted, "the lane gives {0.op} as its {1} rank {2}", placed, role, wanted)


def _same_order(
    problem: Problem, zero: int, schedule: Schedule, pair: tuple[int, int], sends: list[Placed], receives: list[Placed]
) -> None:
    """The receives of an ordered pair are in the order of the sends that they belong to, and none lacks its send."""
    name = f"{pair[0]} to {pair[1]}"
    end = problem.variable(f"end {name}")
    times: dict[tuple[Op, int], int] = {}
    row = list(_in_a_row(problem, receives))
    if row:
        problem.later(row[-1], end, "rank {0} receives no more from rank {1}", pair[1], pair[0])
    sent = list(_numbered(send.op.bare for send in sends))
    belongs = list(_numbered(schedule.needs(receive.op)[0] for receive in receives))
    times.update(zip(belongs, row, strict=True))
    before = None
    for send, content in zip(sends, sent, strict=True):
        if content not in times:
            times[content] = problem.variable(f"receive of {content[0]} {content[1]} {name}")
            problem.later(end, times[content], "rank {1} has no receive for " + WHERE, send, pair[1])
            problem.later(times[content], end, WHERE + " is received", send)
        if before is not None:
            rule = "what {0.op} sends is received before what {1.op} sends"
            problem.later(times[before[1]], times[content], rule, before[0], send)
        if content[1]:
            again = problem.variable(f"again {content[0]} {content[1]} {name}")
            problem.later(zero, again, WHERE + " sends the same once more", send)
            problem.later(again, zero, "every message is sent once", gap=0)
        before = send, content
    known = set(sent)
    for receive, content in zip(receives, belongs, strict=True):
        if content not in known:
            alone = problem.variable(f"send of {content[0]} {content[1]} {name}")
            problem.later(zero, alone, "rank {1} has no send for " + WHERE, receive, pair[0])
            problem.later(alone, zero, "every receive has its send", gap=0)


def _numbered(contents: Iterator[Op]) -> Iterator[tuple[Op, int]]:
    """Each content with the number of equal ones before it."""
    seen: Counter[Op] = Counter()
    for content in contents:
        yield content, seen[content]
        seen[content] += 1


def memory(schedule: Schedule, bound: Bound) -> Problem:
    problem = Problem("memory")
    zero = problem.variable("zero")
    for rank, most in enumerate(bound.per_rank):
        before, at, released = zero, 0, 0
        for number, (new, gone) in sorted(_births_and_deaths(schedule, rank).items()):
            if new:
                during = problem.variable(f"live r{rank}s{number}")
                problem.later(before, during, GROWS, rank, at, number, gap=new - released)
                problem.later(during, zero, "rank {0} may hold {2} in slot {1}", rank, number, most, gap=-most)
                before, at, released = during, number, 0
            released += gone
    return problem


def _births_and_deaths(schedule: Schedule, rank: int) -> dict[int, list[int]]:
    """For each slot how many microbatches become live in it and how many end, counted microbatch by microbatch."""
    lives: dict[Task, list[tuple[int, bool]]] = defaultdict(list)
    for number, slot in enumerate(schedule.programs[rank]):
        for op in slot:
            if op.kind in (Kind.F, Kind.W):
                lives[op.task].append((number, op.kind is Kind.W))
    changes: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for events in lives.values():
        ends_next = False
        for number, ends in sorted(events):
            if ends is ends_next:
                changes[number][ends] += 1
                ends_next = not ends_next
    return changes


def _in_a_row(problem: Problem, row: list[Placed]) -> Iterator[int]:
    """A time for each op, one after the other in the order of the rank's program."""
    previous = None
    for placed in row:
        time = problem.variable(f"{placed.op} r{placed.rank}s{placed.slot}.{placed.position}")
        if previous is not None:
            problem.later(previous[1], time, BEHIND, previous[0], placed)
        yield time
        previous = placed, time
