"""The command line.  Only this package may import every other one, and it does so only when a command needs it.

Each command has a file; ``options`` has the options that several share.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase, TextIOWrapper
from typing import NoReturn

import typer

from dualpipe._imports import OwnFirst
from dualpipe.cli import compare, prove, record, show, simulate, verify
from dualpipe.cli.app import app
from dualpipe.cli.interrupt import leave, leaving_on_sigterm
from dualpipe.errors import RuleError, UndecidedError

FAULT = 70
"""The exit code of an internal error, which is not a verdict; EX_SOFTWARE of sysexits.h."""

UNREAD = 141
"""The exit code if the reader of the output is gone before its end; shells use it for SIGPIPE."""

__all__ = ["app", "compare", "main", "prove", "record", "show", "simulate", "verify"]


def main() -> NoReturn:
    """The console script.

    Bad input gives one line on standard error and exit code 2; with ``--json`` also an object on standard output.
    Ctrl-C gives 130, SIGTERM 143, and an output whose reader is gone 141, all without a message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # File names may contain any bytes, and a terminal may support little of Unicode.
            stream.reconfigure(errors="backslashreplace")
    with _written_whole():
        _run()


@contextmanager
def _written_whole() -> Iterator[None]:
    """Buffer standard output by line, even under ``python -u`` and ``PYTHONUNBUFFERED``.

    Without a buffer Python makes one system call for each text and silently drops what the call does not write, as
    when the reader leaves in the middle of the output or the disk is full.
    """
    before = sys.stdout
    if not isinstance(before, TextIOWrapper) or not isinstance(before.buffer, RawIOBase):
        yield
        return
    before.flush()
    buffered = open(before.fileno(), "w", 1, before.encoding, before.errors, closefd=False)  # noqa: SIM115 # closed below
    sys.stdout = buffered
    try:
        yield
    finally:
        sys.stdout = before
        with suppress(OSError):  # what is left in it could not be written, which the exit code shows
            buffered.close()


def _run() -> NoReturn:
    """Run the command and exit with its exit code."""
    try:
        if sys.stdout is None:  # output would be lost without an error
            raise RuleError("standard output must be open", "it is closed", "send it to /dev/null if nobody reads it")
        with OwnFirst(), leaving_on_sigterm():
            app(prog_name="dualpipe")
    except (RuleError, OSError) as error:
        _print_error(_of_output(error) if isinstance(error, OSError) else error, "bad input")
        leave(2)
    except UndecidedError as error:
        _print_error(error, "unknown")
        leave(3)
    except KeyboardInterrupt:  # outside of any command
        leave(130)
    except SystemExit as end:
        unread = isinstance(end.__context__, BrokenPipeError)  # typer would exit with 1, which means refuted
        leave(UNREAD if unread else _flushed(int(end.code or 0)))
    except Exception as error:
        traceback.print_exc()
        _print_error(error, "fault", "internal error (not a verdict): ")
        leave(FAULT)
    leave(_flushed(0))


def _flushed(code: int) -> int:
    """Flush the output of a command that has ended; ``code``, or 2 if the output cannot be written, or ``UNREAD``."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return UNREAD
    except OSError as error:
        _discard_output()
        _print_error(_of_output(error), "bad input")
        return 2
    return code


def _of_output(error: OSError) -> OSError | RuleError:
    """The error for a standard output that cannot be written; any other error names its file."""
    if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return error
    return RuleError("standard output must be writable", f"{error.strerror}", "make room, or send it somewhere else")


def _discard_output() -> None:
    """Redirect standard output, since Python would flush it again at exit and replace the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_error(error: Exception, verdict: str, prefix: str = "") -> None:
    with suppress(OSError):
        typer.echo(f"dualpipe: {prefix}{error}", err=True)
    own = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if "--json" in own and sys.stdout is not None:
        try:
            typer.echo(json.dumps({"verdict": verdict, "error": str(error)}))
        except BrokenPipeError:
            raise
        except OSError:  # there is no room for the object either
            _discard_output()
