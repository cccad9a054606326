"""The command line.  The one place that may reach every package, and only when a command needs it.

One file a command; ``options`` has what they share.
"""

from __future__ import annotations

from typing import NoReturn

import typer

from dualpipe.cli import prove, record, show, simulate, verify
from dualpipe.cli.app import app
from dualpipe.cli.interrupt import leave
from dualpipe.errors import RuleError, UndecidedError

__all__ = ["app", "main", "prove", "record", "show", "simulate", "verify"]


def main() -> NoReturn:
    """The console script: bad input is one line on standard error and exit code 2; Ctrl-C is 130, without a word."""
    try:
        app(prog_name="dualpipe")
    except (RuleError, OSError) as error:
        _complain(error)
        leave(2)
    except UndecidedError as error:
        _complain(error)
        leave(3)
    except KeyboardInterrupt:  # outside of any command
        leave(130)
    except SystemExit as end:
        leave(int(end.code or 0))
    leave(0)


def _complain(error: Exception) -> None:
    typer.echo(f"dualpipe: {error}", err=True)
