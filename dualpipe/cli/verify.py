"""``dualpipe verify``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dualpipe.cli.app import app, examples
from dualpipe.cli.options import (
    Dtype,
    Json,
    Microbatches,
    Named,
    One,
    Ranks,
    choose,
    find_schedule,
    writable_or_folder,
)
from dualpipe.errors import RuleError

_MEGATRON = "Megatron (--model gpt or moe)"


class Model(StrEnum):
    """What is trained."""

    lm = "lm"
    gpt = "gpt"
    moe = "moe"


def _flag(name: str, told: str) -> Any:
    return typer.Option(name, help=told, rich_help_panel=_MEGATRON)


@app.command(
    epilog=examples(
        "dualpipe verify -P 8 -M 20 --dtype bf16",
        "dualpipe verify mine.txt --steps 1",
        "dualpipe verify --model moe -P 4 --dp 2 --distributed-optimizer",
    )
)
def verify(
    positional: One = None,
    model: Annotated[
        Model, typer.Option(help="lm: a small language model; gpt, moe: Megatron's, against Megatron's own 1F1B.")
    ] = Model.lm,
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
            help="Write what the processes did when, beside the simulation, for ui.perfetto.dev: file or folder.",
            callback=writable_or_folder,
        ),
    ] = None,
    dp: Annotated[int, _flag("--dp", "Data parallel pipelines of DualPipe; 1F1B runs twice as many.")] = 1,
    tp: Annotated[int, _flag("--tp", "Tensor parallel ranks.")] = 1,
    ep: Annotated[int, _flag("--ep", "Expert parallel ranks, out of the data parallel ones.")] = 1,
    sequence_parallel: Annotated[bool, _flag("--sequence-parallel", "Split norms and dropout, too.")] = False,
    overlap_grad_reduce: Annotated[bool, _flag("--overlap-grad-reduce", "Reduce gradients as they appear.")] = False,
    distributed_optimizer: Annotated[bool, _flag("--distributed-optimizer", "Shard the optimizer's state.")] = False,
    recompute: Annotated[bool, _flag("--recompute", "Recompute every layer in the backward.")] = False,
    per_token_loss: Annotated[bool, _flag("--per-token-loss", "Normalise by tokens, not by microbatches.")] = False,
    expert_bias: Annotated[bool, _flag("--expert-bias", "Routers steer by a bias, without an auxiliary loss.")] = False,
    dropout: Annotated[float, _flag("--dropout", "Probability of dropout.")] = 0.0,
    clip: Annotated[
        float | None, _flag("--clip", "Norm to clip gradients to; 0: none.  [default: clips at every step]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on real processes and on fake ranks; compare with plain PyTorch, bit by bit.

    With --model gpt or moe: train a Megatron model with the drop-in, and compare with Megatron's own 1F1B and plain
    PyTorch.

    Exit codes:
    0: every loss, gradient and weight is equal
    1: something differs, or hangs
    2: bad input
    3: the oracle itself failed, so nothing can be said
    130: ended by Ctrl-C
    """
    chosen = choose(positional, schedule)
    small = {f"the schedule {chosen}": chosen != "dualpipe", "--transport": transport != "direct"}
    small |= {"--device": device != "cpu", "--blocking": blocking, "--trace": trace is not None}
    large: dict[str, Any] = {
        "sequence_parallel": sequence_parallel,
        "overlap_grad_reduce": overlap_grad_reduce,
        "distributed_optimizer": distributed_optimizer,
        "recompute": recompute,
        "per_token_loss": per_token_loss,
        "expert_bias": expert_bias,
        "dropout": dropout,
    }
    if model is not Model.lm:
        _refuse(small, f"--model {model} runs DualPipe on Megatron's model and nothing else", "leave it out")
        pp = 4 if ranks is None else ranks
        sizes = {
            "pp": pp,
            "dp": dp,
            "tp": tp,
            "ep": ep,
            "microbatches": 2 * pp if microbatches is None else microbatches,
        }
        training = {"dtype": dtype.value, "clip": clip, "steps": steps, "seed": seed, "timeout": timeout}
        raise typer.Exit(_verify_megatron(model, as_json, **sizes, **large, **training))
    given = {f"--{name.replace('_', '-')}": value for name, value in large.items()}
    given |= {"--dp": dp != 1, "--tp": tp != 1, "--ep": ep != 1, "--clip": clip is not None}
    _refuse(given, "a small language model has no such option", "add --model gpt or --model moe")
    value = find_schedule(chosen, ranks, microbatches)
    from dualpipe.cli.verification import print_report, watch_case
    from reference.verify import make_case
    from reference.verify import verify as run

    case = make_case(value, dtype.value, steps, seed, device, transport, blocking, timeout, trace is not None)
    with watch_case(case, quiet=as_json) as on_progress:
        report = run(case, on_progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        print_report(report)
    if trace is not None:
        from reference.measured import write_trace

        typer.echo(write_trace(report, trace), err=True)
    raise typer.Exit(report.exit_code)


def _refuse(options: dict[str, Any], rule: str, remedy: str) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise RuleError(rule, f"got {', '.join(given)}", remedy)


def _verify_megatron(model: Model, as_json: bool, **options: Any) -> int:
    from dualpipe.cli.verification import print_megatron_report, watch_megatron
    from reference.megatron.case import Case
    from reference.megatron.case import Model as MegatronModel
    from reference.megatron.verify import verify as run

    case = Case(MegatronModel(model.value), **options)
    with watch_megatron(case, quiet=as_json) as on_progress:
        report = run(case, on_progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        print_megatron_report(report)
    return report.exit_code
