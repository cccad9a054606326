"""The Typer application; each command registers itself with it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def examples(*commands: str) -> str:
    """The examples at the end of a command's help, one command per line."""
    return "\n".join(["Examples:", *(f"[cyan]$ {command}[/cyan]" for command in commands)])


def _show_version(asked: bool) -> None:
    if asked:
        try:
            installed = version("dualpipe-harness")
        except PackageNotFoundError:  # run from the sources, without an installation
            installed = "(not installed)"
        typer.echo(f"dualpipe {installed}")
        raise typer.Exit


@app.callback(epilog=examples("dualpipe show -P 4 -M 8", "dualpipe prove my_schedule.txt", "dualpipe verify -P 4 -M 8"))
def dualpipe(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Print, simulate, compare, prove, verify and record pipeline schedules.

    A SCHEDULE is one of these:
    - dualpipe, dualpipev, 1f1b, zb1p, interleaved or zbv, made for -P ranks and -M microbatches;
      dualpipe and dualpipev also with late W: dualpipe-late-tail, dualpipe-late-all and so on
    - a schedule file, in the format that show prints
    - a table of torch.distributed.pipelining (.csv)
    - module:function, a Python function that returns a Schedule or its text

    Exit codes of every command:
    2: bad input
    70: an internal error; this is not a verdict
    130: ended by Ctrl-C
    141: the reader of the output closed it early
    143: ended by SIGTERM
    With --json, an error is also printed as a JSON object, unless a command or option is misspelt.
    """
