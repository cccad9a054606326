"""What ``dualpipe verify`` shows: a progress bar for each party while it works, a table of the stages at the end.

``reference`` returns reports and prints nothing, so that it runs where no package for terminals is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from reference.case import Case
    from reference.megatron.case import Case as MegatronCase
    from reference.megatron.verify import Report as MegatronReport
    from reference.party import Party
    from reference.verify import Report

MOST_SHOWN = 6
"""At most this many complaints, and differences of a party, are printed."""

OnProgress = Callable[[str, int, int], None]
"""Called with a party's name, the rank within it, and the steps it has finished."""


@contextmanager
def watch(ranks: Mapping[str, int], steps: int, quiet: bool = False) -> Iterator[OnProgress]:
    """A bar on standard error for each party, given the number of its ranks; yields the callback that moves them."""
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True, auto_refresh=False
    ) as bars:  # no thread: ranks are forked
        tasks = {name: bars.add_task(name, total=steps) for name in ranks}
        done = {name: dict.fromkeys(range(count), 0) for name, count in ranks.items()}

        def on_progress(party: str, rank: int, finished: int) -> None:
            done[party][rank] = finished
            bars.update(tasks[party], completed=min(done[party].values()))
            bars.refresh()

        yield on_progress


@contextmanager
def watch_case(case: Case, quiet: bool = False) -> Iterator[OnProgress]:
    """``watch`` with the parties of a verification."""
    from reference.verify import FAKE, PROCESSES

    with watch({FAKE: 1, PROCESSES: case.schedule.ranks}, case.steps, quiet) as on_progress:
        yield on_progress


@contextmanager
def watch_megatron(case: MegatronCase, quiet: bool = False) -> Iterator[OnProgress]:
    """``watch`` with the parties of a verification on Megatron."""
    from reference.megatron import production, truth
    from reference.megatron.verify import ORACLE, PRODUCTION, TRUTH

    ranks = {TRUTH: truth.ranks(case), PRODUCTION: production.ranks(case)} | ({ORACLE: 1} if case.has_oracle else {})
    with watch(ranks, case.steps, quiet) as on_progress:
        yield on_progress


def print_report(report: Report) -> None:
    """The report of a verification, on standard output."""
    from reference.verify import tensors_compared

    console = Console(highlight=False)
    case, schedule, last = report.case, report.case.schedule, report.truth[-1]
    dtype = str(case.model.dtype).removeprefix("torch.")
    console.print(
        f"{schedule.name or 'unnamed schedule'}: {schedule.ranks} ranks, {schedule.stages} stages, "
        f"{case.microbatches} microbatches, {dtype} on {case.device}, {case.steps} steps; "
        f"loss {' -> '.join(f'{loss:.4f}' for loss in report.losses)}",
        soft_wrap=True,
    )
    table = _table(report.parties, "stage", "ranks")
    for stage in range(schedule.stages):
        ranks = ", ".join(f"{route[stage]}{lane}" for lane, route in schedule.routes.items())
        sizes = _sizes(last.weights[stage].values(), last.gradients[stage].values())
        table.add_row(str(stage), ranks, *sizes, *(_verdict(party, stage) for party in report.parties))
    console.print(table)
    _print_complaints(console, report.complaints, report.parties)
    equal = f"{tensors_compared(case, report.truth)} tensors of each party are bitwise those of plain PyTorch"
    _print_verdict(console, equal if report.equal else None, report.seconds)


def print_megatron_report(report: MegatronReport) -> None:
    """The report of a verification on Megatron, on standard output."""
    from reference.megatron.comparison import tensors_compared
    from reference.megatron.trace import Shard

    console = Console(highlight=False)
    case, last = report.case, report.truth[-1]
    console.print(describe(case), soft_wrap=True)
    console.print(
        f"loss {' -> '.join(f'{loss:.4f}' for loss in report.losses)}; "
        f"gradient norm {', '.join(f'{norm:.4f}' for norm in report.norms)}",
        soft_wrap=True,
    )
    table = _table(report.parties, "stage")
    for stage in range(case.pp):
        shards = [Shard(0, stage, tp) for tp in range(case.tp)]
        weights = [weight for shard in shards for weight in last.weights[shard].values()]
        gradients = [gradient for shard in shards for gradient in last.gradients[shard].values()]
        table.add_row(str(stage), *_sizes(weights, gradients), *(_verdict(party, stage) for party in report.parties))
    console.print(table)
    _print_complaints(console, report.complaints, report.parties)
    for party in report.parties:
        if party.norm_difference > 0:
            console.print(
                f"{party.name}: gradient norms differ by up to {party.norm_difference:.1g} of themselves; up to "
                f"{case.norm_rounding:.1g} is rounding, as squares are added up in another order",
                soft_wrap=True,
            )
    if not case.has_oracle:
        console.print(
            "plain PyTorch was not asked: the oracle is one process, without tensor or expert parallelism or a bias of "
            "experts",
            soft_wrap=True,
        )
    names = " and ".join(party.name for party in report.parties)
    equal = f"{tensors_compared(report.truth)} tensors of {names} are bitwise those of Megatron's 1F1B"
    _print_verdict(console, equal if report.equal else None, report.seconds)


def describe(case: MegatronCase) -> str:
    """A case on Megatron, in two lines."""
    from reference.megatron import production, truth

    options = {
        "sequence parallel": case.sequence_parallel,
        "overlapped reduction": case.overlap_grad_reduce,
        "distributed optimizer": case.distributed_optimizer,
        "recompute": case.recompute,
        "loss per token": case.per_token_loss,
        "bias of experts": case.expert_bias,
        f"expert parallel {case.ep}": case.ep > 1,
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


def _table(parties: Sequence[Party], *first: str) -> Table:
    """One row a stage: its parameters, the size of its gradient, and how each party compares."""
    table = Table(box=None, pad_edge=False)
    for heading in (*first, "parameters", "largest gradient", *(party.name for party in parties)):
        table.add_column(heading, justify="right")
    return table


def _sizes(weights: Iterable[Tensor], gradients: Iterable[Tensor]) -> tuple[str, str]:
    """The number of parameters of a stage, and the largest absolute value of its gradient."""
    largest = max((float(gradient.abs().max()) for gradient in gradients), default=0.0)
    return f"{sum(weight.numel() for weight in weights):,}", f"{largest:.3g}"


def _verdict(party: Party, stage: int) -> str:
    """How a party compares on one stage, in rich's markup."""
    if party.failures:
        return "[red]did not finish"
    wrong = sum(difference.stage == stage for difference in party.differences)
    return f"[red]{wrong} differ" if wrong else "[green]equal"


def _print_complaints(console: Console, complaints: Sequence[str], parties: Sequence[Party]) -> None:
    """What the truth itself lacks, then how each party differs or failed."""
    for complaint in complaints[:MOST_SHOWN]:
        console.print(f"nothing happened: {complaint}", style="red", markup=False, soft_wrap=True)
    for party in parties:
        for difference in party.differences[:MOST_SHOWN]:
            console.print(f"{party.name}: {difference}", style="red", markup=False, soft_wrap=True)
        if len(party.differences) > MOST_SHOWN:
            console.print(f"{party.name}: and {len(party.differences) - MOST_SHOWN} more", style="red")
        for failure in party.told:
            console.print(f"{party.name}: {failure}", style="red", markup=False, soft_wrap=True)


def _print_verdict(console: Console, equal: str | None, seconds: float) -> None:
    if equal is None:
        console.print(f"NOT EQUAL ({seconds:.1f} s)", style="red")
    else:
        console.print(f"EQUAL: {equal} ({seconds:.1f} s)", style="green", soft_wrap=True)
