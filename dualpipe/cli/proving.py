"""The work of ``dualpipe prove``: it proves each source and prints text, or one JSON object per line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dualpipe.errors import RuleError, nearest
from dualpipe.progress import Progress, silent
from dualpipe.schedule import Schedule
from proofs import departure_story
from proofs.against import compare
from proofs.isolated import Isolated
from proofs.models import parse_models
from proofs.optimal import SECONDS
from proofs.prove import Report, prove, smtlib
from proofs.solver import MEMORY_BYTES, SHARED, Solver
from proofs.theorems import families, prove_all
from proofs.theorems.family import Family
from proofs.verdict import ExitCode, overall, worst
from proofs.waivers import waived

Source = tuple[str, Callable[[], Schedule]]
"""A name for reports, and a function that returns the schedule; it may raise ``RuleError`` or ``OSError``."""


@dataclass(frozen=True)
class Against:
    """The schedule of ``--against``: its name, and the schedule itself for one that is compared with it."""

    name: str
    of: Callable[[Schedule], Schedule]


@dataclass(frozen=True)
class Options:
    """The options as given on the command line."""

    model: str = "all"
    max_activations: int | None = None
    bytes_for_b: str | None = None
    bytes_for_w: str | None = None
    smtlib: Callable[[str], None] | None = None
    solver_timeout: float | None = None
    solver_memory: int = MEMORY_BYTES
    as_json: bool = False
    against: Against | None = None
    waive: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a source: its schedule and the report, or for bad input the error's text."""

    name: str
    schedule: Schedule | None = None
    report: Report | None = None
    error: str = ""


def prove_sources(
    sources: Sequence[Source],
    options: Options,
    collect: Callable[[Outcome], None] = lambda outcome: None,
    begin: Progress = silent,
) -> ExitCode:
    """Prove every source in order; bad input in one does not stop the others.

    ``collect`` gets each outcome after it is printed; ``begin`` is called as by ``proofs.prove.prove``.
    """
    parse_models(options.model)
    waived(options.waive)
    if options.smtlib is not None and len(sources) != 1:
        raise RuleError("--smtlib writes the obligations of one schedule", f"got {len(sources)}", "name one file")
    if options.solver_memory == SHARED.memory_bytes:
        return worst(_prove_each(sources, options, collect, begin, SHARED))
    with Solver(options.solver_memory) as solver:
        return worst(_prove_each(sources, options, collect, begin, solver))


def _prove_each(
    sources: Sequence[Source], options: Options, collect: Callable[[Outcome], None], begin: Progress, solver: Solver
) -> Iterator[ExitCode]:
    """Prove each source, print its report and yield its exit code."""
    for name, get in sources:
        begin(0, 1, f"{name}: reading")
        try:
            schedule = get()
            against = options.against
            other = None if against is None else compare(schedule, against.of(schedule), against.name)
            report = _prove(schedule, name, options, begin, solver)
        except (RuleError, OSError) as error:
            yield ExitCode.BAD_INPUT
            print(f"dualpipe: {error}", file=sys.stderr)
            if options.as_json:
                print(json.dumps({"schedule": name, "source": name, "verdict": "bad input", "error": str(error)}))
            collect(Outcome(name, error=str(error)))
            continue
        yield report.exit_code if other is None else worst([report.exit_code, other.exit_code])
        if options.as_json:
            compared = {} if other is None else {"against": other.as_json()}
            print(json.dumps(report.as_json() | compared | {"source": name}))
        else:
            print(report.text() + ("" if other is None else departure_story.text(other)), end="")
        collect(Outcome(name, schedule, report))


def prove_all_sizes(
    as_json: bool, begin: Progress = silent, family: str | None = None, solver_memory: int = MEMORY_BYTES
) -> ExitCode:
    """Prove the theorems for every size and print a line for each; only those of one family if its name is given."""
    chosen = None if family is None else [_family(family)]
    with Isolated(solver_memory) as isolated:
        results = prove_all(begin, chosen, by=isolated.prove)
    for result in results:
        print(json.dumps(result.as_json()) if as_json else result.text)
    if not as_json:
        obligations, arise = (sum(getattr(r, f) for r in results) for f in ("obligations", "non_vacuous"))
        seconds = sum(result.seconds for result in results)
        print(f"{len(results)} theorems, {obligations} obligations, {arise} of them arise, {seconds:.1f} s")
    return overall(result.verdict for result in results)


def _family(name: str) -> Family:
    known = {family.name: family for family in families()}
    if name not in known:
        raise RuleError(
            f"there are theorems for {', '.join(known)}", f"got {name}", nearest(name, known, "name one of them")
        )
    return known[name]


def prove_optimal(
    ranks: int,
    microbatches: int,
    solver_timeout: float | None,
    as_json: bool,
    begin: Progress = silent,
    solver_memory: int = MEMORY_BYTES,
) -> ExitCode:
    """Find, prove and print the least makespan of a size; unknown if the solver gave up."""
    begin(0, 1, "the least makespan")
    seconds = SECONDS if solver_timeout is None else solver_timeout
    with Isolated(solver_memory) as isolated:
        found = isolated.optimal(ranks, microbatches, seconds)
    begin(1, 1, "")
    print(json.dumps(found.as_json()) if as_json else found.text)
    return overall([found.verdict])


def _prove(schedule: Schedule, name: str, options: Options, begin: Progress, solver: Solver) -> Report:
    models = parse_models(options.model)
    if options.smtlib is not None:
        options.smtlib(smtlib(schedule, models[0], options.max_activations))
    return prove(
        schedule,
        models,
        options.max_activations,
        timeout_s=options.solver_timeout,
        bytes_per_stage=_bytes_per_stage(schedule, options),
        label=schedule.name or name,
        begin=lambda done, total, check: begin(done, total, f"{name}: {check}"),
        solver=solver,
        waive=options.waive,
    )


def _bytes_per_stage(schedule: Schedule, options: Options) -> tuple[list[int], list[int]] | None:
    if options.bytes_for_b is None and options.bytes_for_w is None:
        return None
    if options.bytes_for_b is None or options.bytes_for_w is None:
        got, missing = ("b", "w") if options.bytes_for_w is None else ("w", "b")
        raise RuleError(
            "--bytes-for-b and --bytes-for-w go together", f"got --bytes-for-{got} alone", f"add --bytes-for-{missing}"
        )
    both = [_sizes(text, schedule.stages) for text in (options.bytes_for_b, options.bytes_for_w)]
    return both[0], both[1]


def _sizes(text: str, stages: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if len(words) != stages or not all(re.fullmatch("[0-9]{1,18}", word) for word in words):
        raise RuleError(
            "--bytes-for-b and --bytes-for-w each give a whole number of bytes per stage, of at most 18 digits",
            f"got {text[:200] or 'nothing'} for {_stages(stages)}",
            "separate the numbers by commas",
        )
    return [int(word) for word in words]


def _stages(count: int) -> str:
    return f"{count} stage{'s' if count > 1 else ''}"
