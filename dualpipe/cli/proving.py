"""What ``dualpipe prove`` does: proves each schedule that it is given and prints text, or one JSON object a line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dualpipe.errors import RuleError, nearest
from dualpipe.schedule import Schedule
from proofs.apart import Apart
from proofs.models import parse_models
from proofs.optimal import SECONDS
from proofs.prove import Begin, Report, prove, smtlib
from proofs.solver import MEMORY_BYTES, SHARED, Solver
from proofs.theorems import families, prove_all
from proofs.theorems.family import Family
from proofs.verdict import ExitCode, Refuted, Unknown, worst

Source = tuple[str, Callable[[], Schedule]]
"""A name for reports, and how to get the schedule; getting it may raise ``RuleError`` or ``OSError``."""


def _silent(done: int, total: int, name: str) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """The options of the command line, as they were typed."""

    model: str = "all"
    max_activations: int | None = None
    bytes_for_b: str | None = None
    bytes_for_w: str | None = None
    smtlib: Callable[[str], None] | None = None
    solver_timeout: float | None = None
    solver_memory: int = MEMORY_BYTES
    as_json: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a source: its schedule and the report, or for bad input the error's text."""

    name: str
    schedule: Schedule | None = None
    report: Report | None = None
    error: str = ""


def prove_sources(
    sources: Sequence[Source],
    options: Options,
    see: Callable[[Outcome], None] | None = None,
    begin: Begin = _silent,
) -> ExitCode:
    """Prove every source in order; bad input in one does not keep the others from being proved.

    ``see`` gets what became of each source, after it was printed; ``begin`` is called as ``prove`` calls it.
    """
    show = see or (lambda outcome: None)
    parse_models(options.model)
    if options.smtlib is not None and len(sources) != 1:
        raise RuleError("--smtlib writes the obligations of one schedule", f"got {len(sources)}", "name one file")
    if options.solver_memory == SHARED.memory_bytes:
        return worst(_each(sources, options, show, begin, SHARED))
    with Solver(options.solver_memory) as solver:
        return worst(_each(sources, options, show, begin, solver))


def _each(
    sources: Sequence[Source], options: Options, show: Callable[[Outcome], None], begin: Begin, solver: Solver
) -> Iterator[ExitCode]:
    """Prove each source, print its report and yield its exit code."""
    for name, get in sources:
        begin(0, 1, f"{name}: reading")
        try:
            schedule = get()
            report = _prove(schedule, name, options, begin, solver)
        except (RuleError, OSError) as error:
            yield ExitCode.BAD_INPUT
            print(f"dualpipe: {error}", file=sys.stderr)
            if options.as_json:
                print(json.dumps({"schedule": name, "source": name, "verdict": "bad input", "error": str(error)}))
            show(Outcome(name, error=str(error)))
            continue
        yield report.exit_code
        if options.as_json:
            print(json.dumps(report.as_json() | {"source": name}))
        else:
            print(report.text(), end="")
        show(Outcome(name, schedule, report))


def prove_all_sizes(
    as_json: bool, begin: Begin = _silent, family: str | None = None, solver_memory: int = MEMORY_BYTES
) -> ExitCode:
    """Prove the theorems for every size, one line each; those of one family where its name is given."""
    chosen = None if family is None else [_family(family)]
    with Apart(solver_memory) as apart:
        results = prove_all(begin, chosen, by=apart.prove)
    begin(len(results), len(results), "")
    for result in results:
        print(json.dumps(result.as_json()) if as_json else result.text)
    if not as_json:
        obligations, arise = (sum(getattr(r, f) for r in results) for f in ("obligations", "non_vacuous"))
        seconds = sum(result.seconds for result in results)
        print(f"{len(results)} theorems, {obligations} obligations, {arise} of them arise, {seconds:.1f} s")
    codes = {Refuted: ExitCode.REFUTED, Unknown: ExitCode.UNKNOWN}
    return worst(codes.get(type(result.verdict), ExitCode.PROVED) for result in results)


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
    begin: Begin = _silent,
    solver_memory: int = MEMORY_BYTES,
) -> ExitCode:
    """Find and prove the least makespan of a size; unknown where the solver gave up."""
    begin(0, 1, "the least makespan")
    seconds = SECONDS if solver_timeout is None else solver_timeout
    with Apart(solver_memory) as apart:
        found = apart.optimal(ranks, microbatches, seconds)
    begin(1, 1, "")
    print(json.dumps(found.as_json()) if as_json else found.text)
    return ExitCode.UNKNOWN if isinstance(found.verdict, Unknown) else ExitCode.PROVED


def _prove(schedule: Schedule, name: str, options: Options, begin: Begin, solver: Solver) -> Report:
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
