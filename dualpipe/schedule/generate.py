"""The named schedules: DualPipe, DualPipeV, their variants with late W, 1F1B, ZB1P, interleaved 1F1B and ZBV.

DualPipe's order is that of DeepSeek's ``step()`` (https://github.com/deepseek-ai/DualPipe, arXiv 2412.19437),
batch by batch; DualPipeV is its fold in half (each rank holds both ends of the V).  1F1B is PipeDream-Flush as
Megatron-LM runs it (arXiv 2104.04473), ZB1P the zero-bubble schedule ZB-H1 (arXiv 2401.10241).  Each of these is a
phase table.  Interleaved 1F1B and ZBV, which no table says, are orders of ``dualpipe.schedule.orders``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from operator import index
from typing import NamedTuple, SupportsIndex

from dualpipe.errors import RuleError, nearest
from dualpipe.schedule import DOWN, UP, Chunk, Lane, Program, Schedule, check_slot
from dualpipe.schedule.lower import lower
from dualpipe.schedule.on_demand import OnDemand
from dualpipe.schedule.orders import interleaved_order, zbv_order
from dualpipe.schedule.phase_table import Row, Table, expand, symbol, vary


class SizeError(RuleError):
    """A size that a named schedule cannot have."""


# DualPipe.  Chunk 0 is the lane that enters at the rank's own end of the pipeline, chunk 1 the other lane.
# N = ranks / 2, H = microbatches / 2 (those of one lane), h = distance from the nearer end, odd = h mod 2.
#
#   rank 0  h=0    > F F F F ...          every rank but the two in the middle runs OUTER,
#   rank 1  h=1    >   F F ...            the two in the middle, h = N-1, run MIDDLE
#   rank 2  h=1    <   F F ...
#   rank 3  h=0    < F F F F ...

N, H, h, odd = symbol("N"), symbol("H"), symbol("h"), symbol("odd")

OUTER: Table = (
    Row("1 warm-up", 2 * (N - h - 1), "RF0 F0 SF0"),
    Row("2 receive ahead", 1, "RF0"),
    Row("2 other lane enters", h, "F0 RF0 RF1 F1 SF1 SF0"),
    Row("2 last", 1, "F0 RF0 RF1 F1 SF1 SF0"),
    Row("3 first backwards", N - h - 1, "RB1 B1 SB1 RF1 W F1 SF1"),
    Row("4 first", 1, "RB1 F0+B1+W1 SF0 SB1 RF1 RB0"),
    Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SF1 SB0 RF0 RB1 F0+B1+W1 SF0 SB1 RF1 RB0"),
    Row("4 last", 1, "F1+B0+W0 SF1 SB0 RB1"),
    Row("5 forwards end", N - h - 1, "B1+W1 SB1 RF1 RB0 F1+B0+W0 SF1 SB0 RB1"),
    Row("6 full", (h + odd) // 2, "B1+W1 SB1 RB0 B0+W0 SB0 RB1"),
    Row("6 turn", 1 - odd, "B1+W1 SB1 RB0 B0 SB0"),
    Row("6 turn, odd", odd, "B1 SB1 RB0 B0 SB0"),
    Row("6 split", (h - odd) // 2, "RB1 B1 SB1 RB0 B0 SB0"),
    Row("7 cooldown", N - h - 1, "W RB0 B0 SB0"),
    Row("8 weights", h + 1, "W"),
)

MIDDLE: Table = vary(
    OUTER,
    Row("2 other lane enters", h, "F0 SF0 RF0 RF1 F1 SF1"),
    Row("2 last", 1, "F0 SF0 RF0 RF1 F1"),
    Row("4 first", 1, "F0 SF1 RB1 B1+W1 SF0 SB1 RF1 RB0"),
)

# Late W: DualPipe's computes and messages with some W after the messages of their B instead of before.  The messages
# leave earlier, and W fills the time in which the next ones arrive.  ``tail`` does so from the last pair of row 4 on,
# where no forward fills that time; ``all`` does so for every B.

TAIL: Table = (
    Row("4 last", 1, "F1+B0 SF1 SB0 RB1 W"),
    Row("5 forwards end", N - h - 1, "B1 SB1 RF1 RB0 W F1+B0 SF1 SB0 RB1 W"),
    Row("6 full", (h + odd) // 2, "B1 SB1 RB0 W B0 SB0 RB1 W"),
    Row("6 turn", 1 - odd, "B1 SB1 RB0 W B0 SB0"),
)
ALL: Table = (
    *TAIL,
    Row("4 overlapped", H - 2 * N + h, "F1+B0 SF1 SB0 RF0 RB1 W F0+B1 SF0 SB1 RF1 RB0 W"),
)
OUTER_TAIL: Table = vary(OUTER, *TAIL)
MIDDLE_TAIL: Table = vary(MIDDLE, *TAIL)
OUTER_ALL: Table = vary(OUTER, *ALL, Row("4 first", 1, "RB1 F0+B1 SF0 SB1 RF1 RB0 W"))
MIDDLE_ALL: Table = vary(MIDDLE, *ALL, Row("4 first", 1, "F0 SF1 RB1 B1 SF0 SB1 RF1 RB0 W"))


class TwoWay(NamedTuple):
    """The tables of DualPipe and DualPipeV: ``middle`` for the ranks in the middle, ``outer`` for all others."""

    outer: Table
    middle: Table


class LateW(StrEnum):
    """Which W of DualPipe and DualPipeV come after the messages of their B."""

    none = "none"
    tail = "tail"
    all = "all"


TWO_WAY: Mapping[LateW, TwoWay] = {
    LateW.none: TwoWay(OUTER, MIDDLE),
    LateW.tail: TwoWay(OUTER_TAIL, MIDDLE_TAIL),
    LateW.all: TwoWay(OUTER_ALL, MIDDLE_ALL),
}

# One lane, one stage a rank.  P = ranks, M = microbatches, r = rank.

P, M, r = symbol("P"), symbol("M"), symbol("r")

ONE_F_ONE_B: Table = (
    Row("1 warm-up", P - r - 1, "RF0 F0 SF0"),
    Row("2 receive ahead", 1, "RF0"),
    Row("2 one forward, one backward", M - P + r, "F0 SF0 RB0 B0+W0 SB0 RF0"),
    Row("2 last", 1, "F0 SF0 RB0 B0+W0 SB0"),
    Row("3 cooldown", P - r - 1, "RB0 B0+W0 SB0"),
)

ZB1P: Table = (
    Row("1 warm-up", P - r - 1, "RF0 F0 SF0"),
    Row("2 receive ahead", 1, "RF0"),
    Row("2 weights deferred", r, "F0 SF0 RB0 B0 SB0 RF0"),
    Row("3 one of each", M - P, "F0 SF0 RB0 B0 SB0 RF0 W"),
    Row("3 last", 1, "F0 SF0 RB0 B0 SB0 W"),
    Row("4 cooldown", P - r - 1, "RB0 B0 SB0 W"),
    Row("5 weights", r, "W"),
)


@dataclass(frozen=True)
class Plan:
    """One rank of a schedule before expansion: its table, the table's sizes and where its chunks are."""

    table: Table
    sizes: Mapping[str, int]
    chunks: tuple[Chunk, ...]
    routes: Mapping[Lane, tuple[int, ...]]

    def program(self) -> Program:
        return expand(self.table, self.sizes, self.chunks, self.routes)


Planner = Callable[[int, int, int], Plan]


def plan_dualpipe(ranks: int, microbatches: int, rank: int, late_w: LateW = LateW.none) -> Plan:
    even_ranks = max(2, ranks + ranks % 2)
    _require(ranks == even_ranks, "dualpipe needs an even number of ranks, 2 or more", f"{ranks}", f"use {even_ranks}")
    _require_twice("dualpipe", ranks, microbatches)
    _require(
        microbatches % 2 == 0,
        "dualpipe needs an even number of microbatches, as many on one lane as on the other",
        f"{microbatches}",
        f"use {microbatches + 1}",
    )
    half = ranks // 2
    near = min(rank, ranks - 1 - rank)
    here, there = (UP, DOWN) if rank < half else (DOWN, UP)
    return Plan(
        TWO_WAY[late_w].middle if near == half - 1 else TWO_WAY[late_w].outer,
        {"N": half, "H": microbatches // 2, "h": near, "odd": near % 2},
        (Chunk(here, near), Chunk(there, ranks - 1 - near)),
        {UP: tuple(range(ranks)), DOWN: tuple(reversed(range(ranks)))},
    )


def plan_dualpipev(ranks: int, microbatches: int, rank: int, late_w: LateW = LateW.none) -> Plan:
    _require_rank("dualpipev", ranks)
    _require_twice("dualpipev", ranks, microbatches)
    return Plan(
        TWO_WAY[late_w].middle if rank == ranks - 1 else TWO_WAY[late_w].outer,
        {"N": ranks, "H": microbatches, "h": rank, "odd": rank % 2},
        (Chunk(UP, rank), Chunk(UP, 2 * ranks - 1 - rank)),
        {UP: (*range(ranks), *reversed(range(ranks)))},
    )


def plan_one_f_one_b(ranks: int, microbatches: int, rank: int) -> Plan:
    return _plan_one_lane("1f1b", ONE_F_ONE_B, ranks, microbatches, rank)


def plan_zb1p(ranks: int, microbatches: int, rank: int) -> Plan:
    return _plan_one_lane("zb1p", ZB1P, ranks, microbatches, rank)


def _plan_one_lane(name: str, table: Table, ranks: int, microbatches: int, rank: int) -> Plan:
    _require_rank(name, ranks)
    _require(
        microbatches >= ranks,
        f"{name} needs at least as many microbatches as ranks",
        f"{microbatches} for {_ranks(ranks)}",
        f"use {ranks} or more",
    )
    sizes = {"P": ranks, "M": microbatches, "r": rank}
    return Plan(table, sizes, (Chunk(UP, rank),), {UP: tuple(range(ranks))})


def _require_rank(name: str, ranks: int) -> None:
    _require(ranks >= 1, f"{name} needs at least one rank", f"{ranks}", "use 1 or more")


def _require_twice(name: str, ranks: int, microbatches: int) -> None:
    instead = ", or 1f1b" if microbatches >= ranks else ""
    _require(
        microbatches >= 2 * ranks,
        f"{name} needs at least two microbatches per rank",
        f"{microbatches} for {_ranks(ranks)}",
        f"use {2 * ranks} or more{instead}",
    )


def _ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _whole(ranks: object, microbatches: object) -> tuple[int, int]:
    """The sizes as ``int``; numpy's integers are accepted, a bool, a float and a text are not."""
    for size in (ranks, microbatches):
        _require(
            isinstance(size, SupportsIndex) and type(size).__name__ not in ("bool", "bool_"),
            "ranks and microbatches must be whole numbers",
            f"{size!r}",
            "give an int",
        )
    return index(ranks), index(microbatches)  # type: ignore[arg-type] # both have been checked


def _require(holds: bool, rule: str, got: str, fix: str) -> None:
    if not holds:
        raise SizeError(rule, f"got {got}", fix)


def dualpipe(ranks: int, microbatches: int, late_w: str = "none") -> Schedule:
    """DualPipe over ``ranks`` (even) and ``microbatches`` in all (even, at least ``2 * ranks``), half on each lane.

    With ``late_w="tail"`` the W of the last phases run after the messages of their B, with ``"all"`` every W does.
    Gradients keep their bits, and as many microbatches are live.  With F, B and W of one unit each, messages that take
    no time and a runtime that waits for a message only where it is used, no schedule with one stage per lane on each
    rank is shorter.
    """
    return generate(with_late_w("dualpipe", late_w), ranks, microbatches)


def dualpipev(ranks: int, microbatches: int, late_w: str = "none") -> Schedule:
    """DualPipeV: one lane, ``2 * ranks`` stages in a V, at least ``2 * ranks`` microbatches; ``late_w`` as above."""
    return generate(with_late_w("dualpipev", late_w), ranks, microbatches)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """1F1B without interleaving, at least ``ranks`` microbatches."""
    return generate("1f1b", ranks, microbatches)


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """ZB1P (ZB-H1): 1F1B with W deferred, at 1F1B's memory; at least ``ranks`` microbatches."""
    return generate("zb1p", ranks, microbatches)


def interleaved(ranks: int, microbatches: int) -> Schedule:
    """Interleaved 1F1B, two stages a rank: at least 2 ranks, and a multiple of ``ranks`` microbatches."""
    ranks, microbatches = _whole(ranks, microbatches)
    _require(ranks >= 2, "interleaved needs at least two ranks", f"{ranks}", "use 2 or more, or 1f1b")
    multiple = max(1, -(-microbatches // ranks)) * ranks
    _require(
        microbatches == multiple,
        "interleaved needs a multiple of the ranks as microbatches, at least as many as ranks",
        f"{microbatches} for {_ranks(ranks)}",
        f"use {multiple}",
    )
    return replace(lower(interleaved_order(ranks, microbatches)), name="interleaved")


def zbv(ranks: int, microbatches: int) -> Schedule:
    """ZBV: one lane, ``2 * ranks`` stages in a V, B and W split; any number of ranks and microbatches."""
    ranks, microbatches = _whole(ranks, microbatches)
    _require_rank("zbv", ranks)
    _require(microbatches >= 1, "zbv needs at least one microbatch", f"{microbatches}", "use 1 or more")
    return replace(lower(zbv_order(ranks, microbatches)), name="zbv")


PLANS: Mapping[str, Planner] = {
    "dualpipe": plan_dualpipe,
    "dualpipev": plan_dualpipev,
    "dualpipe-late-tail": partial(plan_dualpipe, late_w=LateW.tail),
    "dualpipe-late-all": partial(plan_dualpipe, late_w=LateW.all),
    "dualpipev-late-tail": partial(plan_dualpipev, late_w=LateW.tail),
    "dualpipev-late-all": partial(plan_dualpipev, late_w=LateW.all),
    "1f1b": plan_one_f_one_b,
    "zb1p": plan_zb1p,
}
"""The schedules that are phase tables, by name."""

ORDERS: Mapping[str, Callable[[int, int], Schedule]] = {"interleaved": interleaved, "zbv": zbv}
"""The schedules that are orders of computes with messages added, by name."""

NAMES = (*PLANS, *ORDERS)
"""The named schedules."""

MOST_AT_ONCE = 16_384
"""The most microbatches on all ranks together whose programs are generated at once.  Of more, such as 4096 microbatches
on 1024 ranks, each program is generated when it is asked for."""


def with_late_w(name: str, late_w: str) -> str:
    """The name of a schedule's variant.  Raises ``RuleError`` if there is no such variant of this schedule."""
    if late_w == LateW.none:
        return name
    if late_w not in tuple(LateW):
        fix = nearest(str(late_w), list(LateW), "correct it")
        raise RuleError(f"late_w must be {', '.join(LateW)}", f"got {late_w!r}", fix)
    variant = f"{name}-late-{late_w}"
    if variant not in PLANS:
        of = ", ".join(dict.fromkeys(each.partition("-late-")[0] for each in PLANS if "-late-" in each))
        raise RuleError(
            f"late W is an option of {of}", f"got {late_w} with {name}", "leave it out, or use one of these"
        )
    return variant


def generate(name: str, ranks: int, microbatches: int) -> Schedule:
    """The named schedule for a size.  Raises ``SizeError`` for a size it cannot have, ``KeyError`` for the name."""
    if name in ORDERS:
        return ORDERS[name](ranks, microbatches)
    ranks, microbatches = _whole(ranks, microbatches)
    plan = partial(PLANS[name], ranks, microbatches)
    routes = plan(0).routes
    if ranks * microbatches <= MOST_AT_ONCE:
        return Schedule(routes, tuple(plan(rank).program() for rank in range(ranks)), name)
    each = dict.fromkeys(routes, microbatches // len(routes))
    return Schedule(routes, OnDemand(ranks, lambda rank: _checked(plan(rank)), each), name)


def _checked(plan: Plan) -> Program:
    """The program of a rank, after the checks of a ``Schedule``; slots that differ only in microbatches are alike."""
    program = plan.program()
    for slot in {tuple([op[:3] for op in slot]): slot for slot in program}.values():
        check_slot(slot, plan.routes)
    return program
