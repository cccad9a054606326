"""Z3 in a process of its own: its answer, or the reason why there is none.

However that process fails (out of memory, out of time, a crash, a kill), the result is an ``Unknown`` with the reason.
The process starts at the first question and answers the later ones too.  It ends with the process that asks, even if
that one is killed, since it reads from a pipe that then closes.  ``Solver`` decides the checks of one schedule;
``proofs.isolated`` has the process for theorems and the least makespan.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

from proofs.verdict import Unknown

CHILD = Path(__file__).with_name("z3child.py")
SECONDS = 120.0
"""The default time limit of a question."""
GRACE_SECONDS = 10.0
"""Seconds after its time limit at which the process is killed: Z3 does not watch the limit while it reads facts."""
MEMORY_BYTES = min(6 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
"""The address space of the process: 6 GiB, or half of the machine's memory if that is less."""
_START_SECONDS = 60.0
_OUT_OF_MEMORY = 101
"""Z3 ends its process with this exit code if it runs out of memory."""
_NO_MEMORY = ("MemoryError", "can't start new thread")
"""Parts of the last line that a Python process writes when it runs out of memory."""


class Child:
    """A process that runs the file ``child`` with Z3 and answers each question with a line; it starts when needed.

    ``memory_bytes`` limits its address space.
    """

    def __init__(self, child: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self.child, self.memory_bytes = child, memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the process unless it runs; it loads Z3 while the caller goes on."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        # -I: no folder of the user is searched before the standard library and installed packages, which include Z3
        command = [sys.executable, "-I", str(self.child), str(self.memory_bytes), json.dumps(sys.path)]
        self._process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._owner = os.getpid()
        self._buffer, self._ready = b"", False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner == os.getpid():
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def exchange(self, question: bytes, limit: float) -> dict[str, Any] | Unknown:
        """The reply; ``Unknown`` if Z3 gives up, or there is no reply ``GRACE_SECONDS`` after ``limit`` seconds."""
        with self._lock:
            try:
                self.start()
                return self._exchange(question, limit)
            except BaseException:
                self.close()
                raise

    def _exchange(self, question: bytes, limit: float) -> dict[str, Any] | Unknown:
        if not self._ready and self._line(_START_SECONDS) != b"ready":
            return self._lost(_START_SECONDS)
        self._ready = True
        deadline = time.monotonic() + limit + GRACE_SECONDS
        if not self._send(question, deadline) or (line := self._line(deadline - time.monotonic())) is None:
            return self._lost(limit)
        reply: dict[str, Any] = json.loads(line)
        return Unknown(self._why(reply["unknown"], limit)) if "unknown" in reply else reply

    def _send(self, data: bytes, deadline: float) -> bool:
        """Write all of the data; ``False`` if the process stops reading."""
        assert self._process is not None
        assert self._process.stdin is not None
        pipe, rest = self._process.stdin.fileno(), memoryview(data)
        os.set_blocking(pipe, False)
        while rest:
            if not select.select([], [pipe], [], max(0.0, deadline - time.monotonic()))[1]:
                return False
            try:
                rest = rest[os.write(pipe, rest) :]
            except BrokenPipeError:
                return False
        return True

    def _line(self, seconds: float) -> bytes | None:
        """The next line from the process; ``None`` if it ends or time runs out first."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(pipe, 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _lost(self, limit: float) -> Unknown:
        """The reason why the process gave no answer; the next question gets a new process."""
        assert self._process is not None
        assert self._errors is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.close()
            return Unknown(self._why("timeout", limit))
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        self.close()
        if code == _OUT_OF_MEMORY or any(words in last for words in _NO_MEMORY):
            return Unknown(self._why("out of memory", limit))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Unknown(f"Z3 gave up: its process {how}{last and f' ({last})'}")

    def _why(self, reason: str, limit: float) -> str:
        if reason in ("timeout", "canceled"):
            return f"Z3 gave up: no answer within {limit:g} s"
        if "memory" in reason:
            return f"Z3 gave up: it needs more than {self.memory_bytes / 2**30:.1f} GiB of memory"
        return f"Z3 gave up: {reason}"


class Solver(Child):
    """The process that decides difference logic."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, child: Path = CHILD) -> None:
        super().__init__(child, memory_bytes)

    def ask(self, facts: Iterable[tuple[int, int, int]], timeout_s: float | None = None) -> list[int] | Unknown | None:
        """``None`` if all facts ``(earlier, later, gap)`` can hold, else the numbers of contradictory facts.

        ``timeout_s`` is the number of seconds for the whole question, ``SECONDS`` if not given.
        """
        limit = SECONDS if timeout_s is None else timeout_s
        numbers = array("q", (0, max(1, min(int(1000 * limit), 1 << 40))))
        for fact in facts:
            numbers.extend(fact)
        numbers[0] = len(numbers) // 3
        reply = self.exchange(numbers.tobytes(), limit)
        if isinstance(reply, Unknown):
            return reply
        return None if reply.get("holds") else [int(number) for number in reply["core"]]


SHARED = Solver()
"""The solver of this process for all questions that name no other."""
atexit.register(SHARED.close)
