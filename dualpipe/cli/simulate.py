"""``dualpipe simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.cli.app import app, examples
from dualpipe.cli.options import Cost, Json, Microbatches, Named, One, Ranks, choose, find_schedule, writable


@app.command(epilog=examples("dualpipe simulate -P 8 -M 32 --cost F=1,B=1,W=1", "dualpipe simulate mine.txt --json"))
def simulate(
    positional: One = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    cost: Cost = None,
    blocking: Annotated[
        bool, typer.Option("--blocking", help="A message slot waits until all its messages met.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Also write a trace for ui.perfetto.dev; a unit of time is a millisecond.", callback=writable
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a schedule on ideal ranks: makespan, bubble, peak activations and pending weight gradients."""
    from dualpipe.simulate import simulate as run
    from dualpipe.summary import parse_costs, summarise, tell

    value = find_schedule(choose(positional, schedule), ranks, microbatches)
    timeline = run(value, parse_costs(cost or ""), blocking=blocking)
    if trace is not None:
        from dualpipe.perfetto import of_timeline, write

        write(of_timeline(timeline), trace)
    summary = summarise(timeline)
    typer.echo(json.dumps(summary) if as_json else tell(summary))
