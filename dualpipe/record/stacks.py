"""Where each rank of a command is that the recorder stops: its stack, which ``child.stacks`` leaves in a file."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dualpipe.record.child.log import CALLERS
from dualpipe.record.child.stacks import SIGNAL
from dualpipe.record.processes import marked

_PATIENCE = 2.0  # seconds until all processes have left their stacks
_POLL = 0.05
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)\b")
_LINE = re.compile(r'^  File "(.*)", line (\d+) in ')


def ask(folder: Path) -> None:
    """Let every running process of the command leave its stack.  It returns in time, whatever the processes do."""
    import psutil  # only a command is recorded with it

    before = {}
    for process in marked(str(folder)):
        file = folder / f"{process.pid}.stack"
        with contextlib.suppress(psutil.Error, OSError):
            before[file] = file.stat().st_size
            process.send_signal(SIGNAL)
    deadline = time.monotonic() + _PATIENCE
    last: dict[Path, int] = {}
    while before and time.monotonic() < deadline:
        sizes = {file: file.stat().st_size for file in before}
        if sizes == last and all(sizes[file] > before[file] for file in before):
            return
        last = sizes
        time.sleep(_POLL)


def note(folder: Path) -> None:
    """Write into the log of each rank, as its last event, the line of the program that its stack has.

    A rank that has no log yet, because it never joined a process group, gets one.
    """
    found = sorted(_stacks(folder), key=lambda stack: stack[1]["time"])
    logs = {int(path.name.partition("-")[0]): path for path in sorted(folder.glob("*.events"), key=_session)}
    joined = {_rank_of(path) for path in logs.values()}
    for process, head, place in found:
        path = logs.get(process)
        if path is None:
            if head["RANK"] in (-1, *joined) or head["WORLD_SIZE"] < 1:
                continue
            joined.add(head["RANK"])
            path = folder / f"{process}-0.events"
            path.write_text(json.dumps({"event": "rank", "rank": head["RANK"], "ranks": head["WORLD_SIZE"]}) + "\n")
        with path.open("a") as log:
            log.write("\n" + json.dumps({"event": "stopped", "at": place}) + "\n")


def _session(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _rank_of(path: Path) -> Any:
    with path.open() as file, contextlib.suppress(ValueError):
        return json.loads(file.readline()).get("rank")


def _stacks(folder: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The process, the head and the place of every stack with a line of the program."""
    for file in folder.glob("*.stack"):
        first, _, stack = file.read_text(errors="replace").partition("\n")
        with contextlib.suppress(ValueError):
            head = json.loads(first)
            if place := _place(stack.splitlines(), head):
                yield int(file.stem), head, place


def _place(stack: Sequence[str], head: dict[str, Any]) -> str:
    """The line of the program at which the main thread is, with its callers, or an empty text."""
    within, lines = False, []
    for text in stack:
        if thread := _THREAD.match(text):
            within = int(thread[1], 16) == head["thread"]
        elif within and (line := _LINE.match(text)) and _is_of_program(line[1], head):
            lines.append(f"{line[1]}:{line[2]}")
    innermost, callers = lines[:1], lines[1 : 1 + CALLERS]
    return "".join(innermost) + (f" (called at {', '.join(callers)})" if callers else "")


def _is_of_program(file: str, head: dict[str, Any]) -> bool:
    """As the recorder in the rank decides it, but by the file alone."""
    of_library = file.startswith(tuple(head["libraries"])) and "site-packages" not in file
    return not (of_library or file.startswith(("<", *head["hidden"])))
