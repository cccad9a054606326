"""Reads and writes whole files: a write is atomic, and every wait has a timeout."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import select
import stat
import time
from pathlib import Path

from dualpipe.errors import RuleError

_READER_SECONDS = 10.0
"""How long to wait until a reader opens a FIFO."""
_FIFO_POLL = 0.02
MOST_BYTES = 256 << 20
"""The largest file that is read."""
SILENT_SECONDS = 30.0
"""How long to wait for the next byte of a pipe or terminal."""


def read_whole(path: Path) -> bytes:
    """The content of a file, which may be a pipe or ``/dev/stdin``.

    Raises
    ------
    RuleError
        For a file of more than ``MOST_BYTES``, one that changes while it is read, and a pipe or terminal that
        neither ends nor gives a byte within ``SILENT_SECONDS``.
    OSError
        If it cannot be read.
    """
    before = os.stat(path)
    if stat.S_ISREG(before.st_mode) or stat.S_ISDIR(before.st_mode):
        _require_size(path, before.st_size)
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            data = file.read(MOST_BYTES + 1)
            after = os.fstat(file.fileno())
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            raise RuleError("a file must not change while it is read", f"{path} changed", "run the command again")
    else:
        data = _read_stream(path)
    _require_size(path, len(data))
    return data


def _require_size(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise RuleError(f"a file may have at most {MOST_BYTES >> 20} MiB", f"{path} has more", "name a schedule file")


def _read_stream(path: Path) -> bytes:
    data = bytearray()
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while len(data) <= MOST_BYTES:
            if not ready.poll(SILENT_SECONDS * 1000):
                silence = f"{path} gave nothing for {SILENT_SECONDS:g} s"
                raise RuleError("input must not pause for long", silence, "close the writing side")
            with contextlib.suppress(BlockingIOError):
                got = os.read(descriptor, 1 << 20)
                if not got:
                    break
                data += got
    finally:
        os.close(descriptor)
    return bytes(data)


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to a new file in the same folder, and rename that to ``path``.

    So a reader sees the old file or the new one, and after an error the old one is still there.  If two processes write
    at once, the later one wins.  A symbolic link is kept and its target replaced.  A replaced file keeps its
    permissions.  A terminal, a pipe or ``/dev/stdout`` is not a regular file, and is written to directly.

    Raises
    ------
    OSError
        If it cannot be written; ``TimeoutError`` for a FIFO without a reader.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode) or _is_descriptor(path):
            _write_directly(path, data)
            return
    final = Path(os.path.realpath(path))
    part = final.with_name(
        f".{secrets.token_hex(8)}.part"
    )  # not derived from the file's name, which may already have the maximum length
    try:
        with open(part, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(final).st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _is_descriptor(path: Path) -> bool:
    """Whether the path may be an open file of this process, such as ``/dev/stdout`` redirected to a file."""
    return str(path).startswith(("/dev/", "/proc/"))


def _write_directly(path: Path, data: bytes) -> None:
    descriptor = _open(path)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    ends = time.monotonic() + _READER_SECONDS
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > ends:
                raise TimeoutError(f"{path}: nobody reads it") from None
        time.sleep(_FIFO_POLL)
