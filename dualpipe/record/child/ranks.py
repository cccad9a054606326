"""Start the ranks of ``python script.py`` by forking, so that torch is imported once instead of once in each rank.

    python ranks.py FOLDER RANKS script.py ARGUMENTS ...
    python ranks.py FOLDER RANKS -m module ARGUMENTS ...

``FOLDER/ended-N`` gets the exit code of rank N.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

IMPORTED_LATE = ("torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.profiler")
"""What torch imports at the first backward and the first optimizer: seconds, which a fork after the import saves."""
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def die_with_parent() -> None:
    """On Linux, kill this process when its parent ends, however it ends; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    folder, ranks, *words = sys.argv[1:]
    sys.path[0] = ""  # in place of this folder, whose modules the program must not find
    for name in ("torch", "torch.distributed", *IMPORTED_LATE):
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    running: dict[int, int] = {}
    for rank in range(int(ranks)):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = os.fork()
        if process == 0:
            _rank(words)
        running[process] = rank
    while running:
        process, status = os.wait()
        rank = running.pop(process)
        kept = Path(folder) / f"ended-{rank}"
        kept.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
        kept.with_suffix(".part").rename(kept)


def _rank(words: list[str]) -> NoReturn:
    die_with_parent()
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.last_value = error  # as the interpreter sets it
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
