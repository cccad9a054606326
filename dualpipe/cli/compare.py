"""``dualpipe compare``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualpipe.cli.app import app, examples
from dualpipe.cli.entrypoint import LIMIT_SECONDS
from dualpipe.cli.options import (
    Blocking,
    Cost,
    EntryTimeout,
    Json,
    Microbatches,
    Ranks,
    ScheduleArguments,
    Waive,
    find_schedules,
)
from dualpipe.cli.progress import progress_bar
from dualpipe.cli.targets import HTML, PNG, SVG, check_targets, target
from dualpipe.errors import RuleError
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import NAMES, LateW, SizeError, generate, with_late_w

if TYPE_CHECKING:
    from dualpipe.timeline.comparison import Absent, Candidate, Ranking
    from dualpipe.timeline.timeline import Costs

MOST_RANKS, MOST_TASKS = 1024, 65_536
"""The most ranks, and the most ranks times microbatches; ten schedules of that size take minutes."""


@app.command(
    epilog=examples(
        "dualpipe compare -P 8 -M 32",
        "dualpipe compare -P 8 -M 32 --cost F=1,B=1.1,W=0.8 --latency 0.3 --overlap 0.9 --png compare.png",
        "dualpipe compare zbv dualpipe-late-tail mine.txt",
        "dualpipe compare -P 8 -M 32 --cost-from trace.json --max-activations 8",
    )
)
def compare(
    schedules: ScheduleArguments = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    cost: Cost = None,
    cost_from: Annotated[
        list[Path] | None,
        typer.Option(
            help="Take the costs, in seconds, from a trace that `dualpipe verify --trace` measured, or from the "
            "torch.profiler traces of all ranks of a program under `dualpipe record`: files, or a folder of them."
        ),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Time of a message from when it is sent, as latency= in --cost.")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="What an F&B pair takes, relative to F, B and W one after the other, as in 0.85."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            help="Bytes that a microbatch keeps from F to B and from B to W, and those of the weights; see below.",
            metavar="B=NUMBER,W=NUMBER[,weights=NUMBER]",
        ),
    ] = None,
    max_activations: Annotated[
        float | None, typer.Option(help="Live microbatches that a rank may hold; see below for their size.")
    ] = None,
    max_bytes: Annotated[
        float | None, typer.Option(help="Bytes that a rank may hold, activations and weights together.")
    ] = None,
    blocking: Blocking = False,
    waive: Waive = None,
    late_w: Annotated[
        str | None,
        typer.Option("--late-w", help="Not for this command: name a schedule with late W, such as dualpipe-late-tail."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Also write a picture: timelines and memory on one axis.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the same picture as PNG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the table and the timelines.")] = None,
    entry_timeout: EntryTimeout = LIMIT_SECONDS,
    as_json: Json = False,
) -> None:
    """Simulate schedules side by side, and name the best one under given costs and memory.

    All named schedules are compared, or those among the arguments; files and functions come in addition.
    DualPipe and DualPipeV with late W are schedules of their own, such as dualpipe-late-tail and dualpipev-late-all.
    A file or function that plain search refutes, as in `dualpipe prove`, is listed with the reason and never best.

    Costs and bytes are those of a rank's share of the model, 1/P of its layers.
    A V or an interleaved schedule has 2P stages, each half a share; DualPipe has P whole ones.
    So activations, pending W and parameters are counted in shares: DualPipe's rank holds 2 of parameters, others 1.

    Exit codes:
    0: a best schedule is named
    1: there is none: each is refuted, cannot have the size, or does not fit the memory
    2: bad input
    """
    from dualpipe.timeline.comparison import Limits, candidate, describe_sizes, parse_sizes, rank
    from dualpipe.timeline.ranking_text import describe, without_full_backward
    from dualpipe.timeline.summary import describe_costs
    from proofs.waivers import waived

    given = _once(schedules or [])
    _check_late_w(given, late_w)
    _check_size(ranks, microbatches)
    waived(waive or [])
    pictures = [*target("--svg", svg, SVG), *target("--png", png, PNG)]
    pages = target("--html", html, HTML)
    inputs = [*given, *map(str, cost_from or [])]
    check_targets([*pictures, *pages], inputs)
    costs = _costs(cost, cost_from or [], latency, overlap)
    memory = None if sizes is None else parse_sizes(sizes)
    limits = Limits(_limit("--max-activations", max_activations), _limit("--max-bytes", max_bytes))
    others = [
        (name if len(found) == 1 else f"{name}[{number}]", schedule)
        for name in given
        if name not in NAMES
        for found in [find_schedules(name, ranks, microbatches, entry_timeout)]
        for number, schedule in enumerate(found)
    ]
    size = _size(ranks, microbatches, others)
    _check_size(*size)
    names = [name for name in NAMES if name in given] or list(NAMES)
    simulated = partial(candidate, costs=costs, sizes=memory, blocking=blocking)
    ranking = rank(_candidates(names, others, size, simulated, waive or []), limits)
    heading = f"{_counted(size[0], 'rank')}, {_counted(size[1], 'microbatch', 'microbatches')}"
    note = f"costs {describe_costs(costs)}"
    note += f" (means of {len(costs.stages)} stages), times in seconds" if costs.stages else ""
    note += f"; bytes {describe_sizes(memory)}" if memory else ""
    note += f", of 1/{size[0]} of the model; a schedule with {2 * size[0]} stages has half of that in each"
    if as_json:
        about: dict[str, Any] = {"ranks": size[0], "microbatches": size[1], "costs": costs.numbers}
        if costs.stages:
            about["slices"] = [each.numbers for each in costs.stages]
        about |= {"bytes": vars(memory) if memory else None, "limits": vars(limits)}
        typer.echo(json.dumps(about | ranking.as_json()))
    else:
        typer.echo(f"{heading}; {note}")
        if costs.BW is not None and (split := without_full_backward(ranking)):
            typer.echo(f"BW does not apply to {', '.join(split)}, which run each B and W apart")
        typer.echo(describe(ranking))
    if not ranking.candidates:
        for path in filter(None, (svg, png, html)):
            typer.echo(f"{path} is not written: no schedule was simulated", err=True)
        raise typer.Exit(1)
    if pictures:
        from dualpipe.timeline.picture import render
        from dualpipe.timeline.side_by_side import draw

        figure = draw(ranking, heading, note)
        for picture in pictures:
            picture.write(render(figure, "svg" if picture.form is SVG else "png"))
    for page in pages:
        page.write(_page(ranking, heading, note))
    raise typer.Exit(0 if ranking.best else 1)


def _size(ranks: int | None, microbatches: int | None, others: Sequence[tuple[str, Schedule]]) -> tuple[int, int]:
    """The size of all schedules: the one asked for, else that of the files, which must agree."""
    sizes = {(schedule.ranks, sum(schedule.microbatches.values())): name for name, schedule in others}
    if len(sizes) > 1:
        shown = ", ".join(f"{name} has {p} ranks and {m} microbatches" for (p, m), name in sizes.items())
        raise RuleError("compared schedules must have the same size", shown, "compare schedules of one size")
    for size in sizes:
        return size
    chosen = 4 if ranks is None else ranks
    return chosen, 2 * chosen if microbatches is None else microbatches


def _candidates(
    names: Sequence[str],
    others: Sequence[tuple[str, Schedule]],
    size: tuple[int, int],
    simulated: Callable[[str, Schedule], Candidate | Absent],
    waive: Sequence[str],
) -> list[Candidate | Absent]:
    """The named schedules, which are proved for every size, and the others, each of which is checked first."""
    from dualpipe.cli.refutation import refutation
    from dualpipe.timeline.comparison import Absent

    found: list[Candidate | Absent] = []
    total = len(names) + len(others)
    with progress_bar() as begin:
        for name in names:
            begin(len(found), total, name)
            try:
                schedule = generate(name, *size)
            except SizeError as error:
                found.append(Absent(name, str(error)))
            else:
                found.append(simulated(name, schedule))
        for name, schedule in others:
            begin(len(found), total, name)
            found.append(refutation(name, schedule, waive) or simulated(name, schedule))
        begin(total, total, "")
    return found


def _once(names: Sequence[str]) -> list[str]:
    """The names without those that name the same schedule or file once more."""
    first: dict[str | Path, str] = {}
    for name in names:
        is_file = name and name not in NAMES and Path(name).is_file()
        first.setdefault(Path(name).resolve() if is_file else name, name)
    return list(first.values())


def _check_late_w(names: Sequence[str], late_w: str | None) -> None:
    """``--late-w`` belongs to the commands that take one schedule.  Raises ``RuleError`` where it asks for one here."""
    if late_w in (None, LateW.none):
        return
    asked = [with_late_w(name, late_w) for name in names if name.startswith("dualpipe")]
    fix = " ".join(asked) or " or ".join(with_late_w(name, late_w) for name in ("dualpipe", "dualpipev"))
    raise RuleError(
        "`dualpipe compare` takes schedules with late W by their names", f"got --late-w {late_w}", f"use {fix}"
    )


def _check_size(ranks: int | None, microbatches: int | None) -> None:
    """Raises ``RuleError`` for a size that no schedule has, or that would take hours."""
    for option, number in (("-P", ranks), ("-M", microbatches)):
        if number is not None and number < 1:
            raise RuleError(f"{option} is 1 or more", f"got {number}", "use 1 or more")
    if ranks is not None and ranks > MOST_RANKS:
        raise RuleError(f"a comparison has at most {MOST_RANKS:,} ranks", f"got {ranks:,}", "compare a smaller size")
    if (ranks or 1) * (microbatches or 1) > MOST_TASKS:
        raise RuleError(
            f"ranks times microbatches is at most {MOST_TASKS:,}",
            f"got {ranks or 1:,} times {microbatches or 1:,}",
            "compare a smaller size",
        )


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _costs(text: str | None, traces: Sequence[Path], latency: float | None, overlap: float | None) -> Costs:
    """The costs of a share from the options, each of which may be given once."""
    from dualpipe.timeline.summary import parse_costs

    if traces and text is not None:
        raise RuleError("costs are given or measured", "got --cost and --cost-from", "leave one of them out")
    if traces:
        from dualpipe.timeline.measured_costs import describe
        from dualpipe.timeline.profiled_costs import read

        measured = read(traces)
        typer.echo(describe(measured, latency), err=True)
        costs = measured.costs
    else:
        costs = parse_costs(text or "")
    if latency is not None:
        if "latency" in (text or ""):
            raise RuleError("the latency is given once", "got --latency and latency= in --cost", "leave one out")
        costs = replace(costs, latency=latency)
    if overlap is not None:
        if costs.FB is not None:
            raise RuleError("an F&B pair has one cost", "got --overlap and FB= in --cost", "leave one out")
        if not 0 < overlap <= 2:
            raise RuleError("--overlap is more than 0 and at most 2", f"got {overlap:g}", "give a number in this range")
        costs = replace(costs, FB=overlap * (costs.F + costs.backward))
    return costs


def _limit(option: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 1e100:
        raise RuleError(f"{option} is a number from 0 to 1e100", f"got {value:g}", "give a number in this range")
    return value


def _page(ranking: Ranking, heading: str, note: str) -> str:
    from dualpipe.page import Drawn, Gallery, Page, Steps, Table, render
    from dualpipe.timeline.ranking_text import caption, left_out, table, verdict, with_collectives

    drawn = []
    for each in ranking.candidates:
        timeline = each.timeline
        memory = [Steps(*zip(*each.memory(rank), strict=True)) for rank in range(len(timeline.spans))]
        drawn.append(Drawn(each.name, caption(ranking, each), timeline, memory))
    head, *rows = table(ranking)
    sections: list[Gallery | Table] = [Table("Schedules", head, rows)]
    if lines := with_collectives(ranking):
        sections.append(Table("Collectives", ("schedule and note",), [(line,) for line in lines]))
    if absent := left_out(ranking):
        sections.append(Table("Left out", ("schedule and reason",), [(line,) for line in absent]))
    unit = "bytes" if any(each.sizes for each in ranking.candidates) else "live"
    sections.append(Gallery("Side by side", drawn, unit, note))
    return render(Page(heading, "", sections, verdict(ranking)))
