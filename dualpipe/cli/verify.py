"""``dualpipe verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.cli.app import app, examples
from dualpipe.cli.options import Dtype, Json, Microbatches, Named, One, Ranks, choose, find_schedule


@app.command(epilog=examples("dualpipe verify -P 8 -M 20 --dtype bf16", "dualpipe verify mine.txt --steps 1"))
def verify(
    positional: One = None,
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
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what the processes did when, beside the simulation, for ui.perfetto.dev: file or folder."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small language model on real processes and on fake ranks; compare with plain PyTorch, bit by bit.

    Exit codes:
    0: every loss, gradient and weight is equal
    1: something differs, or hangs
    2: bad input
    3: the oracle itself failed, so nothing can be said
    """
    value = find_schedule(choose(positional, schedule), ranks, microbatches)
    from reference.verify import make_case
    from reference.verify import verify as run
    from reference.watch import tell, watch

    case = make_case(value, dtype.value, steps, seed, device, transport, blocking, timeout, trace is not None)
    with watch(case, quiet=as_json) as on_progress:
        report = run(case, on_progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        tell(report)
    if trace is not None:
        from reference.measured import write_trace

        typer.echo(write_trace(report, trace), err=True)
    raise typer.Exit(report.exit_code)
