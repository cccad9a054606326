"""The processes of a recorded command: notice that they hang, and kill them all at the end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

MARK = "DUALPIPE_RECORDED_IN"
"""The environment variable that identifies the processes of a command, whatever their parent and session."""
_PATIENCE = 2.0  # seconds until killed processes are gone
_TAIL = 65536  # bytes; an event is shorter


class Watchdog:
    """Reads the last event of every rank.  ``stall`` is how many seconds all of them must have been waiting."""

    def __init__(self, folder: Path, stall: float) -> None:
        self._folder, self._stall = folder, stall
        self._sizes: dict[Path, int] = {}
        self._since = 0.0

    def hangs(self, now: float) -> bool:
        """Whether the program hangs at ``now``, in seconds of a monotonic clock.

        It does when no event has been written for ``stall`` seconds and every rank waits for a message or has ended.
        """
        sizes = {path: path.stat().st_size for path in self._folder.glob("*.events")}
        if sizes != self._sizes:
            self._sizes, self._since = sizes, now
        return bool(sizes) and now - self._since > self._stall and self._all_wait()

    def _all_wait(self) -> bool:
        """Whether all ranks have joined, none computes, and at least one waits."""
        ranks, last_events = 0, []
        for path in self._sizes:
            with path.open("rb") as file:
                ranks = max(ranks, json.loads(file.readline()).get("ranks", 0))
                file.seek(max(0, self._sizes[path] - _TAIL))
                last_events.append(json.loads(file.read().splitlines()[-1])["event"])
        waits = {"wait", "poll", "collect"}
        there = set(last_events)
        return len(last_events) >= ranks and bool(there & waits) and there <= {*waits, "end", "raised"}


def kill_marked(value: str) -> None:
    """Kill every process whose environment has ``MARK`` with this value, including those started meanwhile."""
    import psutil  # only a command is recorded with it; dualpipe.testing works where it is not installed

    deadline = time.monotonic() + _PATIENCE
    while found := list(marked(value)):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def marked(value: str) -> Iterator[psutil.Process]:
    """The running processes whose environment has ``MARK`` with this value."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                yield process
