"""Sees that a recorded program hangs: nothing is written any more, and every rank waits for a message or has ended."""

from __future__ import annotations

import json
from pathlib import Path

_TAIL = 65536  # bytes; an event is shorter


class Watchdog:
    """Looks at the events of all ranks; ``stall`` is how many seconds all of them have to wait."""

    def __init__(self, folder: Path, stall: float) -> None:
        self._folder, self._stall = folder, stall
        self._sizes: dict[Path, int] = {}
        self._since = 0.0

    def hangs(self, now: float) -> bool:
        """Whether the program hangs at this time, in seconds of a clock that does not go back."""
        sizes = {path: path.stat().st_size for path in self._folder.glob("*.events")}
        if sizes != self._sizes:
            self._sizes, self._since = sizes, now
        return bool(sizes) and now - self._since > self._stall and self._all_wait()

    def _all_wait(self) -> bool:
        """Whether all ranks that there are have joined, none computes, and one waits."""
        ranks, ends = 0, []
        for path in self._sizes:
            with path.open("rb") as file:
                ranks = max(ranks, json.loads(file.readline()).get("ranks", 0))
                file.seek(max(0, self._sizes[path] - _TAIL))
                ends.append(json.loads(file.read().splitlines()[-1])["event"])
        return len(ends) >= ranks and "wait" in ends and set(ends) <= {"wait", "end"}
