"""``dualpipe show``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.cli import options
from dualpipe.cli.app import app, examples
from dualpipe.cli.entrypoint import LIMIT_SECONDS
from dualpipe.cli.targets import PNG, SVG, Target, check_targets, target
from dualpipe.errors import RuleError
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import LateW
from dualpipe.schedule.shapes import with_shape_exchange
from dualpipe.schedule.text import as_json as schedule_as_json
from dualpipe.schedule.text import dumps
from dualpipe.schedule.torch_table import dumps_csv


@app.command(
    epilog=examples(
        "dualpipe show -P 4 -M 8",
        "dualpipe show zb1p -P 3 -M 6 --timeline",
        "dualpipe show table.csv",
        "dualpipe show dualpipev --csv",
        "dualpipe show -P 8 -M 16 --exchange-shapes > mine.txt",
    )
)
def show(
    positional: options.ScheduleArgument = None,
    ranks: options.Ranks = None,
    microbatches: options.Microbatches = None,
    schedule: options.ScheduleOption = "dualpipe",
    late_w: options.LateWOption = LateW.none,
    exchange_shapes: Annotated[
        bool,
        typer.Option(
            "--exchange-shapes", help="Exchange shapes before activations, as for sequences of different lengths."
        ),
    ] = False,
    timeline: Annotated[
        bool,
        typer.Option("--timeline", help="Draw a timeline instead, with one line per rank."),
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the timeline to this file instead.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the same picture as PNG.")] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print a table of torch.distributed.pipelining (compute_comms) instead.")
    ] = False,
    compute_only: Annotated[
        bool, typer.Option("--compute-only", help="With --csv: only computes, to which torch adds messages itself.")
    ] = False,
    cost: options.Cost = None,
    entry_timeout: options.EntryTimeout = LIMIT_SECONDS,
    as_json: options.Json = False,
) -> None:
    """Print a schedule in the text form that every other command reads, or draw its timeline."""
    name = options.choose(positional, schedule, late_w)
    pictures = [*target("--svg", svg, SVG), *target("--png", png, PNG)]
    check_targets(pictures, [name])
    value = options.find_schedule(name, ranks, microbatches, entry_timeout)
    if exchange_shapes:
        value = with_shape_exchange(value)
    if compute_only and not csv:
        raise RuleError("--compute-only is for --csv", "got --compute-only alone", "add --csv")
    if csv:
        given = {"--timeline": timeline, "--svg": svg, "--png": png, "--json": as_json, "--cost": cost}
        if clash := [option for option, value in given.items() if value]:
            raise RuleError(f"--csv cannot be combined with {', '.join(clash)}", "got both", "leave one of them out")
        sys.stdout.write(dumps_csv(value, compute_only))
        return
    if timeline or pictures:
        if as_json:
            raise RuleError("--json cannot be combined with a drawing", "got both", "leave one of them out")
        _draw(value, timeline, pictures, cost)
        return
    if cost is not None:
        raise RuleError(
            "--cost is for a drawing", f"got --cost {cost} alone", "add --timeline, --svg FILE or --png FILE"
        )
    sys.stdout.write(json.dumps(schedule_as_json(value)) + "\n" if as_json else dumps(value))


def _draw(schedule: Schedule, timeline: bool, pictures: list[Target], cost: str | None) -> None:
    from dualpipe.timeline.simulate import simulate
    from dualpipe.timeline.summary import describe_collectives, parse_costs

    times = simulate(schedule, parse_costs(cost or ""))
    if note := describe_collectives(schedule, times.costs):
        typer.echo(f"dualpipe: the drawing leaves a gap where a rank waits for a collective; {note}", err=True)
    if timeline:
        from rich.console import Console

        from dualpipe.timeline.terminal import lines

        console = Console(highlight=False)
        for line in lines(times, console.width):
            console.print(line, soft_wrap=True)
    if pictures:
        from dualpipe.timeline.picture import draw, render

        figure = draw(times)
        for picture in pictures:
            picture.write(render(figure, "svg" if picture.form is SVG else "png"))
