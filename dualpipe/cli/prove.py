"""``dualpipe prove``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.cli.app import app
from dualpipe.cli.options import Json, Microbatches, Named, Ranks, find_schedule


@app.command()
def prove(
    files: Annotated[list[Path] | None, typer.Argument(help="Schedule files; or -P, -M and --schedule.")] = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    model: Annotated[
        str, typer.Option(help="How messages behave: all, blocking, eager, eager:CAPACITY or stream.")
    ] = "all",
    max_activations: Annotated[int | None, typer.Option(help="Bound of live activations for every rank.")] = None,
    bytes_for_b: Annotated[str | None, typer.Option(help="Per stage, bytes live from F to B: 8,8,8,9.")] = None,
    bytes_for_w: Annotated[str | None, typer.Option(help="Per stage, bytes live from B to W: 3,3,3,4.")] = None,
    smtlib: Annotated[Path | None, typer.Option(help="Write the obligations there, for another solver.")] = None,
    solver_timeout: Annotated[float | None, typer.Option(help="Seconds for Z3; then a check is unknown.")] = None,
    all_sizes: Annotated[bool, typer.Option("--all-sizes", help="Prove the theorems for every size instead.")] = False,
    optimal: Annotated[
        bool, typer.Option("--optimal", help="Instead, the least makespan within DualPipe's memory, for -P and -M.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with timelines and counterexamples there.")] = None,
    as_json: Json = False,
) -> None:
    """Prove schedules: complete, in order, messages matched, no deadlock, memory bounded, W in order.

    Exit code 0: proved.  1: refuted, with a story.  2: bad input.  3: a solver gave up.
    """
    from proofs import command

    if all_sizes:
        raise typer.Exit(command.prove_all_sizes(as_json))
    if optimal:
        size = 4 if ranks is None else ranks
        count = 2 * size if microbatches is None else microbatches
        raise typer.Exit(command.prove_optimal(size, count, solver_timeout, as_json))
    options = command.Options(model, max_activations, bytes_for_b, bytes_for_w, smtlib, solver_timeout, as_json)
    sources: list[command.Source]
    if files:
        sources = [(str(path), partial(find_schedule, str(path), ranks, microbatches)) for path in files]
    else:
        value = find_schedule(schedule, ranks, microbatches)
        sources = [(schedule, lambda: value)]
    if html is None:
        raise typer.Exit(command.prove_sources(sources, options))
    from dualpipe.cli.page import write_proofs

    outcomes: list[command.Outcome] = []
    code = command.prove_sources(sources, options, outcomes.append)
    write_proofs(html, outcomes)
    raise typer.Exit(code)
