"""The options that several commands share, and how a name becomes a schedule."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.cli import entrypoint
from dualpipe.errors import RuleError, nearest
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import NAMES as SCHEDULES
from dualpipe.schedule.generate import LateW, generate, with_late_w
from dualpipe.schedule.text import load

NAMES = "dualpipe, dualpipev (both also with -late-tail, -late-all), " + ", ".join(
    name for name in SCHEDULES if not name.startswith("dualpipe")
)
"""The named schedules; those with late W also follow from ``--late-w``."""
MAX_SECONDS = 1_000_000
MIN_GIBIBYTES, MAX_GIBIBYTES = 0.2, 100_000
_MAX_NAME_BYTES = 255
"""The length limit of file names on all common file systems of Linux."""


def complete_schedule(incomplete: str) -> list[str]:
    """The names that a shell offers for a schedule; if none matches, the shell completes file names instead."""
    return [name for name in SCHEDULES if name.startswith(incomplete)]


def seconds(option: typer.CallbackParam, value: float | None) -> float | None:
    """Reject timeouts that are not positive, or too long for the clock."""
    if value is not None and not 0 < value <= MAX_SECONDS:
        raise RuleError(
            f"{option.opts[-1]} is more than 0 and at most {MAX_SECONDS} seconds",
            f"got {value:g}",
            "give a number in this range",
        )
    return value


def gibibytes(option: typer.CallbackParam, value: float | None) -> float | None:
    """Reject memory limits in which Z3 cannot even start."""
    if value is not None and not MIN_GIBIBYTES <= value <= MAX_GIBIBYTES:
        raise RuleError(
            f"{option.opts[-1]} must be {MIN_GIBIBYTES} to {MAX_GIBIBYTES} GiB",
            f"got {value:g}",
            "give a number in this range",
        )
    return value


Ranks = Annotated[
    int | None,
    typer.Option("-P", "--ranks", help="Number of ranks; by default 4, or as in the file.", show_default=False),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        "-M",
        "--microbatches",
        help="Number of microbatches of all lanes together; by default 2P, or as in the file.",
        show_default=False,
    ),
]
ScheduleOption = Annotated[
    str,
    typer.Option("--schedule", help=f"{NAMES}, a schedule file or module:function.", autocompletion=complete_schedule),
]
_ARGUMENT = typer.Argument(
    metavar="SCHEDULE",
    help=f"A schedule file, a table (.csv), module:function, or {NAMES}.",
    show_default=False,
    autocompletion=complete_schedule,
)
ScheduleArgument = Annotated[str | None, _ARGUMENT]
ScheduleArguments = Annotated[list[str] | None, _ARGUMENT]
LateWOption = Annotated[
    LateW,
    typer.Option(
        "--late-w", help="Of DualPipe and DualPipeV: run W after the messages of its B, in the last phases or always."
    ),
]
Blocking = Annotated[
    bool, typer.Option("--blocking", help="Wait at each message slot until all its messages are matched.")
]
Cost = Annotated[
    str | None,
    typer.Option(
        help="Times of F, B, W, a full backward (BW), an F&B pair (FB), the latency of a message, and "
        "collectives (AA, AR, US, RS, RG; 0 if not given).",
        metavar="NAME=NUMBER,...",
        show_default="F=1,B=1,W=1",
    ),
]
EntryTimeout = Annotated[
    float, typer.Option("--entry-timeout", help="Seconds that module:function may take.", callback=seconds)
]
Waive = Annotated[
    list[str] | None,
    typer.Option(
        help="A check that does not count for the verdict, such as accumulation; it is made and reported all the same.",
        metavar="CHECK",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class Dtype(StrEnum):
    """The dtypes that verification supports."""

    fp32 = "fp32"
    fp64 = "fp64"
    bf16 = "bf16"


def choose(positional: str | None, named: str, late_w: LateW = LateW.none) -> str:
    """The name of the schedule, from the argument or from ``--schedule``, and of its variant with late W.

    Raises ``RuleError`` if both names are given, or if the schedule has no such variant.
    """
    if positional is not None and named != "dualpipe":
        raise RuleError(
            "give one schedule, as argument or with --schedule, not both",
            f"got {positional} and --schedule {named}",
            "leave one of them out",
        )
    return with_late_w(named if positional is None else positional, late_w)


def find_schedule(
    name: str, ranks: int | None, microbatches: int | None, entry_timeout: float = entrypoint.LIMIT_SECONDS
) -> Schedule:
    """The schedule of a name that must refer to exactly one; see ``find_schedules``."""
    found = find_schedules(name, ranks, microbatches, entry_timeout)
    if len(found) > 1:
        raise RuleError(
            "this command takes one schedule", f"{name} returns {len(found)}", "name a function that returns one"
        )
    return found[0]


def find_schedules(
    name: str, ranks: int | None, microbatches: int | None, entry_timeout: float = entrypoint.LIMIT_SECONDS
) -> list[Schedule]:
    """The schedules that a name refers to.

    The name is one of the named ones, which is generated for the given sizes; a file; or ``module:function``.
    If ``ranks`` or ``microbatches`` are given, the schedules of a file or a function must have these sizes.
    The function may take ``entry_timeout`` seconds.
    """
    if name in SCHEDULES:
        size = 4 if ranks is None else ranks
        return [generate(name, size, 2 * size if microbatches is None else microbatches)]
    path = Path(name)
    if not name:
        raise RuleError(f"a schedule must be {NAMES}, a file or module:function", "got an empty name", "give a name")
    if path.name and len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
        raise RuleError(
            f"the name of a file may have at most {_MAX_NAME_BYTES} bytes",
            f"got {len(os.fsencode(path.name))} bytes: {name[:40]}...",
            "name a file, not its content",
        )
    if path.is_dir():
        raise RuleError(
            f"a schedule must be {NAMES}, a file or module:function", f"{name} is a folder", "name a file in it"
        )
    if path.exists():
        found = [read_schedule(path)]
    elif entrypoint.is_entry_point(name):
        found = entrypoint.call(name, ranks, microbatches, entry_timeout)
    else:
        near = [*SCHEDULES, *(file.name for file in path.parent.glob("*") if path.parent == Path() and file.is_file())]
        raise RuleError(
            f"a schedule must be {NAMES}, a file or module:function",
            f"got {name}, and no such file exists",
            nearest(name, near, "correct it"),
        )
    for schedule in found:
        _check_sizes(name, schedule, ranks, microbatches)
    return found


def _check_sizes(name: str, schedule: Schedule, ranks: int | None, microbatches: int | None) -> None:
    sizes = {"-P": (ranks, schedule.ranks), "-M": (microbatches, sum(schedule.microbatches.values()))}
    for option, (asked, has) in sizes.items():
        if asked not in (None, has):
            raise RuleError(
                "a schedule file or an entry point has its own sizes",
                f"{name} has {has}, {option} asks for {asked}",
                f"leave {option} out",
            )


def read_schedule(path: Path) -> Schedule:
    """Read a schedule file, or, if the name ends in ``.csv``, a table of torch.distributed.pipelining."""
    try:
        if path.suffix == ".csv":
            from dualpipe.schedule.torch_table import load_csv

            return load_csv(path)
        return load(path)
    except OSError as error:
        raise RuleError(
            "a schedule must be a file that can be read",
            f"{path}: {error.strerror or error}",
            "name another file, or make it readable",
        ) from error
