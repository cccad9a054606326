"""``dualpipe record``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualpipe.cli import entrypoint
from dualpipe.cli.app import app, examples
from dualpipe.cli.interrupt import interruptible
from dualpipe.cli.options import Json, Waive, complete_schedule, seconds
from dualpipe.cli.targets import RECORDING, Target, check_targets, signed, target
from dualpipe.errors import RuleError
from dualpipe.schedule import check_name

if TYPE_CHECKING:
    from dualpipe.cli.proving import Against
    from dualpipe.record import Recording
    from proofs.against import Comparison as AgainstOther


class Reduction(StrEnum):
    """How the losses of the microbatches make that of the step."""

    mean = "mean"
    sum = "sum"


@app.command(
    context_settings={"ignore_unknown_options": True},
    options_metavar="[OPTIONS] --",
    epilog=examples(
        "dualpipe record -P 4 -o theirs.txt -- python train.py",
        "dualpipe record --prove -- python spawn_four_ranks.py",
        "dualpipe record -P 4 --prove --compare --against dualpipe -- python train.py",
    ),
)
def record(
    command: Annotated[list[str], typer.Argument(help="The program to run, after --.", metavar="COMMAND")],
    ranks: Annotated[
        int | None,
        typer.Option(
            "-P", "--ranks", min=2, help="Number of ranks; the command is started once for each.", show_default="once"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The schedule file to write.")] = None,
    name: Annotated[str, typer.Option(help="The schedule's name in the file.")] = "recorded",
    step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The training step to write; a step ends with an optimizer step, or when the program has looked at "
            "its gradients and sets them to zero.",
            show_default="the first with an optimizer step",
        ),
    ] = None,
    session: Annotated[
        int, typer.Option(min=1, help="The process group to write, if the program creates several in turn.")
    ] = 1,
    together: Annotated[
        list[str] | None, typer.Option(help="A method that overlaps a forward with a backward; its ops form one slot.")
    ] = None,
    container: Annotated[
        list[str] | None,
        typer.Option(help="A module class that runs the pipeline; its call does not count as a stage's forward."),
    ] = None,
    lanes: Annotated[
        list[str] | None,
        typer.Option(
            help="The ranks of each lane's stages, as in --lanes '0 1 2 3' '3 2 1 0', for a run that ends before its "
            "messages show them; 0.1 is the second module that rank 0 calls.",
            show_default="from the messages",
        ),
    ] = None,
    pipeline_ranks: Annotated[
        str | None,
        typer.Option(
            help="The ranks of one pipeline, such as '0 2', if the job runs several, as with data parallelism.",
            show_default="every pipeline",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until the program is stopped.", callback=seconds)] = 120.0,
    stall: Annotated[
        float,
        typer.Option(help="It counts as a hang if all ranks wait for this many seconds.", callback=seconds),
    ] = 10.0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also run the same modules plainly, without the schedule, and compare gradients and losses.",
        ),
    ] = False,
    clip_norm: Annotated[
        float | None,
        typer.Option(
            help="For --compare: the norm to which the program scales all gradients together.",
            show_default="from its call of clip_grad_norm_",
            min=0.0,
        ),
    ] = None,
    reduction: Annotated[
        Reduction | None,
        typer.Option(
            help="For --compare: what the gradient must be of the losses of all microbatches.", show_default="either"
        ),
    ] = None,
    prove: Annotated[bool, typer.Option("--prove", help="Prove the recorded schedule.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Also name the first op at which each rank departs from this schedule.",
            metavar="SCHEDULE",
            autocompletion=complete_schedule,
        ),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(
            "-M",
            "--microbatches",
            help="For how many microbatches of all lanes together the schedule of --against is made, if the program "
            "fails before it has run all of them.",
            show_default="as recorded",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="For --prove: the model of sends, all, blocking, eager, eager:CAPACITY or stream.")
    ] = "all",
    waive: Waive = None,
    as_json: Json = False,
) -> None:
    """Run a torch.distributed program on CPU and record the schedule that its ranks run.

    With -P the command is started once for each rank, as torchrun does; without -P it launches its ranks itself.
    If the job runs several pipelines, each is recorded: the second one in FILE-2, the third one in FILE-3, and so on.

    Exit codes:
    0: recorded; with --prove, also proved; with --compare, also equal
    1: recorded, but the program failed or hung, or --prove, --compare or --against found something wrong
    2: bad input, or an op could not be named
    3: unknown: with --prove a solver gave up, or with --compare something could not be run plainly
    130: ended by Ctrl-C
    """
    from dualpipe.record import Launch, assemble_all, pipelines, read_folder, run
    from dualpipe.record.comparison import check_expected
    from dualpipe.record.lanes import LANE, parse
    from dualpipe.record.traces import name_ranges

    check_name(name)
    _check_waived(waive or (), prove)
    _check_model(model, prove)
    check_expected(compare, clip_norm, reduction)
    more = takewhile(LANE.fullmatch, command) if lanes else ()
    given = [*(lanes or []), *more]
    routes, command = (parse(given), command[len(given) - len(lanes or []) :]) if lanes else (None, command)
    if not command:
        raise RuleError("what follows -- must be a command", "got none", "add it")
    if command[0].startswith("-"):
        raise RuleError(
            "what follows -- is a command", f"record has no option {command[0]}", "leave it out, or see --help"
        )
    chosen = None if pipeline_ranks is None else pipelines.parse(pipeline_ranks)
    targets = target("--output", output, RECORDING)
    check_targets(
        [*targets, *_further(output, ranks, lanes is not None or chosen is not None)],
        [] if against is None else [against],
    )
    other = None if against is None else _find_against(against, microbatches)
    with tempfile.TemporaryDirectory(prefix="dualpipe-record-") as scratch:
        folder = Path(scratch)
        launch = Launch(
            tuple(command),
            ranks,
            timeout,
            stall,
            together=tuple(together or ()),
            containers=tuple(container or ()),
            plain_step=(step or 0) if compare else None,
        )
        end = run(launch, folder, output=2)
        logs, groups = read_folder(folder, ranks, session, end.succeeded)
        codes = end.codes if ranks is not None else ()
        recordings = assemble_all(logs, name, step, routes, codes, chosen)
        if compare:
            from dualpipe.record.plain import add_comparison

            plain = folder / "plain" / str(session)
            every = recordings if chosen is None else [*recordings, *pipelines.beside(recordings[0], logs, step)]
            recordings = [
                add_comparison(recording, plain, logs, clip_norm, every, reduction) for recording in recordings
            ]
        renamed = name_ranges(logs, recordings[0].pipeline_ranks, routes, codes)
    if groups > 1:
        typer.echo(f"dualpipe: process group {session} of {groups}", err=True)
    ending = [] if end.succeeded else end.describe().splitlines()
    for line in renamed:
        typer.echo(f"dualpipe: {line}", err=True)
    results, exit_codes = [], [0 if end.succeeded else 1]
    for number, recording in enumerate(recordings, start=1):
        failures = [] if prove and not as_json else list(map(str, recording.schedule.failures))  # the report has them
        _report(recording, [*failures, *(ending if number == 1 else ())], end.seconds)
    _write_all(recordings, output)
    for recording in recordings:
        caveats = [*([] if end.succeeded else ["the program failed or was stopped"]), *recording.caveats]
        result = {**recording.as_json(), "caveats": caveats, "exit_codes": end.codes}
        if prove:
            from proofs.models import parse_models
            from proofs.prove import prove as run_checks

            of_ranks = f", ranks {' '.join(map(str, recording.pipeline_ranks))}" if len(recordings) > 1 else ""
            label = name + of_ranks
            report = interruptible(
                partial(run_checks, recording.schedule, parse_models(model), label=label, waive=waive or ())
            )
            exit_codes.append(report.exit_code)
            result["proof"] = report.as_json()
            if not as_json:
                sys.stdout.write(_with_caveats(report.text(), caveats))
        if other is not None:
            departures = _compare_with(other, recording, end.succeeded)
            if departures is not None:
                from proofs import departure_story

                exit_codes.append(departures.exit_code)
                result["against"] = departures.as_json()
                if not as_json:
                    sys.stdout.write(departure_story.text(departures))
        if recording.comparison is not None:
            exit_codes.append(_OF_COMPARISON[recording.comparison.verdict])
            if not as_json:
                sys.stdout.write(recording.comparison.text())
        if output is None and not (prove or compare or against or as_json):
            sys.stdout.write(recording.text())
        results.append(result)
    if as_json:
        print(json.dumps({**results[0], **({"pipelines": results} if len(results) > 1 else {})}))
    raise typer.Exit(_worst(exit_codes))


_OF_COMPARISON = {"equal": 0, "different": 1, "unknown": 3}
"""The exit code for each verdict of a comparison."""


def _worst(codes: Sequence[int]) -> int:
    from proofs.verdict import ExitCode, worst

    return worst(map(ExitCode, codes))


def _report(recording: Recording, ending: Sequence[str], seconds: float) -> None:
    """Print how the program ended, the notes and the sizes."""
    for line in (*ending, *recording.notes):
        typer.echo(f"dualpipe: {line}", err=True)
    typer.echo(f"dualpipe: {recording.summary()}, in {seconds:.1f} s", err=True)


def _numbered(output: Path | None, number: int) -> Path | None:
    """The file of a pipeline: ``theirs.txt`` for the first one, ``theirs-2.txt`` for the second one."""
    return output if output is None or number == 1 else output.with_name(f"{output.stem}-{number}{output.suffix}")


def _further(output: Path | None, ranks: int | None, is_one: bool) -> list[Target]:
    """The files that exist under the names of further pipelines: a job may have one for every two ranks.

    ``is_one`` is whether the options select a single pipeline.
    """
    if output is None or is_one or not output.parent.is_dir():
        return []
    most = len(list(output.parent.iterdir())) + 1 if ranks is None else ranks // 2
    paths = (output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(2, most + 1))
    return [each for path in paths if path.exists() for each in target("--output", path, RECORDING)]


def _write_all(recordings: Sequence[Recording], output: Path | None) -> None:
    """Write the file of every pipeline; print the text of one that fails, so that no result of a long run is lost."""
    failed: RuleError | OSError | None = None
    for number, recording in enumerate(recordings, start=1):
        try:
            for each in target("--output", _numbered(output, number), RECORDING):
                each.write(signed(recording.text()))
        except (RuleError, OSError) as error:
            typer.echo(recording.text(), nl=False)
            failed = failed or error
    if failed is not None:
        raise failed


def _find_against(name: str, microbatches: int | None) -> Against:
    from dualpipe.cli.against import find_against

    return find_against(name, None, microbatches, entrypoint.LIMIT_SECONDS)


def _compare_with(other: Against, recording: Recording, succeeded: bool) -> AgainstOther | None:
    """Where the recording departs from the schedule of ``--against``; ``None`` if the program failed too early."""
    from proofs.against import compare

    try:
        return compare(recording.schedule, other.of(recording.schedule), other.name)
    except RuleError as error:
        if succeeded:
            raise
        typer.echo(f"dualpipe: not compared with {other.name}: {error}", err=True)
        return None


def _check_waived(waive: Sequence[str], prove: bool) -> None:
    """Raise ``RuleError`` for a name that is not a check, and for ``--waive`` without ``--prove``."""
    if not waive:
        return
    from proofs.waivers import waived

    waived(waive)
    if not prove:
        raise RuleError("--waive is for --prove", f"got --waive {waive[0]} alone", "add --prove")


def _check_model(model: str, prove: bool) -> None:
    """Raise ``RuleError`` for a name that is not a model, and for ``--model`` without ``--prove``."""
    if model == "all":
        return
    from proofs.models import parse_models

    parse_models(model)
    if not prove:
        raise RuleError("--model is for --prove", f"got --model {model} alone", "add --prove")


def _with_caveats(report: str, caveats: Sequence[str]) -> str:
    """The report, with the caveats at a verdict of ``proved``."""
    verdict, rest = report.split("\n", 1)
    if caveats and (verdict.endswith(": proved") or ": proved but for " in verdict):
        verdict += " as far as it was recorded: " + "; ".join(caveats)
    return f"{verdict}\n{rest}"
