"""``dualpipe simulate``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dualpipe.cli.app import app, examples
from dualpipe.cli.options import Json, Microbatches, Named, One, Ranks, choose, find_schedule


@app.command(epilog=examples("dualpipe simulate -P 8 -M 32 --cost F=1,B=1,W=1", "dualpipe simulate mine.txt --json"))
def simulate(
    positional: One = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    cost: Annotated[
        str, typer.Option(help="F, B, W; BW: a full backward; FB: an overlapped pair; latency: of a message.")
    ] = "F=1,B=1,W=1",
    blocking: Annotated[
        bool, typer.Option("--blocking", help="A message slot waits until all its messages met.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a schedule on ideal ranks: makespan, bubble, peak activations and pending weight gradients."""
    from dualpipe.simulate import simulate as run
    from dualpipe.summary import parse_costs, summarise, tell

    value = find_schedule(choose(positional, schedule), ranks, microbatches)
    summary = summarise(run(value, parse_costs(cost), blocking=blocking))
    typer.echo(json.dumps(summary) if as_json else tell(summary))
