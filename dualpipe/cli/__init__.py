"""The command line.  The one place that may reach every package, and only when a command needs it.

One file a command; ``options`` has what they share.
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
from dualpipe.cli import prove, record, show, simulate, verify
from dualpipe.cli.app import app
from dualpipe.cli.interrupt import leave, leaving_on_sigterm
from dualpipe.errors import RuleError, UndecidedError

FAULT = 70
"""The exit code of a fault of this program's own, which is no verdict; EX_SOFTWARE of sysexits.h."""

UNREAD = 141
"""That of an output whose reader has gone before its end, as shells have it for SIGPIPE."""

__all__ = ["app", "main", "prove", "record", "show", "simulate", "verify"]


def main() -> NoReturn:
    """The console script: bad input is one line on standard error and exit code 2; Ctrl-C is 130, SIGTERM 143
    and a reader that has gone 141, without a word.

    With ``--json`` the line is an object on standard output as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # names of files may hold any bytes, terminals little of Unicode
    with _written_whole():
        _run()


@contextmanager
def _written_whole() -> Iterator[None]:
    """While inside, standard output is buffered by line, also under ``python -u`` and ``PYTHONUNBUFFERED``.

    Without a buffer Python makes one system call for each text and drops, without an error, what the call does not
    take: the rest of an output whose reader leaves in the middle of it or whose disk is full.
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
        with suppress(OSError):  # nothing is left in it but what could not be written, which the exit code shows
            buffered.close()


def _run() -> NoReturn:
    """Run the command and leave with its exit code."""
    try:
        if sys.stdout is None:  # what is printed would go nowhere, without an error
            raise RuleError("standard output is open", "it is closed", "send it to /dev/null if nobody reads it")
        with OwnFirst(), leaving_on_sigterm():
            app(prog_name="dualpipe")
    except (RuleError, OSError) as error:
        _complain(_of_output(error) if isinstance(error, OSError) else error, "bad input")
        leave(2)
    except UndecidedError as error:
        _complain(error, "unknown")
        leave(3)
    except KeyboardInterrupt:  # outside of any command
        leave(130)
    except SystemExit as end:
        unread = isinstance(end.__context__, BrokenPipeError)  # typer ends with 1 then, which is a verdict
        leave(UNREAD if unread else _printed(int(end.code or 0)))
    except Exception as error:
        traceback.print_exc()
        _complain(error, "fault", "a fault of dualpipe itself, and no verdict: ")
        leave(FAULT)
    leave(_printed(0))


def _printed(code: int) -> int:
    """The exit code of a command that has ended; 2 where what it printed could not be written, for it is no verdict."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return UNREAD
    except OSError as error:
        _discard_output()
        _complain(_of_output(error), "bad input")
        return 2
    return code


def _of_output(error: OSError) -> OSError | RuleError:
    """The complaint for a standard output that cannot be written; any other error names its file."""
    if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return error
    return RuleError("standard output can be written", f"{error.strerror}", "make room, or send it somewhere else")


def _discard_output() -> None:
    """Else Python would try again at its end and replace the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _complain(error: Exception, verdict: str, prefix: str = "") -> None:
    with suppress(OSError):
        typer.echo(f"dualpipe: {prefix}{error}", err=True)
    own = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    if "--json" in own and sys.stdout is not None:
        try:
            typer.echo(json.dumps({"verdict": verdict, "error": str(error)}))
        except BrokenPipeError:
            raise
        except OSError:  # there is no room for it
            _discard_output()
