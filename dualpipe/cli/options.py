"""The options that several commands share, and how they name a schedule."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dualpipe.errors import RuleError
from dualpipe.generate import PLANS, generate
from dualpipe.schedule import Schedule
from dualpipe.schedulefile import load

NAMES = ", ".join(PLANS)
Ranks = Annotated[int | None, typer.Option("-P", "--ranks", help="Pipeline size.", show_default="4, or the file's")]
Microbatches = Annotated[
    int | None, typer.Option("-M", "--microbatches", help="Microbatches, all lanes.", show_default="2P, or the file's")
]
Named = Annotated[str, typer.Option("--schedule", help=f"{NAMES}, or a schedule file.")]
Blocking = Annotated[bool, typer.Option("--blocking", help="A message slot waits until all its messages met.")]
Cost = Annotated[
    str | None,
    typer.Option(
        help="F, B, W; BW: a full backward; FB: an overlapped pair; latency: of a message.",
        metavar="NAME=NUMBER,...",
        show_default="F=1,B=1,W=1",
    ),
]
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
