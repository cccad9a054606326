"""How the commands of this package end."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ci.errors import GateError
from ci.process import raise_on_termination

BAD_INPUT = 2
FAULT = 70
"""The exit code of a fault of the command's own, which is no verdict; EX_SOFTWARE of sysexits.h."""
INTERRUPTED = 130
"""That of Ctrl-C, as shells have it."""
UNREAD = 141
"""That of an output whose reader has gone before its end, as shells have it for SIGPIPE."""


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """A parser of the arguments of ``python -m NAME``.

    ``about`` is the module's docstring: its first line begins with the command, the exit codes come after it.
    """
    first, _, rest = (about or "").partition("\n")
    does = first.partition(": ")[2]
    return argparse.ArgumentParser(
        prog=f"python -m {name}", description=does[:1].upper() + does[1:], epilog=" ".join(rest.split())
    )


def at_least_one(text: str) -> int:
    """The value of an option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {number}")
    return number


def run_as_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Call ``main`` with the arguments and end with its exit code; Python's own for an error would read as refused."""
    raise_on_termination()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # else Python says at its end that it could not write
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = UNREAD
    except (GateError, OSError) as error:
        print(error, file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        print(f"a fault of this command itself, and no verdict: {error}", file=sys.stderr)
        code = FAULT
    sys.exit(code)
