"""What ``dualpipe verify`` prints: a progress bar for each implementation, then a table of the stages and a verdict.

``reference`` returns reports and prints nothing, so it runs where no package for terminals is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from dualpipe.cli.progress import progress_bars
from dualpipe.progress import Progress

if TYPE_CHECKING:
    from reference.case import Case
    from reference.megatron.case import Case as MegatronCase
    from reference.megatron.verify import Normed
    from reference.report import Comparison, Report

MOST_SHOWN = 6
"""The most failed sanity checks, and the most differences of one implementation, that are printed."""


def watch_case(case: Case, quiet: bool = False) -> AbstractContextManager[Progress]:
    """Progress bars for a verification."""
    from reference.verify import FAKE, PROCESSES

    return progress_bars((FAKE, PROCESSES), case.steps, quiet)


def watch_megatron(case: MegatronCase, quiet: bool = False) -> AbstractContextManager[Progress]:
    """Progress bars for a verification on Megatron."""
    from reference.megatron.verify import ORACLE, PRODUCTION, TRUTH

    return progress_bars((TRUTH, PRODUCTION, ORACLE) if case.has_oracle else (TRUTH, PRODUCTION), case.steps, quiet)


def print_case_report(report: Report[Case, Any]) -> None:
    """Print the report of a verification on standard output."""
    case, schedule = report.case, report.case.schedule
    dtype = str(case.model.dtype).removeprefix("torch.")
    heading = (
        f"{schedule.name or 'unnamed schedule'}: {schedule.ranks} ranks, {schedule.stages} stages, "
        f"{case.microbatches} microbatches, {dtype} on {case.device}, {case.steps} steps"
        f"{', F&B pairs overlapped' if case.overlap else ''}; {_losses(report)}"
    )
    print_report(report, heading, "plain PyTorch")


def print_megatron_report(report: Report[MegatronCase, Normed]) -> None:
    """Print the report of a verification on Megatron on standard output."""
    case = report.case
    norms = ", ".join(f"{norm:.4f}" for norm in report.norms)
    notes = [
        f"{comparison.name}: gradient norms differ by at most {comparison.norm_difference:.1g}, relatively; up to "
        f"{case.norm_rounding:.1g} is rounding, since squares are added in another order"
        for comparison in report.comparisons
        if comparison.norm_difference > 0
    ]
    if not case.has_oracle:
        notes.append(
            "not compared with plain PyTorch: that oracle is one process, without tensor, expert or context "
            "parallelism, statistics over replicas, or clipping by the norm of a distributed optimizer"
        )
    print_report(
        report, f"{describe_megatron(case)}\n{_losses(report)}; gradient norm {norms}", "Megatron's 1F1B", notes
    )


def print_report(report: Report[Any, Any], heading: str, reference: str, notes: Iterable[str] = ()) -> None:
    """Print a report on standard output; ``reference`` names what the implementations are compared with."""
    console = Console(highlight=False)
    console.print(heading, soft_wrap=True)
    console.print(_table(report))
    for complaint in report.complaints[:MOST_SHOWN]:
        console.print(f"sanity check failed: {complaint}", style="red", markup=False, soft_wrap=True)
    for comparison in report.comparisons:
        _print_differences(console, comparison)
    for note in notes:
        console.print(note, soft_wrap=True)
    if report.equal:
        names = " and ".join(comparison.name for comparison in report.comparisons)
        equal = f"{report.tensors} tensors of {names} are bitwise equal to those of {reference}"
        console.print(f"EQUAL: {equal} ({report.seconds:.1f} s)", style="green", soft_wrap=True)
    else:
        console.print(f"NOT EQUAL ({report.seconds:.1f} s)", style="red")


def describe_megatron(case: MegatronCase) -> str:
    """A case on Megatron, in two lines."""
    from reference.megatron import production, truth

    options = {
        "sequence parallel": case.sequence_parallel,
        "overlapped reduction": case.overlap_grad_reduce,
        "F&B pairs overlapped": case.overlap_moe,
        "distributed optimizer": case.distributed_optimizer,
        f"{case.instances} optimizer instances": case.instances > 1,
        "recompute": case.recompute,
        "loss per token": case.per_token_loss,
        f"without {', '.join(case.without)}": case.without,
        "expert bias": case.balances_by_bias,
        "sequences of different lengths": case.variable_lengths,
        "experts balanced over all replicas": case.global_aux_loss,
        "clipping of queries and keys": case.qk_clip,
        f"{case.mtp_layers} multi-token prediction layers": case.mtp_layers,
        "tied embeddings": case.tied,
        f"layout {case.layers_of_stages}": case.layers_of_stages,
        f"late W {case.late_w}": case.late_w != "none",
        f"expert parallel {case.ep}": case.ep > 1,
        f"context parallel {case.cp}": case.cp > 1,
        f"dropout {case.dropout}": case.dropout,
        f"clipping at {case.clip_norm}": case.clip_norm,
    }
    chosen = "".join(f", {name}" for name, on in options.items() if on)
    name = "DualPipe" if case.lanes == 2 else "DualPipeV"
    return (
        f"{case.model}, {case.layers} layers in {case.stages} stages, tensor parallel {case.tp}, {case.dtype}{chosen}, "
        f"{case.steps} steps\n"
        f"{name}: {case.dp} x {case.count} microbatches on {production.ranks(case)} ranks; "
        f"Megatron's 1F1B: {case.replicas} x {case.per_lane} on {truth.ranks(case)}"
    )


def _losses(report: Report[Any, Any]) -> str:
    return f"loss {' -> '.join(f'{loss:.4f}' for loss in report.losses)}"


def _table(report: Report[Any, Any]) -> Table:
    """One row per stage: the ranks that hold it, its parameters and gradient, and how each implementation compares."""
    with_ranks = any(stage.ranks for stage in report.stages)
    names = [comparison.name for comparison in report.comparisons]
    table = Table(box=None, pad_edge=False)
    for title in ("stage", *(["ranks"] if with_ranks else []), "parameters", "largest gradient", *names):
        table.add_column(title, justify="right")
    for number, stage in enumerate(report.stages):
        ranks = [stage.ranks] if with_ranks else []
        verdicts = [_verdict(comparison, number) for comparison in report.comparisons]
        table.add_row(str(number), *ranks, f"{stage.parameters:,}", f"{stage.largest_gradient:.3g}", *verdicts)
    return table


def _verdict(comparison: Comparison, stage: int) -> str:
    """How an implementation compares on one stage, in rich's markup."""
    if comparison.failures:
        return "[red]did not finish"
    wrong = sum(difference.stage == stage for difference in comparison.differences)
    return f"[red]{wrong} differ" if wrong else "[green]equal"


def _print_differences(console: Console, comparison: Comparison) -> None:
    """The first differences of an implementation, and all its failures."""
    lines: Sequence[str] = [str(difference) for difference in comparison.differences[:MOST_SHOWN]]
    if len(comparison.differences) > MOST_SHOWN:
        lines = [*lines, f"and {len(comparison.differences) - MOST_SHOWN} more"]
    for line in [*lines, *comparison.describe_failures()]:
        console.print(f"{comparison.name}: {line}", style="red", markup=False, soft_wrap=True)
