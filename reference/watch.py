"""What a person sees of a verification: a progress bar while it works, a table per stage at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from reference.case import Case
from reference.party import MOST_TOLD, Progress
from reference.party import watch as watch_parties
from reference.verify import FAKE, PROCESSES, Report, tensors_compared


@contextmanager
def watch(case: Case, quiet: bool = False) -> Iterator[Progress]:
    """A bar per party on standard error; yields the callback that moves them."""
    with watch_parties({FAKE: 1, PROCESSES: case.schedule.ranks}, case.steps, quiet) as on_progress:
        yield on_progress


def tell(report: Report, console: Console | None = None) -> None:
    """Print the report."""
    console = console or Console(highlight=False)
    case, schedule = report.case, report.case.schedule
    dtype = str(case.model.dtype).removeprefix("torch.")
    console.print(
        f"{schedule.name or 'unnamed schedule'}: {schedule.ranks} ranks, {schedule.stages} stages, "
        f"{case.microbatches} microbatches, {dtype} on {case.device}, {case.steps} steps; "
        f"loss {' -> '.join(f'{loss:.4f}' for loss in report.losses)}",
        soft_wrap=True,
    )
    console.print(_table(report))
    for complaint in report.complaints[:MOST_TOLD]:
        console.print(f"nothing happened: {complaint}", style="red")
    for party in report.parties:
        party.tell(console)
    compared = tensors_compared(case, report.truth)
    if report.equal:
        console.print(
            f"EQUAL: {compared} tensors of each party are bitwise those of plain PyTorch ({report.seconds:.1f} s)",
            style="green",
        )
    else:
        console.print(f"NOT EQUAL ({report.seconds:.1f} s)", style="red")


def _table(report: Report) -> Table:
    """One row a stage: its parameters, the size of its gradient, and how each party compares."""
    schedule, last = report.case.schedule, report.truth[-1]
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "ranks", "parameters", "largest gradient", *(party.name for party in report.parties)):
        table.add_column(heading, justify="right")
    for stage in range(schedule.stages):
        ranks = ", ".join(f"{route[stage]}{lane}" for lane, route in schedule.routes.items())
        largest = max((float(g.abs().max()) for g in last.gradients[stage].values()), default=0.0)
        count = sum(w.numel() for w in last.weights[stage].values())
        verdicts = [party.at(stage) for party in report.parties]
        table.add_row(str(stage), ranks, f"{count:,}", f"{largest:.3g}", *verdicts)
    return table
