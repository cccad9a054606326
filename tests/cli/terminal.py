"""Runs the command line as a process, on a terminal, piped or forked from this one, and interrupts it."""

import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

from dualpipe.cli import main

COMMAND = [sys.executable, "-m", "dualpipe"]
WAIT = 60.0


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    seconds: float
    """Since the interrupt, if there was one."""


def on_a_terminal(*arguments: object, interrupt_at: str | None = None, stdout=None, **environment: str) -> Ended:
    """Run on a terminal of 100 columns, to which standard output goes as well unless ``stdout`` is given.

    Ctrl-C is typed once the text ``interrupt_at`` appears.
    """
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        env=quiet() | {"TERM": "xterm-256color", "COLUMNS": "100", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        out, begun, typed = b"", time.monotonic(), False
        while time.monotonic() - begun < WAIT:
            if not select.select([ours], [], [], 0.05)[0]:
                if child.poll() is not None:
                    break
                continue
            try:
                got = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not got:
                break
            out += got
            if interrupt_at is not None and not typed and interrupt_at.encode() in out:
                typed, begun = True, time.monotonic()
                os.killpg(child.pid, signal.SIGINT)
        code = child.wait(timeout=10)
        return Ended(code, out.decode(), time.monotonic() - begun)
    finally:
        end(child)
        os.close(ours)


def interrupted(*arguments: object, when, group: bool = True, by: signal.Signals = signal.SIGINT, **more) -> Ended:
    """Run piped, and interrupt once ``when(pid)`` is true: the whole group as a terminal does, or the parent alone.

    ``more`` is added to the environment.
    """
    child = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=quiet() | more,
        start_new_session=True,
    )
    try:
        _wait(lambda: when(child.pid), lambda: child.poll() is None)
        begun = time.monotonic()
        (os.killpg if group else os.kill)(child.pid, by)
        out = child.communicate(timeout=WAIT)[0]
        return Ended(child.returncode, out, time.monotonic() - begun)
    finally:
        end(child)


def terminated(*arguments: object, when, output: Path, **more: str) -> Ended:
    """Run in a process forked from this one, which has imported torch, and send it SIGTERM once ``when(pid)`` is true.

    It prints to the file ``output``; ``more`` is added to the environment.
    """
    child = get_context("fork").Process(target=_run, args=(list(map(str, arguments)), output, more))
    child.start()
    try:
        _wait(lambda: when(child.pid), child.is_alive)
        begun = time.monotonic()
        child.terminate()
        child.join(WAIT)
        return Ended(child.exitcode, output.read_text(), time.monotonic() - begun)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def _run(arguments: list[str], output: Path, more: dict[str, str]) -> NoReturn:
    os.setsid()
    sys.stdout = sys.stderr = output.open("w")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    os.environ |= more
    tempfile.tempdir = None  # it is read from the environment again
    sys.argv = ["dualpipe", *arguments]
    main()


def _wait(holds, runs) -> None:
    begun = time.monotonic()
    while not holds():
        assert runs(), "it ended before it could be interrupted"
        assert time.monotonic() - begun < WAIT, "the condition did not become true"
        time.sleep(0.02)


def members(session: int) -> list[int]:
    """The living processes of a session, read from /proc; zombies do not count."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, _, _, of = file.read().rpartition(")")[2].split()[:4]
            except OSError:  # it ended meanwhile
                continue
            if int(of) == session and state != "Z":
                found.append(int(name))
    return found


def cpu_seconds(session: int) -> float:
    """The processor time of the living processes of a session, in seconds."""
    ticks = 0
    for pid in members(session):
        with suppress(OSError), open(f"/proc/{pid}/stat") as file:  # it may end meanwhile
            fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def quiet() -> dict[str, str]:
    """This process's environment without what forces colours on or off."""
    forcing = {"NO_COLOR", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH"}
    return {name: value for name, value in os.environ.items() if name not in forcing}


def end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.stdout is not None:
        child.stdout.close()
