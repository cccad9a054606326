"""The command line.  The one place that may reach every package, and only when a command needs it."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dualpipe.errors import RuleError, UndecidedError
from dualpipe.generate import PLANS, generate
from dualpipe.schedule import Schedule
from dualpipe.schedulefile import dumps, load

app = typer.Typer(
    help="DualPipe that can be trusted: print, simulate, prove and verify pipeline schedules.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

NAMES = ", ".join(PLANS)
Ranks = Annotated[int | None, typer.Option("-P", "--ranks", help="Pipeline size.", show_default="4, or the file's")]
Microbatches = Annotated[
    int | None, typer.Option("-M", "--microbatches", help="Microbatches, all lanes.", show_default="2P, or the file's")
]
Named = Annotated[str, typer.Option("--schedule", help=f"{NAMES}, or a schedule file.")]
Blocking = Annotated[bool, typer.Option("--blocking", help="A message slot waits until all its messages met.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class Dtype(StrEnum):
    """The number formats that verification knows."""

    fp32 = "fp32"
    fp64 = "fp64"
    bf16 = "bf16"


def find_schedule(name: str, ranks: int | None, microbatches: int | None) -> Schedule:
    """The schedule that the options ask for: a named one for a size, or a file's, whose size the options must fit."""
    if name in PLANS:
        size = 4 if ranks is None else ranks
        return generate(name, size, 2 * size if microbatches is None else microbatches)
    path = Path(name)
    if not path.exists():
        raise RuleError(f"--schedule is {NAMES}, or a file", f"got {name}, and no such file exists", "correct it")
    schedule = read_schedule(path)
    found = {"-P": (ranks, schedule.ranks), "-M": (microbatches, sum(schedule.microbatches.values()))}
    for option, (asked, has) in found.items():
        if asked not in (None, has):
            raise RuleError(
                "the sizes of a schedule file are its own",
                f"{path} has {has}, {option} asks for {asked}",
                f"leave {option} out",
            )
    return schedule


def read_schedule(path: Path) -> Schedule:
    """A schedule file, or where the name ends in ``.csv`` torch.distributed.pipelining's compute-only table."""
    if path.suffix == ".csv":
        from dualpipe.torchcsv import load_csv

        return load_csv(path)
    return load(path)


@app.command()
def show(ranks: Ranks = None, microbatches: Microbatches = None, schedule: Named = "dualpipe") -> None:
    """Print a schedule in the text form that every other command reads."""
    sys.stdout.write(dumps(find_schedule(schedule, ranks, microbatches)))


@app.command()
def simulate(
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    cost: Annotated[
        str, typer.Option(help="F, B, W; BW: a full backward; FB: an overlapped pair; latency: of a message.")
    ] = "F=1,B=1,W=1",
    blocking: Annotated[
        bool, typer.Option("--blocking", help="A message slot waits until all its messages met.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a schedule on ideal ranks: makespan, bubble, peak activations and pending weight gradients."""
    from dualpipe.simulate import simulate as run
    from dualpipe.summary import parse_costs, summarise, tell

    value = find_schedule(schedule, ranks, microbatches)
    summary = summarise(run(value, parse_costs(cost), blocking=blocking))
    typer.echo(json.dumps(summary) if as_json else tell(summary))


@app.command()
def verify(
    file: Annotated[Path | None, typer.Argument(help="A schedule file; or name one with --schedule.")] = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    dtype: Annotated[Dtype, typer.Option(help="Weights and activations.")] = Dtype.fp32,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3,
    seed: Annotated[int, typer.Option(help="Of weights, data and the fake ranks' interleaving.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    transport: Annotated[
        str, typer.Option(help="direct, or staged: through pinned host memory, for several ranks on one GPU.")
    ] = "direct",
    blocking: Annotated[
        bool, typer.Option("--blocking", help="A message slot waits until all its messages met.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which a wait is a hang.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Train a small language model on real processes and on fake ranks; compare with plain PyTorch, bit by bit.

    Exit code 0: every loss, gradient and weight is equal.  1: something differs, or hangs.  2: bad input.
    3: the oracle itself failed, so nothing can be said.
    """
    if file is not None and schedule != "dualpipe":
        raise RuleError("one schedule is verified", f"got {file} and --schedule {schedule}", "leave one out")
    value = find_schedule(schedule if file is None else str(file), ranks, microbatches)
    from reference.verify import make_case
    from reference.verify import verify as run
    from reference.watch import tell, watch

    case = make_case(value, dtype.value, steps, seed, device, transport, blocking, timeout)
    with watch(case, quiet=as_json) as on_progress:
        report = run(case, on_progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        tell(report)
    raise typer.Exit(report.exit_code)


@app.command()
def prove(
    files: Annotated[list[Path] | None, typer.Argument(help="Schedule files; or -P, -M and --schedule.")] = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    schedule: Named = "dualpipe",
    model: Annotated[
        str, typer.Option(help="How messages behave: all, blocking, eager, eager:CAPACITY or stream.")
    ] = "all",
    max_activations: Annotated[int | None, typer.Option(help="Bound of live activations for every rank.")] = None,
    bytes_for_b: Annotated[str | None, typer.Option(help="Per stage, bytes live from F to B: 8,8,8,9.")] = None,
    bytes_for_w: Annotated[str | None, typer.Option(help="Per stage, bytes live from B to W: 3,3,3,4.")] = None,
    smtlib: Annotated[Path | None, typer.Option(help="Write the obligations there, for another solver.")] = None,
    solver_timeout: Annotated[float | None, typer.Option(help="Seconds for Z3; then a check is unknown.")] = None,
    all_sizes: Annotated[bool, typer.Option("--all-sizes", help="Prove the theorems for every size instead.")] = False,
    optimal: Annotated[
        bool, typer.Option("--optimal", help="Instead, the least makespan within DualPipe's memory, for -P and -M.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove schedules: complete, in order, messages matched, no deadlock, memory bounded, W in order.

    Exit code 0: proved.  1: refuted, with a story.  2: bad input.  3: a solver gave up.
    """
    from proofs import command

    if all_sizes:
        raise typer.Exit(command.prove_all_sizes(as_json))
    if optimal:
        size = 4 if ranks is None else ranks
        count = 2 * size if microbatches is None else microbatches
        raise typer.Exit(command.prove_optimal(size, count, solver_timeout, as_json))
    options = command.Options(model, max_activations, bytes_for_b, bytes_for_w, smtlib, solver_timeout, as_json)
    sources: list[command.Source]
    if files:
        sources = [(str(path), partial(find_schedule, str(path), ranks, microbatches)) for path in files]
    else:
        value = find_schedule(schedule, ranks, microbatches)
        sources = [(schedule, lambda: value)]
    raise typer.Exit(command.prove_sources(sources, options))


def main() -> NoReturn:
    """The console script: bad input is one line on standard error and exit code 2."""
    try:
        app()
    except (RuleError, OSError) as error:
        typer.echo(f"dualpipe: {error}", err=True)
        sys.exit(2)
    except UndecidedError as error:
        typer.echo(f"dualpipe: {error}", err=True)
        sys.exit(3)
    sys.exit(0)


if __name__ == "__main__":
    main()
