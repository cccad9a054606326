"""The application with which every command registers itself."""

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
        except PackageNotFoundError:  # run from its sources
            installed = "(not installed)"
        typer.echo(f"dualpipe {installed}")
        raise typer.Exit


@app.callback(epilog=examples("dualpipe show -P 4 -M 8", "dualpipe prove my_schedule.txt", "dualpipe verify -P 4 -M 8"))
def dualpipe(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Print, simulate, prove, verify and record pipeline schedules.

    A SCHEDULE is one of these:
    - dualpipe, dualpipev, 1f1b or zb1p, made for -P ranks and -M microbatches
    - a schedule file, in the format that show prints
    - a compute-only table of torch.distributed.pipelining (.csv)
    - module:function, a Python function that returns a Schedule or its text

    Every command exits with 2 for bad input, 70 for an internal error, which is no verdict, 130 for Ctrl-C, 143 for
    SIGTERM and 141 if nobody reads its output to the end. With --json an error is also printed as a JSON object,
    except for a misspelt command or option.
    """
