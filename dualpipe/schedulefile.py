"""The text form of a schedule: ``loads(dumps(schedule)) == schedule``.

::

    # a comment; blank lines are ignored
    schedule dualpipe
    lane > 0 1 2 3
    lane < 3 2 1 0
    rank 0: 0F0> 0SF0> 0F1> 3SB0<+3RF1< ...

Any byte sequence gives a schedule or a ``ScheduleSyntaxError`` that names file, line and column.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from dualpipe.schedule import (
    Kind,
    Lane,
    Op,
    Program,
    Schedule,
    ScheduleError,
    Slot,
    check_routes,
    check_slot,
    show_slot,
)

_NUMBER = re.compile(r"[0-9]{1,9}")
_OP = re.compile(r"([0-9]{1,9})(F|B|W|SF|RF|SB|RB)([0-9]{1,9})([<>])(?:@([0-9]{1,9}))?")
_NAME = re.compile(r"[^\s#]+")
_OP_FORM = "an op: stage, F B W SF RF SB or RB, microbatch, lane, and for a message optionally @rank, as in 2SF3>@3"
_LINE_FORM = "'schedule NAME', 'lane > RANK ...', 'lane < RANK ...' or 'rank N: SLOT ...'"
_T = TypeVar("_T")


class ScheduleSyntaxError(ScheduleError):
    """A text that is no schedule file.  ``line`` and ``column`` count from 1."""

    def __init__(self, source: str, line: int, column: int, found: str, expected: str) -> None:
        self.source, self.line, self.column, self.found, self.expected = source, line, column, found, expected
        super().__init__(f"{source}:{line}:{column}", f"found {found}", f"expected {expected}")


def dumps(schedule: Schedule) -> str:
    """The schedule as text, ending in a newline."""
    head = [f"schedule {schedule.name}"] if schedule.name else []
    lanes = [f"lane {lane} {' '.join(map(str, route))}" for lane, route in schedule.routes.items()]
    ranks = [" ".join([f"rank {rank}:", *map(show_slot, program)]) for rank, program in enumerate(schedule.programs)]
    return "\n".join([*head, *lanes, *ranks]) + "\n"


def digest(schedule: Schedule) -> str:
    """SHA-256 of the schedule's text in hexadecimal, by which ranks see that they run the same schedule."""
    return hashlib.sha256(dumps(schedule).encode()).hexdigest()


def load(path: Path) -> Schedule:
    """Read a schedule file.  Raises ``ScheduleSyntaxError`` for any content, ``OSError`` for a file it cannot read."""
    data = path.read_bytes()
    try:
        return loads(data.decode(), str(path))
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise ScheduleSyntaxError(str(path), before.count(b"\n") + 1, column, found, "UTF-8 text") from None


def loads(text: str, source: str = "<string>") -> Schedule:
    """Parse the text of a schedule file; ``source`` is the name that errors give it."""
    return _Parser(source).parse(text)


class _Parser:
    """One pass over the lines, then the rank lines against the lanes (which may stand after them)."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.name: str | None = None
        self.routes: dict[Lane, tuple[int, ...]] = {}
        self.lane_lines: dict[Lane, int] = {}
        self.rank_lines: dict[int, tuple[int, list[re.Match[str]]]] = {}

    def parse(self, text: str) -> Schedule:
        lines = text.split("\n")
        for number, line in enumerate(lines, start=1):
            content = line.split("#", 1)[0]
            words = list(re.finditer(r"\S+", content))
            if words:
                self.line(number, content, words)
        end = len(lines), 1
        if not self.routes:
            self.fail(*end, "no lane", "at least one line such as 'lane > 0 1 2 3'")
        for rank in range(len(self.rank_lines)):
            if rank not in self.rank_lines:
                self.fail(*end, f"no 'rank {rank}:'", f"a line for each rank from 0 to {max(self.rank_lines)}")
        lane_line = max(self.lane_lines.values())
        self.checked(lane_line, 1, lambda: check_routes(self.routes, len(self.rank_lines)))
        programs = tuple(self.program(*self.rank_lines[rank]) for rank in range(len(self.rank_lines)))
        return Schedule(self.routes, programs, self.name or "")

    def line(self, number: int, content: str, words: list[re.Match[str]]) -> None:
        match words[0].group():
            case "schedule":
                self.schedule_line(number, content, words)
            case "lane":
                self.lane_line(number, content, words)
            case "rank":
                self.rank_line(number, content)
            case other:
                self.fail(number, words[0].start() + 1, repr(_short(other)), _LINE_FORM)

    def schedule_line(self, number: int, content: str, words: list[re.Match[str]]) -> None:
        if self.name is not None:
            self.fail(number, words[0].start() + 1, "a second 'schedule' line", "one name at most")
        if len(words) != 2:
            column = (words[2].start() if len(words) > 2 else len(content)) + 1
            self.fail(number, column, f"{len(words) - 1} words", "one name after 'schedule'")
        self.name = words[1].group()

    def lane_line(self, number: int, content: str, words: list[re.Match[str]]) -> None:
        if len(words) < 2 or words[1].group() not in tuple(Lane):
            found, column = (
                (repr(_short(words[1].group())), words[1].start()) if len(words) > 1 else ("nothing", len(content))
            )
            self.fail(number, column + 1, found, "> or < after 'lane'")
        lane = Lane(words[1].group())
        if lane in self.routes:
            self.fail(number, words[1].start() + 1, f"lane {lane} a second time", "each lane once")
        self.routes[lane] = tuple(self.number(number, word) for word in words[2:])
        self.lane_lines[lane] = number

    def rank_line(self, number: int, content: str) -> None:
        head = re.match(r"\s*rank\s+([0-9]{1,9})\s*:", content)
        if head is None:
            column = content.index("rank") + 1
            self.fail(number, column, repr(_short(content.strip())), "'rank N: SLOT ...'")
        rank = int(head.group(1))
        if rank in self.rank_lines:
            self.fail(number, head.start(1) + 1, f"rank {rank} a second time", "each rank once")
        self.rank_lines[rank] = number, list(re.compile(r"\S+").finditer(content, head.end()))

    def program(self, number: int, words: list[re.Match[str]]) -> Program:
        return tuple(self.slot(number, word) for word in words)

    def slot(self, number: int, word: re.Match[str]) -> Slot:
        ops = tuple(self.op(number, column, text) for column, text in _parts(word))
        self.checked(number, word.start() + 1, lambda: check_slot(ops, self.routes))
        return ops

    def op(self, number: int, column: int, text: str) -> Op:
        found = _OP.fullmatch(text)
        if found is None:
            self.fail(number, column, repr(_short(text)), _OP_FORM)
        stage, kind, mb, lane, peer = found.groups()
        return Op(Kind(kind), Lane(lane), int(stage), int(mb), None if peer is None else int(peer))

    def number(self, line: int, word: re.Match[str]) -> int:
        if not _NUMBER.fullmatch(word.group()):
            self.fail(line, word.start() + 1, repr(_short(word.group())), "a rank, as a number below 1000000000")
        return int(word.group())

    def checked(self, line: int, column: int, check: Callable[[], _T]) -> _T:
        try:
            return check()
        except ScheduleError as error:
            self.fail(line, column, error.came, f"what the rule says: {error.rule} ({error.remedy})")

    def fail(self, line: int, column: int, found: str, expected: str) -> NoReturn:
        raise ScheduleSyntaxError(self.source, line, column, found, expected)


def _parts(word: re.Match[str]) -> Iterator[tuple[int, str]]:
    """The ops of a slot with the column at which each begins."""
    column = word.start() + 1
    for text in word.group().split("+"):
        yield column, text
        column += len(text) + 1


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
