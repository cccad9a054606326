"""The text form of a schedule: ``loads(dumps(schedule)) == schedule``.

::

    # a comment; blank lines are ignored
    schedule dualpipe
    failure 2: raised IndexError at train.py:11 during 1F1>
    lane > 0 1 2 3
    lane < 3 2 1 0
    group 0: 0 3
    rank 0: 0F0> 0SF0> 0F1> 3SB0<+3RF1< ... 0RG>@0

Any byte sequence gives a schedule or a ``ScheduleSyntaxError`` that names file, line and column.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVarTuple

from dualpipe.files import read_whole
from dualpipe.schedule import (
    MESSAGES,
    Failure,
    Kind,
    Lane,
    Op,
    Program,
    Schedule,
    ScheduleError,
    Slot,
    check_group,
    check_name,
    check_routes,
    check_slot,
    observed_text,
    show_slot,
)

BYTE_ORDER_MARK = "\ufeff"
"""The byte order mark that some editors write before UTF-8 text; readers skip it there."""
_NUMBER = re.compile(r"[0-9]{1,9}")
_OP = re.compile(r"([0-9]{1,9})(?:(F|B|W|SF|RF|SB|RB|AA)([0-9]{1,9})|(AR|US|RS|RG))([<>])(?:@([0-9]{1,9}))?")
_OP_FORM = (
    "an op: stage, F B W SF RF SB or RB, microbatch, lane, and for a message optionally @rank, as in 2SF3>@3, "
    "or a collective such as 2AA3> or 2RG>, optionally with @group, with numbers of at most 9 digits"
)
_LINE_FORM = (
    "'schedule NAME', 'lane > RANK ...', 'lane < RANK ...', 'group N: RANK ...', 'failure N: TEXT' or "
    "'rank N: SLOT ...'"
)
_Args = TypeVarTuple("_Args")


class ScheduleSyntaxError(ScheduleError):
    """A text that is not a schedule file.  ``line`` and ``column`` count from 1."""

    def __init__(self, source: str, line: int, column: int, found: str, expected: str) -> None:
        self.source, self.line, self.column, self.found, self.expected = source, line, column, found, expected
        super().__init__(f"{source}:{line}:{column}", f"found {found}", f"expected {expected}")


def dumps(schedule: Schedule, observed: bool = False) -> str:
    """The schedule as text, ending in a newline.  Equal schedules with the same name have the same text.

    With ``observed`` the lines for what was observed when a program ran it follow.
    """
    head = [f"schedule {schedule.name}"] if schedule.name else []
    lanes = _lane_lines(schedule)
    groups = [f"group {number}: {' '.join(map(str, members))}" for number, members in enumerate(schedule.groups)]
    ranks = [_program_line(rank, program) for rank, program in enumerate(schedule.programs)]
    lines = observed_text.lines_of(schedule.observed, schedule.programs) if observed else []
    failures = [f"failure {rank}: {what}" for rank, what in schedule.failures]
    return "\n".join([*head, *failures, *lanes, *groups, *ranks, *lines]) + "\n"


def as_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule as an object for JSON: the content of its text, each slot as the text writes it."""
    groups = {"groups": list(map(list, schedule.groups))} if schedule.groups else {}
    return {
        "schedule": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "microbatches": {str(lane): count for lane, count in schedule.microbatches.items()},
        "lanes": {str(lane): list(route) for lane, route in schedule.routes.items()},
        **groups,
        "programs": [[show_slot(slot) for slot in program] for program in schedule.programs],
        **({"failures": [failure._asdict() for failure in schedule.failures]} if schedule.failures else {}),
    }


def fingerprints(schedule: Schedule, rank: int) -> dict[str, str]:
    """What ``rank`` compares with other ranks to see that they run the same schedule, by what it is of.

    The size, the lanes, and the programs of the rank and of those with which it exchanges messages: no rank of a large
    schedule generates all programs for it.  Where each rank agrees with its peers, all of them run one schedule.
    """
    counts = "+".join(str(schedule.microbatches[lane]) for lane in schedule.lanes)
    found = {
        "schedule": f"{schedule.name or 'unnamed'} of {schedule.ranks} ranks, microbatches {counts}",
        "placement of stages": f"digest {_digest(' '.join(_lane_lines(schedule)))}",
    }
    own = schedule.programs[rank]
    peers = {schedule.peer(op) for slot in own for op in slot if op.kind in MESSAGES}
    for other in sorted({rank, *(peer for peer in peers if peer is not None and 0 <= peer < schedule.ranks)}):
        program = schedule.programs[other]
        found[f"program of rank {other}"] = f"{len(program)} slots, digest {_digest(_program_line(other, program))}"
    return found


def _lane_lines(schedule: Schedule) -> list[str]:
    return [f"lane {lane} {' '.join(map(str, route))}" for lane, route in sorted(schedule.routes.items(), reverse=True)]


def _program_line(rank: int, program: Program) -> str:
    return " ".join([f"rank {rank}:", *map(show_slot, program)])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path: Path) -> Schedule:
    """Read a schedule file.

    Raises ``ScheduleSyntaxError`` if the content is not a schedule, and whatever ``dualpipe.files.read_whole`` raises.
    """
    return loads(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file.  Raises ``ScheduleSyntaxError`` at the first byte that is not UTF-8, ``OSError`` as usual."""
    data = read_whole(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode().removeprefix(BYTE_ORDER_MARK)
        column = len(before) - before.rfind("\n")
        found = f"byte 0x{data[error.start]:02x}"
        raise ScheduleSyntaxError(str(path), before.count("\n") + 1, column, found, "UTF-8 text") from None


def check_line(source: str, number: int, line: str) -> None:
    """Raise ``ScheduleSyntaxError`` for a carriage return within a line.

    A file with only carriage returns between its lines would be one line, most of which may be a comment.
    """
    at = line.find("\r", 0, -1)
    if at >= 0:
        raise ScheduleSyntaxError(source, number, at + 1, "a carriage return", "lines that end in a newline")


def loads(text: str, source: str = "<string>") -> Schedule:
    """Parse the text of a schedule file; ``source`` is the name that errors give it."""
    return _Parser(source).parse(text)


def parse_ops(text: str) -> Slot | None:
    """The ops of a slot's text, such as ``3SB0<+3RF1<@2``; ``None`` for any other text."""
    found = [_OP.fullmatch(part) for part in text.split("+")]
    return None if None in found else tuple(_op_of(each) for each in found if each)


def _op_of(found: re.Match[str]) -> Op:
    stage, kind, mb, whole, lane, peer = found.groups()
    return Op(Kind(kind or whole), Lane(lane), int(stage), int(mb or 0), None if peer is None else int(peer))


class _Parser:
    """One pass over the lines, then the rank lines against the lanes (which may follow them)."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.name: str | None = None
        self.routes: dict[Lane, tuple[int, ...]] = {}
        self.lane_lines: dict[Lane, tuple[int, list[re.Match[str]]]] = {}
        self.rank_lines: dict[int, tuple[int, list[re.Match[str]]]] = {}
        self.observed_lines: list[observed_text.Line] = []
        self.group_lines: dict[int, tuple[int, list[re.Match[str]]]] = {}
        self.groups: tuple[tuple[int, ...], ...] = ()
        self.failures: list[tuple[int, Failure]] = []  # with the line of each

    def parse(self, text: str) -> Schedule:
        lines = text.removeprefix(BYTE_ORDER_MARK).split("\n")
        for number, line in enumerate(lines, start=1):
            check_line(self.source, number, line)
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
        self.check_lanes()
        self.check_groups(*end)
        programs = tuple(self.program(*self.rank_lines[rank]) for rank in range(len(self.rank_lines)))
        observed = observed_text.read(self.observed_lines, programs, self.op, self.fail)
        for number, failure in self.failures:
            if failure.rank >= len(programs):
                self.fail(number, 1, f"rank {failure.rank}, which has no program", "a rank of the file")
        failures = [failure for _, failure in self.failures]
        return Schedule(self.routes, programs, self.name or "", self.groups, failures=failures, observed=observed)

    def check_groups(self, line: int, column: int) -> None:
        for number in range(len(self.group_lines)):
            if number not in self.group_lines:
                expected = f"a line for each group from 0 to {max(self.group_lines)}"
                self.fail(line, column, f"no 'group {number}:'", expected)
        groups = []
        for number in range(len(self.group_lines)):
            at, words = self.group_lines[number]
            members = tuple(self.number(at, word) for word in words)
            self.checked(at, words[0].start() + 1 if words else 1, check_group, number, members, len(self.rank_lines))
            groups.append(members)
        self.groups = tuple(groups)

    def check_lanes(self) -> None:
        ranks = len(self.rank_lines)
        for lane, (number, words) in self.lane_lines.items():
            missing = [word for word, rank in zip(words, self.routes[lane], strict=True) if rank >= ranks]
            column = (missing[0] if missing else words[0]).start() + 1
            self.checked(number, column, check_routes, {lane: self.routes[lane]}, ranks)
        number, words = max(self.lane_lines.values(), key=lambda line: line[0])
        self.checked(number, words[0].start() + 1, check_routes, self.routes, ranks)

    def line(self, number: int, content: str, words: list[re.Match[str]]) -> None:
        match words[0].group():
            case "schedule":
                self.schedule_line(number, content, words)
            case "lane":
                self.lane_line(number, content, words)
            case "group" | "rank":
                self.numbered_line(number, content, words[0].group())
            case word if word in observed_text.WORDS:
                self.observed_lines.append((number, content))
            case "failure":
                self.failure_line(number, content)
            case other:
                self.fail(number, words[0].start() + 1, repr(_short(other)), _LINE_FORM)

    def schedule_line(self, number: int, content: str, words: list[re.Match[str]]) -> None:
        if self.name is not None:
            self.fail(number, words[0].start() + 1, "a second 'schedule' line", "one name at most")
        if len(words) != 2:
            found, column = (
                (repr(_short(words[2].group())), words[2].start()) if words[2:] else ("nothing", len(content))
            )
            self.fail(number, column + 1, found, "one name, without spaces, after 'schedule'")
        name = words[1].group()
        self.checked(number, words[1].start() + 1, check_name, name)
        self.name = name

    def lane_line(self, number: int, content: str, words: list[re.Match[str]]) -> None:
        if len(words) < 2 or words[1].group() not in tuple(Lane):
            found, column = (
                (repr(_short(words[1].group())), words[1].start()) if len(words) > 1 else ("nothing", len(content))
            )
            self.fail(number, column + 1, found, "> or < after 'lane'")
        lane = Lane(words[1].group())
        if lane in self.routes:
            self.fail(number, words[1].start() + 1, f"lane {lane} a second time", "each lane once")
        if len(words) == 2:
            self.fail(number, len(content) + 1, "no ranks", "the rank that holds stage 0, 1, 2, ...")
        self.routes[lane] = tuple(self.number(number, word) for word in words[2:])
        self.lane_lines[lane] = number, words[2:]

    def numbered_line(self, number: int, content: str, word: str) -> None:
        head = re.compile(rf"\s*{word}\s+([0-9]{{1,9}})\s*:").match(content)
        if head is None:
            self.bad_numbered_line(number, content, word)
        lines = self.rank_lines if word == "rank" else self.group_lines
        rank = int(head.group(1))
        if rank in lines:
            self.fail(number, head.start(1) + 1, f"{word} {rank} a second time", f"each {word} once")
        lines[rank] = number, list(re.compile(r"\S+").finditer(content, head.end()))

    def failure_line(self, number: int, content: str) -> None:
        found = re.fullmatch(r"\s*failure\s+([0-9]{1,9})\s*:\s*(\S.*?)\s*", content)
        if found is None:
            self.fail(number, 1, repr(_short(content.strip())), "a rank and what happened to it: 'failure N: TEXT'")
        what = found.group(2)
        if not what.isprintable():
            self.fail(number, found.start(2) + 1, repr(_short(what)), "printable text")
        self.failures.append((number, Failure(int(found.group(1)), what)))

    def bad_numbered_line(self, number: int, content: str, word: str) -> NoReturn:
        """Fail where the line of a rank or a group departs from its form: at the number or where a colon should be."""
        match = re.match(rf"\s*{word}\s*([0-9]{{1,9}}(?![0-9])\s*)?", content)
        at = match.end() if match else 0
        expected = f"':' after the {word}" if match and match.group(1) else f"a {word}'s number below 1000000000"
        self.fail(number, at + 1, repr(_short(content[at:].strip())) if content[at:].strip() else "nothing", expected)

    def program(self, number: int, words: list[re.Match[str]]) -> Program:
        return tuple(self.slot(number, word) for word in words)

    def slot(self, number: int, word: re.Match[str]) -> Slot:
        ops = tuple(self.op(number, column, text) for column, text in _parts(word))
        try:
            check_slot(ops, self.routes, len(self.groups))
        except ScheduleError:
            for op, (column, _) in zip(ops, _parts(word), strict=True):
                self.checked(number, column, check_slot, (op,), self.routes, len(self.groups))
            self.checked(number, word.start() + 1, check_slot, ops, self.routes, len(self.groups))
        return ops

    def op(self, number: int, column: int, text: str) -> Op:
        found = _OP.fullmatch(text)
        if found is None:
            self.fail(number, column, repr(_short(text)) if text else "nothing", _OP_FORM)
        return _op_of(found)

    def number(self, line: int, word: re.Match[str]) -> int:
        if not _NUMBER.fullmatch(word.group()):
            self.fail(line, word.start() + 1, repr(_short(word.group())), "a rank, as a number below 1000000000")
        return int(word.group())

    def checked(self, line: int, column: int, check: Callable[[*_Args], None], *args: *_Args) -> None:
        try:
            check(*args)
        except ScheduleError as error:
            self.fail(line, column, f"that {error.got}", f"that {error.rule} ({error.fix})")

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
