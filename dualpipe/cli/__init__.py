"""The command line.  The one place that may reach every package, and only when a command needs it.

One file a command; ``options`` has what they share.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from dualpipe.cli import prove, show, simulate, verify
from dualpipe.cli.app import app
from dualpipe.errors import RuleError, UndecidedError

__all__ = ["app", "main", "prove", "show", "simulate", "verify"]


def main() -> NoReturn:
    """The console script: bad input is one line on standard error and exit code 2."""
    try:
        app()
    except (RuleError, OSError) as error:
        typer.echo(f"dualpipe: {error}", err=True)
        sys.exit(2)
    except UndecidedError as error:
        typer.echo(f"dualpipe: {error}", err=True)
        sys.exit(3)
    sys.exit(0)
