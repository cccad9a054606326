"""What a person sees of a verification on Megatron: progress while it works, a table per stage at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from reference.megatron import production, truth
from reference.megatron.case import Case
from reference.megatron.comparison import tensors_compared
from reference.megatron.trace import Place
from reference.megatron.verify import ORACLE, PRODUCTION, TRUTH, Party, Progress, Report

_MOST_TOLD = 6


@contextmanager
def watch(case: Case, quiet: bool = False) -> Iterator[Progress]:
    """A bar per party on standard error; yields the callback that moves them."""
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    ranks = {TRUTH: truth.ranks(case), PRODUCTION: production.ranks(case)} | ({ORACLE: 1} if case.tp == 1 else {})
    with Bars(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True, auto_refresh=False
    ) as bars:  # no thread: ranks are forked
        tasks = {name: bars.add_task(name, total=case.steps) for name in ranks}
        done = {name: dict.fromkeys(range(count), 0) for name, count in ranks.items()}

        def on_progress(party: str, rank: int, steps: int) -> None:
            done[party][rank] = steps
            bars.update(tasks[party], completed=min(done[party].values()))
            bars.refresh()

        yield on_progress


def tell(report: Report, console: Console | None = None) -> None:
    """Print the report."""
    console = console or Console(highlight=False)
    console.print(describe(report.case), soft_wrap=True)
    console.print(
        f"loss {' -> '.join(f'{loss:.4f}' for loss in report.losses)}; "
        f"gradient norm {', '.join(f'{norm:.4f}' for norm in report.norms)}",
        soft_wrap=True,
    )
    console.print(_table(report))
    for complaint in report.complaints[:_MOST_TOLD]:
        console.print(f"nothing happened: {complaint}", style="red", markup=False, soft_wrap=True)
    for party in report.parties:
        _tell_party(console, party)
        if party.norm_difference > 0:
            console.print(
                f"{party.name}: gradient norms differ by up to {party.norm_difference:.1g} of themselves; up to "
                f"{report.case.norm_rounding:.1g} is rounding, as squares are added up in another order",
                soft_wrap=True,
            )
    if report.case.tp > 1:
        console.print(
            "plain PyTorch was not asked: the oracle is one process, without tensor parallelism", soft_wrap=True
        )
    if report.equal:
        names = " and ".join(party.name for party in report.parties)
        console.print(
            f"EQUAL: {tensors_compared(report.truth)} tensors of {names} are bitwise those of Megatron's 1F1B "
            f"({report.seconds:.1f} s)",
            style="green",
            soft_wrap=True,
        )
    else:
        console.print(f"NOT EQUAL ({report.seconds:.1f} s)", style="red")


def describe(case: Case) -> str:
    """A case in a line or two."""
    options = {
        "sequence parallel": case.sequence_parallel,
        "overlapped reduction": case.overlap_grad_reduce,
        "distributed optimizer": case.distributed_optimizer,
        "recompute": case.recompute,
        "loss per token": case.per_token_loss,
        f"dropout {case.dropout}": case.dropout,
        f"clipping at {case.clip_norm}": case.clip_norm,
    }
    chosen = "".join(f", {name}" for name, on in options.items() if on)
    return (
        f"{case.model}, {case.layers} layers in {case.pp} stages, tensor parallel {case.tp}, {case.dtype}{chosen}, "
        f"{case.steps} steps\n"
        f"DualPipe: {case.dp} x {case.count} microbatches on {production.ranks(case)} ranks; "
        f"Megatron's 1F1B: {case.replicas} x {case.per_lane} on {truth.ranks(case)}"
    )


def _table(report: Report) -> Table:
    """One row a stage: its parameters, the size of its gradient, and how each party compares."""
    last = report.truth[-1]
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "parameters", "largest gradient", *(party.name for party in report.parties)):
        table.add_column(heading, justify="right")
    for stage in range(report.case.pp):
        places = [Place(0, stage, tp) for tp in range(report.case.tp)]
        largest = max(float(g.abs().max()) for place in places for g in last.gradients[place].values())
        count = sum(w.numel() for place in places for w in last.weights[place].values())
        verdicts = [_verdict(party, stage) for party in report.parties]
        table.add_row(str(stage), f"{count:,}", f"{largest:.3g}", *verdicts)
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
    for failure in party.failures:
        console.print(f"{party.name}: {failure}", style="red", markup=False, soft_wrap=True)
