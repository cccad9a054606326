"""Arguments and exit codes of the commands of this package."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ci import GateError
from ci.process import raise_on_termination

BAD_INPUT = 2
INTERNAL_ERROR = 70
"""The exit code of an internal error, which is not a verdict; EX_SOFTWARE of sysexits.h."""
INTERRUPTED = 130
"""The exit code after Ctrl-C, as in a shell."""
UNREAD = 141
"""The exit code after the reader of the output is gone, as in a shell for SIGPIPE."""


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """A parser of the arguments of ``python -m NAME``.

    ``about`` is the module's docstring: its first line begins with the command, the exit codes follow.
    """
    first, _, rest = (about or "").partition("\n")
    does = first.partition(": ")[2]
    return argparse.ArgumentParser(
        prog=f"python -m {name}", description=does[:1].upper() + does[1:], epilog=" ".join(rest.split())
    )


def at_least_one(text: str) -> int:
    """Convert the value of an option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {number}")
    return number


def run_as_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Call ``main`` with the arguments and exit with its code.

    Errors get codes of their own: with Python's exit code of 1 they would read as refused.
    """
    raise_on_termination()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # otherwise Python reports at exit that it could not write
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = UNREAD
    except (GateError, OSError) as error:
        print(error, file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(f"internal error (not a verdict): {error}", file=sys.stderr)
        code = INTERNAL_ERROR
    sys.exit(code)
