"""Reads the compute-only table of torch.distributed.pipelining, as its ``_dump_csv`` writes it.

One row per rank, one cell per step::

    0F0,0F1,,1F0,(0F2;1B0)OVERLAP_F_B,1I1,1W1

``I`` is the backward for the input, our B; torch's ``B`` is the full backward, our ``B+W`` in one slot; an empty cell
is a pause.  A stage is held by the rank that runs it.  All stages are on one lane.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from dualpipe.schedule import UP, B, F, Op, Program, Schedule, Slot, W
from dualpipe.schedule.lower import OrderError, lower
from dualpipe.schedule.text import BYTE_ORDER_MARK, ScheduleSyntaxError, check_line, read_text

_ACTION = re.compile(r"([0-9]{1,9})([FIWB])([0-9]{1,9})")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")
_FORM = "an action such as 0F1, 7I0, 7W0, 7B3 or (0F7;7B3)OVERLAP_F_B, with numbers of at most 9 digits, or nothing"
_KINDS = {"F": (F,), "I": (B,), "W": (W,), "B": (B, W)}


class _Cell(NamedTuple):
    """A cell that is not empty: its text, and the line and column (from 1) at which that begins."""

    line: int
    column: int
    text: str


def load_csv(path: Path) -> Schedule:
    """Read a table from a file: see ``loads_csv``.  Raises ``OSError`` for a file that cannot be read."""
    return loads_csv(read_text(path), str(path))


def loads_csv(text: str, source: str = "<string>") -> Schedule:
    """The table's schedule, messages added by ``lower``; ``source`` is the name that errors give it.

    Raises
    ------
    ScheduleSyntaxError
        With line and column, for a cell that is not an action, a stage that no rank or two ranks run, a repeated
        compute, or an order that cannot be run.
    """
    return _Table(source).read(text)


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
        try:
            return lower(schedule)
        except OrderError as error:
            cell = rows[error.at.rank][error.at.slot]
            self.fail(cell.line, cell.column, f"that {error.got}", f"that {error.rule} ({error.fix})")

    def slot(self, cell: _Cell) -> Slot:
        pair = _PAIR.fullmatch(cell.text)
        if pair is None:
            return self.action(cell, cell.text, cell.column, "FIWB")
        forward = self.action(cell, pair.group(1), cell.column + pair.start(1), "F")
        return forward + self.action(cell, pair.group(2), cell.column + pair.start(2), "BI")

    def action(self, cell: _Cell, text: str, column: int, allowed: str) -> Slot:
        found = _ACTION.fullmatch(text.strip())
        if found is None or found.group(2) not in allowed:
            self.fail(cell.line, column, repr(_short(text)) if text else "nothing", _FORM)
        stage, kind, mb = found.groups()
        return tuple(Op(kind, UP, int(stage), int(mb)) for kind in _KINDS[kind])

    def route(self, rows: list[list[_Cell]], programs: tuple[Program, ...]) -> tuple[int, ...]:
        """The rank that runs each stage."""
        holders: dict[int, int] = {}
        for rank, (row, program) in enumerate(zip(rows, programs, strict=True)):
            for cell, slot in zip(row, program, strict=True):
                for op in slot:
                    if holders.setdefault(op.stage, rank) != rank:
                        found = f"stage {op.stage}, which rank {holders[op.stage]} runs too"
                        self.fail(cell.line, cell.column, found, "each stage on one rank")
        for stage in range(len(holders)):
            if stage not in holders:
                expected = f"a row that runs it, as there is a stage {max(holders)}"
                self.fail(len(rows), 1, f"no stage {stage} anywhere", expected)
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
