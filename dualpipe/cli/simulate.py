"""``dualpipe simulate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.cli import options
from dualpipe.cli.app import app, examples
from dualpipe.cli.entrypoint import LIMIT_SECONDS
from dualpipe.cli.targets import TRACE, check_targets, target
from dualpipe.schedule.generate import LateW


@app.command(epilog=examples("dualpipe simulate -P 8 -M 32 --cost F=1,B=1,W=1", "dualpipe simulate mine.txt --json"))
def simulate(
    positional: options.ScheduleArgument = None,
    ranks: options.Ranks = None,
    microbatches: options.Microbatches = None,
    schedule: options.ScheduleOption = "dualpipe",
    late_w: options.LateWOption = LateW.none,
    cost: options.Cost = None,
    blocking: options.Blocking = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Also write a trace for ui.perfetto.dev, with one millisecond per unit of time."),
    ] = None,
    entry_timeout: options.EntryTimeout = LIMIT_SECONDS,
    as_json: options.Json = False,
) -> None:
    """Run a schedule on ideal ranks: makespan, bubble, peak activations and pending weight gradients."""
    from dualpipe.timeline.simulate import simulate as run
    from dualpipe.timeline.summary import describe, describe_collectives, parse_costs, summarise

    name = options.choose(positional, schedule, late_w)
    traces = target("--trace", trace, TRACE)
    check_targets(traces, [name])
    value = options.find_schedule(name, ranks, microbatches, entry_timeout)
    timeline = run(value, parse_costs(cost or ""), blocking=blocking)
    for each in traces:
        from dualpipe.timeline.perfetto import dumps, of_timeline

        each.write(dumps(of_timeline(timeline)))
    summary = summarise(timeline)
    note = describe_collectives(value, timeline.costs)
    typer.echo(json.dumps(summary) if as_json else describe(summary, note))
