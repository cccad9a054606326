"""What a person sees of a verification on Megatron: progress while it works, a table per stage at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from reference.megatron import production, truth
from reference.megatron.case import Case
from reference.megatron.comparison import tensors_compared
from reference.megatron.trace import Place
from reference.megatron.verify import ORACLE, PRODUCTION, TRUTH, Report
from reference.party import MOST_TOLD, Progress
from reference.party import watch as watch_parties


@contextmanager
def watch(case: Case, quiet: bool = False) -> Iterator[Progress]:
    """A bar per party on standard error; yields the callback that moves them."""
    ranks = {TRUTH: truth.ranks(case), PRODUCTION: production.ranks(case)} | ({ORACLE: 1} if case.has_oracle else {})
    with watch_parties(ranks, case.steps, quiet) as on_progress:
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
    for complaint in report.complaints[:MOST_TOLD]:
        console.print(f"nothing happened: {complaint}", style="red", markup=False, soft_wrap=True)
    for party in report.parties:
        party.tell(console)
        if party.norm_difference > 0:
            console.print(
                f"{party.name}: gradient norms differ by up to {party.norm_difference:.1g} of themselves; up to "
                f"{report.case.norm_rounding:.1g} is rounding, as squares are added up in another order",
                soft_wrap=True,
            )
    if not report.case.has_oracle:
        console.print(
            "plain PyTorch was not asked: the oracle is one process, without tensor or expert parallelism or a bias of "
            "experts",
            soft_wrap=True,
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
        verdicts = [party.at(stage) for party in report.parties]
        table.add_row(str(stage), f"{count:,}", f"{largest:.3g}", *verdicts)
    return table
