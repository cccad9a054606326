"""The processes of a recorded command, all of which end with the recorder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil

MARK = "DUALPIPE_RECORDED_IN"
"""The variable by which the processes of a command are known, whoever is their parent and whatever their session."""
_PATIENCE = 2.0  # seconds until killed processes are gone


def end_marked(value: str) -> None:
    """Kill every process that has the mark with this value in its environment; those too that one of them starts."""
    last = time.monotonic() + _PATIENCE
    while found := list(_marked(value)):
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if time.monotonic() > last:
            return
        time.sleep(0.01)


def _marked(value: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                yield process
