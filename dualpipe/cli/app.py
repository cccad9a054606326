"""The application that every command registers itself with."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="DualPipe that can be trusted: print, simulate, prove and verify pipeline schedules.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
