"""``dualpipe verify``."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dualpipe.cli import options
from dualpipe.cli.app import app, examples
from dualpipe.cli.entrypoint import LIMIT_SECONDS
from dualpipe.cli.targets import TRACE, check_targets, target
from dualpipe.errors import RuleError
from dualpipe.schedule import COLLECTIVES, COMPUTE, MESSAGES, Schedule
from dualpipe.schedule.generate import LateW, with_late_w

_MEGATRON = "Megatron (--model gpt, moe or deepseek)"


class Model(StrEnum):
    """The model to train."""

    lm = "lm"
    gpt = "gpt"
    moe = "moe"
    deepseek = "deepseek"


class Part(StrEnum):
    """A part of the miniature of DeepSeek-V3."""

    mla = "mla"
    groups = "groups"
    shared = "shared"
    bias = "bias"
    dense = "dense"
    mtp = "mtp"
    layout = "layout"


def _flag(name: str, text: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=_MEGATRON)


@app.command(
    epilog=examples(
        "dualpipe verify -P 8 -M 20 --dtype bf16",
        "dualpipe verify mine.txt --steps 1",
        "dualpipe verify --model moe -P 4 --dp 2 --distributed-optimizer",
    )
)
def verify(
    positional: options.ScheduleArgument = None,
    model: Annotated[
        Model,
        typer.Option(
            help="lm: a small language model; gpt, moe, deepseek: Megatron's models, compared with its own 1F1B."
        ),
    ] = Model.lm,
    ranks: options.Ranks = None,
    microbatches: options.Microbatches = None,
    schedule: options.ScheduleOption = "dualpipe",
    late_w: options.LateWOption = LateW.none,
    dtype: Annotated[options.Dtype, typer.Option(help="Weights and activations.")] = options.Dtype.fp32,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the data and the fake ranks' interleaving.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    transport: Annotated[
        str, typer.Option(help="direct; or staged, through pinned host memory, for several ranks on one GPU.")
    ] = "direct",
    blocking: Annotated[
        bool, typer.Option("--blocking", help="Wait at each message slot until all its messages are matched.")
    ] = False,
    overlap: Annotated[
        bool,
        typer.Option("--overlap", help="Run the F&B pairs of the schedule as one unit, by a method of the stages."),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a message before reporting a hang.")] = 60.0,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="File or folder for a trace of the processes and of the simulation, for ui.perfetto.dev.",
        ),
    ] = None,
    dp: Annotated[int, _flag("--dp", "Data parallel pipelines of DualPipe; 1F1B runs twice as many.")] = 1,
    tp: Annotated[int, _flag("--tp", "Tensor parallel ranks.")] = 1,
    ep: Annotated[int, _flag("--ep", "Expert parallel ranks, taken from the data parallel ones.")] = 1,
    cp: Annotated[int, _flag("--cp", "Context parallel ranks, for --model deepseek.")] = 1,
    sequence_parallel: Annotated[
        bool, _flag("--sequence-parallel", "Split norms and dropout over the tensor parallel ranks, too.")
    ] = False,
    overlap_grad_reduce: Annotated[
        bool, _flag("--overlap-grad-reduce", "Reduce gradients while the backward runs.")
    ] = False,
    overlap_moe: Annotated[
        bool, _flag("--overlap-moe", "Run F&B pairs through Megatron's plan for experts; needs --ep.")
    ] = False,
    distributed_optimizer: Annotated[bool, _flag("--distributed-optimizer", "Shard the optimizer's state.")] = False,
    optimizer_instances: Annotated[
        int, _flag("--optimizer-instances", "Whole copies of the distributed optimizer's state; must divide --dp.")
    ] = 1,
    recompute: Annotated[bool, _flag("--recompute", "Recompute every layer in the backward.")] = False,
    per_token_loss: Annotated[bool, _flag("--per-token-loss", "Normalise by tokens instead of microbatches.")] = False,
    expert_bias: Annotated[
        bool, _flag("--expert-bias", "Balance experts by a router bias, without an auxiliary loss.")
    ] = False,
    variable_lengths: Annotated[
        bool, _flag("--variable-lengths", "Give the microbatches sequences of different lengths.")
    ] = False,
    global_aux_loss: Annotated[
        bool, _flag("--global-aux-loss", "Balance experts over the tokens of all replicas.")
    ] = False,
    qk_clip: Annotated[
        bool, _flag("--qk-clip", "Clip query and key weights by the largest attention logits; needs --dtype bf16.")
    ] = False,
    mtp: Annotated[int, _flag("--mtp", "Multi-token prediction (MTP) layers.")] = 0,
    tied: Annotated[bool, _flag("--tied", "Tie the output layer to the embedding.")] = False,
    layout: Annotated[
        str | None,
        _flag("--layout", "Layers of each stage, such as Et|tt|ttmL: E embedding, t decoder, m MTP, L loss."),
    ] = None,
    without: Annotated[
        list[Part] | None,
        _flag(
            "--without",
            "Leave a part out of --model deepseek: latent attention, groups of experts, the shared expert, the router "
            "bias, the dense first layer, the multi-token prediction layer, or the uneven layout.",
        ),
    ] = None,
    dropout: Annotated[float, _flag("--dropout", "Probability of dropout.")] = 0.0,
    clip: Annotated[
        float | None,
        _flag("--clip", "Norm to clip gradients to; 0 turns clipping off.  [default: so small that every step clips]"),
    ] = None,
    entry_timeout: options.EntryTimeout = LIMIT_SECONDS,
    as_json: options.Json = False,
) -> None:
    """Train on real processes and on fake ranks, and compare both with plain PyTorch, bit by bit.

    With --model gpt, moe or deepseek: train a Megatron model with the drop-in (dualpipe or dualpipev) and with plain
    PyTorch, and compare both with Megatron's own 1F1B.

    Exit codes:
    0: every loss, gradient and weight is equal
    1: something differs, or hangs
    2: bad input
    3: the oracle itself failed, so nothing can be compared
    130: ended by Ctrl-C
    """
    named = options.choose(positional, schedule)
    chosen = with_late_w(named, late_w)
    small = {f"the schedule {named}": named not in ("dualpipe", "dualpipev"), "--transport": transport != "direct"}
    small |= {"--device": device != "cpu", "--blocking": blocking, "--overlap": overlap}
    small |= {"--trace": trace is not None}
    large: dict[str, Any] = {
        "sequence_parallel": sequence_parallel,
        "overlap_grad_reduce": overlap_grad_reduce,
        "overlap_moe": overlap_moe,
        "distributed_optimizer": distributed_optimizer,
        "recompute": recompute,
        "per_token_loss": per_token_loss,
        "expert_bias": expert_bias,
        "variable_lengths": variable_lengths,
        "global_aux_loss": global_aux_loss,
        "qk_clip": qk_clip,
        "mtp": mtp,
        "tied": tied,
        "layout": layout,
        "without": [part.value for part in without or ()],
        "dropout": dropout,
    }
    if model is not Model.lm:
        _refuse(
            small, f"--model {model} runs dualpipe or dualpipev on Megatron's model and nothing else", "leave it out"
        )
        pp = 4 if ranks is None else ranks
        sizes = {
            "pp": pp,
            "dp": dp,
            "tp": tp,
            "ep": ep,
            "cp": cp,
            "instances": optimizer_instances,
            "microbatches": 2 * pp if microbatches is None else microbatches,
        }
        large |= {"late_w": late_w.value, "schedule": named}
        training = {"dtype": dtype.value, "clip": clip, "steps": steps, "seed": seed, "timeout": timeout}
        raise typer.Exit(_verify_megatron(model, as_json, **sizes, **large, **training))
    given = {f"--{name.replace('_', '-')}": value for name, value in large.items()}
    given |= {
        "--optimizer-instances": optimizer_instances != 1,
        "--dp": dp != 1,
        "--tp": tp != 1,
        "--ep": ep != 1,
        "--cp": cp != 1,
        "--clip": clip is not None,
    }
    _refuse(given, "a small language model has no such option", "add --model gpt, --model moe or --model deepseek")
    into_folder = trace is not None and trace.is_dir()
    traces = [] if into_folder else target("--trace", trace, TRACE)
    check_targets(traces, [chosen])
    value = options.find_schedule(chosen, ranks, microbatches, entry_timeout)
    if any(placed.op.kind in COLLECTIVES for placed in value):
        typer.echo(
            "dualpipe: the collectives of the schedule are left out; gradients are summed after the step", err=True
        )
        value = value.only(COMPUTE | MESSAGES)
    if into_folder and trace is not None:
        traces = target("--trace", trace / _trace_name(value), TRACE)
        check_targets(traces, [chosen])
    if transport not in ("direct", "staged"):
        raise RuleError("--transport must be direct or staged", f"got {transport}", "use one of them")
    from dualpipe.cli.verification import print_case_report, watch_case
    from reference.case import DTYPES, Case
    from reference.model import ModelConfig
    from reference.verify import verify as run

    config = ModelConfig(dtype=DTYPES[dtype.value])
    case = Case(
        value, config, steps, seed, device, transport == "staged", blocking, timeout, trace is not None, overlap
    )
    with watch_case(case, quiet=as_json) as on_progress:
        report = run(case, on_progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        print_case_report(report)
    for each in traces:
        from reference.measured import trace_of

        text = trace_of(report)
        if text is None:
            typer.echo("no trace was written, because the processes did not finish", err=True)
        else:
            each.write(text)
            typer.echo(f"trace written to {each.path}", err=True)
    raise typer.Exit(report.exit_code)


def _trace_name(schedule: Schedule) -> str:
    """The file name of a trace in a folder.  A slash in the schedule's name must not lead out of the folder."""
    name = schedule.name.replace(os.sep, "-").lstrip(".") or "schedule"
    return f"{name}-P{schedule.ranks}-M{sum(schedule.microbatches.values())}.json"


def _refuse(settings: dict[str, Any], rule: str, fix: str) -> None:
    given = [name for name, value in settings.items() if value]
    if given:
        raise RuleError(rule, f"got {', '.join(given)}", fix)


def _verify_megatron(model: Model, as_json: bool, **settings: Any) -> int:
    from dualpipe.cli.verification import print_megatron_report, watch_megatron
    from reference.megatron.case import Case
    from reference.megatron.case import Model as MegatronModel
    from reference.megatron.case import Part as MegatronPart
    from reference.megatron.verify import verify as run

    settings["without"] = tuple(map(MegatronPart, settings["without"]))
    case = Case(MegatronModel(model.value), **settings)
    with watch_megatron(case, quiet=as_json) as on_progress:
        report = run(case, on_progress)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        print_megatron_report(report)
    return report.exit_code
