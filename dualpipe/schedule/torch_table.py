"""Tables of torch.distributed.pipelining, as its ``_dump_csv`` writes them: read with their messages, and written.

One row per rank, one cell per action, in the two formats of torch::

    compute_only    0F0,0F1,,1F0,(0F2;1B0)OVERLAP_F_B,1I1,1W1
    compute_comms   0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD

``I`` is the backward for the input, our B; torch's ``B`` is the full backward, our ``B+W`` in one slot; an empty cell
is a pause.  A stage is held by the rank that runs it.  All stages are on one lane.

A table with anything but computes is compute_comms, and its messages are read as they are, each in a slot of its own,
since torch posts them one by one.  ``UNSHARD``, ``RESHARD`` and ``REDUCE_GRAD`` are our US, RS and RG without a group:
torch shards over ranks that are in no table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from dualpipe.schedule import (
    COMPUTE,
    MESSAGES,
    RB,
    RF,
    SB,
    SF,
    UP,
    B,
    F,
    Kind,
    Op,
    Program,
    Schedule,
    ScheduleError,
    Slot,
    W,
    full_backwards,
)
from dualpipe.schedule.lower import OrderError, lower
from dualpipe.schedule.text import BYTE_ORDER_MARK, ScheduleSyntaxError, check_line, read_text

_KINDS = {
    "F": (F,),
    "I": (B,),
    "W": (W,),
    "B": (B, W),
    "SEND_F": (SF,),
    "RECV_F": (RF,),
    "SEND_B": (SB,),
    "RECV_B": (RB,),
    "UNSHARD": (Kind.US,),
    "RESHARD": (Kind.RS,),
    "REDUCE_GRAD": (Kind.RG,),
}
_OF_A_STAGE = frozenset({"UNSHARD", "RESHARD", "REDUCE_GRAD"})
_NAMES = {kinds[0]: name for name, kinds in _KINDS.items() if len(kinds) == 1}
_ACTION = re.compile(rf"([0-9]{{1,9}})({'|'.join(sorted(_KINDS, key=len, reverse=True))})([0-9]{{1,9}})?")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_FORM = (
    "an action such as 0F1, 7I0, 7W0, 7B3, (0F7;7B3)OVERLAP_F_B, 0SEND_F1, 1RECV_F1, 7SEND_B0, 6RECV_B0, 0UNSHARD, "
    "0RESHARD or 0REDUCE_GRAD, with numbers of at most 9 digits, or nothing"
)


class _Cell(NamedTuple):
    """A cell that is not empty: its text, and the line and column (from 1) at which that begins."""

    line: int
    column: int
    text: str


def load_csv(path: Path) -> Schedule:
    """Read a table from a file: see ``loads_csv``.  Raises ``OSError`` for a file that cannot be read."""
    return loads_csv(read_text(path), str(path))


def loads_csv(text: str, source: str = "<string>") -> Schedule:
    """The table's schedule; ``lower`` adds the messages of a compute_only one.  ``source`` is its name in errors.

    Raises
    ------
    ScheduleSyntaxError
        With line and column, for a cell that is not an action, a stage that no rank or two ranks run, and in a
        compute_only table for a repeated compute or an order that cannot be run.
    """
    return _Table(source).read(text)


def dumps_csv(schedule: Schedule, compute_only: bool = False) -> str:
    """The schedule as a table, with the line endings that torch writes; ``compute_only`` leaves out all but computes.

    Computes in one slot that are neither a full backward nor an F&B pair get a cell each, and so do messages.

    Raises
    ------
    ScheduleError
        For what torch's tables cannot say: two lanes, a peer that is not the neighbour, an all-to-all or all-reduce, a
        program that failed.
    """
    if schedule.failures:
        got = str(schedule.failures[0])
        raise ScheduleError("a table of torch cannot describe a program that failed", got, "print it as text")
    if tuple(schedule.routes) != (UP,):
        got = " and ".join(f"lane {lane}" for lane in schedule.routes)
        raise ScheduleError("a table of torch has the one lane >", f"there is {got}", "print it as text")
    rows = [
        [cell for slot in program for cell in _cells_of(schedule, slot) if not compute_only or slot[0].kind in COMPUTE]
        for program in schedule.programs
    ]
    return "".join(f"{','.join(row)}\r\n" for row in rows)


def _cells_of(schedule: Schedule, slot: Slot) -> list[str]:
    full = full_backwards(slot)
    actions = [_action_of(schedule, op, op.task in full) for op in slot if op.kind is not W or op.task not in full]
    forwards = [op for op in slot if op.kind is F]
    backwards = [op for op in slot if op.kind is B]
    if len(actions) == 2 and len(forwards) == len(backwards) == 1:
        first, second = sorted(actions, key=lambda action: action != _action_of(schedule, forwards[0], False))
        return [f"({first};{second})OVERLAP_F_B"]
    return actions


def _action_of(schedule: Schedule, op: Op, is_full: bool) -> str:
    if op.kind not in _NAMES and not (op.kind is B and is_full):
        raise ScheduleError("a table of torch has no all-to-all or all-reduce", f"there is {op}", "leave it out")
    if op.kind in MESSAGES and op.peer is not None and op.peer != schedule.neighbour(op):
        raise ScheduleError("a message of a table of torch goes to the neighbour", f"there is {op}", "correct the peer")
    name = "B" if op.kind is B and is_full else _NAMES[op.kind]
    return f"{op.stage}{name}{'' if name in _OF_A_STAGE else op.mb}"


class _Table:
    """Parses one table; ``source`` is its name in errors."""

    def __init__(self, source: str) -> None:
        self.source = source

    def read(self, text: str) -> Schedule:
        lines = list(enumerate(text.removeprefix(BYTE_ORDER_MARK).rstrip().split("\n"), start=1))
        for number, line in lines:
            check_line(self.source, number, line)
        rows = [list(_cells(number, line)) for number, line in lines]
        for number, row in enumerate(rows, start=1):
            if not row:
                self.fail(number, 1, "no action", "at least one in the row of each rank")
        programs = tuple(tuple(map(self.slot, row)) for row in rows)
        schedule = Schedule({UP: self.route(rows, programs)}, programs)
        if any(slot[0].kind not in COMPUTE for program in programs for slot in program):
            return schedule
        try:
            return lower(schedule)
        except OrderError as error:
            cell = rows[error.at.rank][error.at.slot]
            self.fail(cell.line, cell.column, f"that {error.got}", f"that {error.rule} ({error.fix})")

    def slot(self, cell: _Cell) -> Slot:
        pair = _PAIR.fullmatch(cell.text)
        if pair is None:
            return self.action(cell, cell.text, cell.column, _KINDS)
        forward = self.action(cell, pair.group(1), cell.column + pair.start(1), {"F"})
        return forward + self.action(cell, pair.group(2), cell.column + pair.start(2), {"B", "I"})

    def action(self, cell: _Cell, text: str, column: int, allowed: Collection[str]) -> Slot:
        found = _ACTION.fullmatch(text.strip())
        if found is None or found[2] not in allowed or (found[3] is None) is not (found[2] in _OF_A_STAGE):
            self.fail(cell.line, column, repr(_short(text)) if text else "nothing", _FORM)
        stage, kind, mb = found.groups()
        return tuple(Op(kind, UP, int(stage), int(mb or 0)) for kind in _KINDS[kind])

    def route(self, rows: list[list[_Cell]], programs: tuple[Program, ...]) -> tuple[int, ...]:
        """The rank that runs each stage."""
        holders: dict[int, int] = {}
        for rank, (row, program) in enumerate(zip(rows, programs, strict=True)):
            for cell, slot in zip(row, program, strict=True):
                for op in (op for op in slot if op.kind in COMPUTE):
                    if holders.setdefault(op.stage, rank) != rank:
                        found = f"stage {op.stage}, which rank {holders[op.stage]} runs too"
                        self.fail(cell.line, cell.column, found, "each stage on one rank")
        if not holders:
            self.fail(1, 1, "no compute anywhere", "a row that runs stage 0")
        for stage in range(len(holders)):
            if stage not in holders:
                expected = f"a row that runs it, as there is a stage {max(holders)}"
                self.fail(len(rows), 1, f"no stage {stage} anywhere", expected)
        for row, program in zip(rows, programs, strict=True):
            for cell, slot in zip(row, program, strict=True):
                if slot[0].stage not in holders:
                    expected = f"a stage that a row runs, 0 to {len(holders) - 1}"
                    self.fail(cell.line, cell.column, f"stage {slot[0].stage}, which no row runs", expected)
        return tuple(holders[stage] for stage in range(len(holders)))

    def fail(self, line: int, column: int, found: str, expected: str) -> NoReturn:
        raise ScheduleSyntaxError(self.source, line, column, found, expected)


def _cells(number: int, line: str) -> Iterator[_Cell]:
    column = 1
    for cell in line.split(","):
        text = cell.strip()
        if text:
            yield _Cell(number, column + len(cell) - len(cell.lstrip()), text)
        column += len(cell) + 1


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
