"""``dualpipe prove``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualpipe.cli import entrypoint
from dualpipe.cli.app import app, examples
from dualpipe.cli.interrupt import interruptible
from dualpipe.cli.options import (
    EntryTimeout,
    LateWOption,
    Microbatches,
    Ranks,
    ScheduleArguments,
    ScheduleOption,
    Waive,
    complete_schedule,
    find_schedule,
    find_schedules,
    gibibytes,
    seconds,
)
from dualpipe.cli.progress import progress_bar
from dualpipe.cli.targets import HTML, SMTLIB, check_targets, target
from dualpipe.errors import RuleError
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import NAMES, LateW, with_late_w

if TYPE_CHECKING:
    from dualpipe.cli.proving import Outcome, Source


@app.command(
    epilog=examples(
        "dualpipe prove -P 8 -M 20",
        "dualpipe prove mine.txt theirs.csv --json",
        "dualpipe prove -P 8 -M 16 my_package.schedules:build",
        "dualpipe prove recorded.txt --against dualpipe",
        "dualpipe prove --all-sizes",
        "dualpipe prove --all-sizes --schedule 1f1b",
    )
)
def prove(
    context: typer.Context,
    schedules: ScheduleArguments = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: ScheduleOption = "dualpipe",
    late_w: LateWOption = LateW.none,
    model: Annotated[
        str,
        typer.Option(
            help="Model of communication: all, blocking, eager (eager:1), eager:CAPACITY, edge, stream (as blocking)."
        ),
    ] = "all",
    max_activations: Annotated[int | None, typer.Option(help="Bound on live activations of every rank.")] = None,
    bytes_for_b: Annotated[
        str | None, typer.Option(help="Bytes of each stage that are live from F to B, as in 8,8,8,9.")
    ] = None,
    bytes_for_w: Annotated[
        str | None, typer.Option(help="Bytes of each stage that are live from B to W, as in 3,3,3,4.")
    ] = None,
    smtlib: Annotated[
        Path | None,
        typer.Option(
            help="Write the proof obligations of one schedule, under the first model, to this file, for another solver."
        ),
    ] = None,
    solver_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds for each question to Z3, by default 120; without it, Z3 skips more than 200,000 ops.",
            callback=seconds,
        ),
    ] = None,
    solver_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB of memory for Z3, by default 6, but at most half the machine's; beyond it, a check is unknown.",
            callback=gibibytes,
        ),
    ] = None,
    all_sizes: Annotated[
        bool,
        typer.Option(
            "--all-sizes", help="Prove the theorems for every size instead; with --schedule, those of one family."
        ),
    ] = False,
    optimal: Annotated[
        bool,
        typer.Option(
            "--optimal", help="Find the least makespan within DualPipe's memory instead; practical up to -P 8 -M 16."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with timelines and counterexamples.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Also name the first op at which each rank departs from this schedule; -P and -M are then its size.",
            metavar="SCHEDULE",
            autocompletion=complete_schedule,
        ),
    ] = None,
    waive: Waive = None,
    entry_timeout: EntryTimeout = entrypoint.LIMIT_SECONDS,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print JSON instead of text: one line with an object for each schedule or theorem."
        ),
    ] = False,
) -> None:
    """Prove schedules: complete, in order, messages matched, no deadlock, memory bounded, W in order.

    Each check is made twice, by plain search and by Z3.  Exit codes:
    0: proved
    1: refuted; a story describes what goes wrong; with --against, also if a rank departs from that schedule
    2: bad input
    3: unknown, because a solver gave up
    130: ended by Ctrl-C
    With several schedules, the exit code is the worst one, in the order 2, 1, 3, 0.
    """
    from dualpipe.cli import proving
    from proofs.solver import MEMORY_BYTES

    memory = MEMORY_BYTES if solver_memory is None else int(solver_memory * 2**30)
    if all_sizes or optimal:
        unused: dict[str, object] = {
            "--max-activations": max_activations,
            "--bytes-for-b": bytes_for_b,
            "--bytes-for-w": bytes_for_w,
            "--smtlib": smtlib,
            "--html": html,
            "--against": against,
            "--waive": waive or None,
            "--model": None if model == "all" else model,
            "--late-w": late_w if optimal and late_w != LateW.none else None,
            "--entry-timeout": entry_timeout if _was_given(context, "entry_timeout") else None,
        }
        if optimal and not all_sizes and schedule != "dualpipe":
            unused["--schedule"] = schedule
        if all_sizes:
            unused |= {
                "-P": ranks,
                "-M": microbatches,
                "--solver-timeout": solver_timeout,
                "--optimal": optimal or None,
            }
        given = [*(schedules or []), *(name for name, value in unused.items() if value is not None)]
        _reject("--all-sizes" if all_sizes else "--optimal", given)
    elif schedules and _was_given(context, "schedule"):
        raise RuleError(
            "give schedules as arguments or one with --schedule, not both",
            f"got {schedules[0]} and --schedule {schedule}",
            "leave one of them out",
        )
    schedules = [with_late_w(name, late_w) for name in schedules or []]
    one_family = _was_given(context, "schedule") or late_w != LateW.none
    schedule = schedule if schedules else with_late_w(schedule, late_w)
    files = [*target("--smtlib", smtlib, SMTLIB), *target("--html", html, HTML)]
    check_targets(files, [*(schedules or [schedule]), *([] if against is None else [against])])
    with progress_bar() as begin:
        if all_sizes:
            family = schedule if one_family else None
            raise typer.Exit(interruptible(lambda: proving.prove_all_sizes(as_json, begin, family, memory)))
        if optimal:
            size = 4 if ranks is None else ranks
            count = 2 * size if microbatches is None else microbatches
            raise typer.Exit(
                interruptible(lambda: proving.prove_optimal(size, count, solver_timeout, as_json, begin, memory))
            )
        to_smtlib = next((each.write for each in files if each.form is SMTLIB), None)
        options = proving.Options(
            model, max_activations, bytes_for_b, bytes_for_w, to_smtlib, solver_timeout, memory, as_json
        )
        options = replace(options, waive=tuple(waive or ()))
        if against is not None:
            from dualpipe.cli.against import find_against

            options = replace(options, against=find_against(against, ranks, microbatches, entry_timeout))
        sources: list[Source]
        if schedules:
            sources = [
                source
                for name in schedules
                for source in _sources(name, *_sizes(name, ranks, microbatches, against), entry_timeout)
            ]
        else:
            value = find_schedule(schedule, *_sizes(schedule, ranks, microbatches, against), entry_timeout)
            sources = [(schedule, lambda: value)]
        outcomes: list[Outcome] = []
        code = interruptible(lambda: proving.prove_sources(sources, options, outcomes.append, begin))
    for page in (each for each in files if each.form is HTML):
        from dualpipe.cli.page import proofs_page

        page.write(proofs_page(outcomes))
    raise typer.Exit(code)


def _sizes(
    name: str, ranks: int | None, microbatches: int | None, against: str | None
) -> tuple[int | None, int | None]:
    """The sizes for a schedule: none for a file if they are those of the named schedule it is compared with."""
    is_file = name not in NAMES and not (entrypoint.is_entry_point(name) and not Path(name).exists())
    return (None, None) if is_file and against in NAMES else (ranks, microbatches)


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line, even with its default value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _reject(option: str, given: list[str]) -> None:
    if given:
        raise RuleError(
            f"{option} cannot be combined with {', '.join(given)}", "got both", f"leave out {option} or these"
        )


def _sources(name: str, ranks: int | None, microbatches: int | None, entry_timeout: float) -> list[Source]:
    """The schedules to prove for a name; an entry point may return several."""
    if not entrypoint.is_entry_point(name):
        return [(name, partial(find_schedule, name, ranks, microbatches))]
    try:
        found = find_schedules(name, ranks, microbatches, entry_timeout)
    except (RuleError, OSError) as error:
        return [(name, partial(_fail, error))]
    if len(found) == 1:
        return [(name, lambda: found[0])]
    return [(f"{name}[{at}]", partial(_same, schedule)) for at, schedule in enumerate(found)]


def _same(schedule: Schedule) -> Schedule:
    return schedule


def _fail(error: Exception) -> Schedule:
    raise error
