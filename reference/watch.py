"""What a person sees of a verification: a progress bar while it works, a table per stage at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from reference.case import Case
from reference.verify import FAKE, PROCESSES, Party, Report, tensors_compared
from reference.verify import Progress as OnProgress

_MOST_TOLD = 6


@contextmanager
def watch(case: Case, quiet: bool = False) -> Iterator[OnProgress]:
    """A bar per party on standard error; yields the callback that moves them."""
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True, auto_refresh=False
    ) as bars:  # no thread: ranks are forked
        ranks = case.schedule.ranks
        tasks = {FAKE: bars.add_task(FAKE, total=case.steps), PROCESSES: bars.add_task(PROCESSES, total=case.steps)}
        done: dict[str, dict[int, int]] = {FAKE: {0: 0}, PROCESSES: dict.fromkeys(range(ranks), 0)}

        def on_progress(party: str, rank: int, steps: int) -> None:
            done[party][rank] = steps
            bars.update(tasks[party], completed=min(done[party].values()))
            bars.refresh()

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
    for complaint in report.complaints[:_MOST_TOLD]:
        console.print(f"nothing happened: {complaint}", style="red")
    for party in report.parties:
        _tell_party(console, party)
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
        verdicts = [_verdict(party, stage) for party in report.parties]
        table.add_row(str(stage), ranks, f"{count:,}", f"{largest:.3g}", *verdicts)
    return table


def _verdict(party: Party, stage: int) -> str:
    if party.failures:
        return "[red]did not finish"
    wrong = sum(difference.stage == stage for difference in party.differences)
    return f"[red]{wrong} differ" if wrong else "[green]equal"


def _tell_party(console: Console, party: Party) -> None:
    for difference in party.differences[:_MOST_TOLD]:
        console.print(f"{party.name}: {difference}", style="red", markup=False, soft_wrap=True)
    if len(party.differences) > _MOST_TOLD:
        console.print(f"{party.name}: and {len(party.differences) - _MOST_TOLD} more", style="red")
    for failure in party.told:
        console.print(f"{party.name}: {failure}", style="red", markup=False, soft_wrap=True)
