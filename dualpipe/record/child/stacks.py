"""Leave the stack of this process in a file when the recorder asks for it, which it does before it stops a rank.

``faulthandler`` writes it in the signal handler itself, so that a process that is in C code leaves its stack, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.machinery
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from .log import LIBRARIES, OURS, PACKAGES

SIGNAL = signal.SIGURG
"""A process that does not answer it ignores it."""
_KEPT: list[Any] = []


def answer(folder: str) -> None:
    """Leave the stack of this process, or of one forked from it, in ``FOLDER/PID.stack`` at ``SIGNAL``.

    The first line of the file is an object that describes the process.
    """
    hidden = [OURS, *filter(None, map(_path_of, PACKAGES))]

    def begin() -> None:
        with contextlib.suppress(OSError):
            file = (Path(folder) / f"{os.getpid()}.stack").open("w")
            of_job = {name: int(os.environ.get(name, -1)) for name in ("RANK", "WORLD_SIZE")}
            head = {**of_job, "thread": threading.get_ident(), "time": time.time(), "hidden": hidden}
            file.write(json.dumps({**head, "libraries": LIBRARIES}) + "\n")
            file.flush()
            faulthandler.register(SIGNAL, file, all_threads=True)
            _KEPT[:] = [file]  # faulthandler writes to its descriptor

    begin()
    os.register_at_fork(after_in_child=begin)


def _path_of(package: str) -> str | None:
    """Where a package is, without its import."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent) if spec.submodule_search_locations else spec.origin
