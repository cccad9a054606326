"""Measures what an executor of a pipeline schedule costs by itself: CPU time of a model that computes nearly nothing.

    python bench/executor.py                            # the whole table, about 3 minutes
    python bench/executor.py --sizes 4/16 --rounds 3    # a first look

Each stage is one linear layer of 16 by 16.  A *stage pass* is F, B and W of one microbatch at one stage.  The executors
take turns, in another order each round; what is compared are the ratios within a round.  Every step of every executor
is checked: losses and gradients against a plain loop.

cpu      microseconds of CPU per stage pass, of all ranks and threads, with messages over gloo
wall     microseconds per stage pass, from the first rank's start to the last one's end, times the ranks
host     the same CPU of one rank alone, whose messages go nowhere and arrive at once; all ranks in turn (torch's
         schedules do not run so)
ratio    the median of the rounds' ratios to DeepSeek's package, with their quartiles

ours        dualpipe.pipeline, through ``Pipeline`` with all features
executor    the same without our transport (host time alone: a transport that does nothing)
floor       autograd alone, which every executor needs (host time alone)
deepseek    DeepSeek's package, dualpipe 1.0.0 of PyPI, in a folder of its own (tests/record/upstream.py)
torch       torch.distributed.pipelining: Schedule1F1B, ScheduleZBVZeroBubble, ScheduleDualPipeV

DeepSeek's package is measured twice: with stock layers, whose whole backward is in B, and as ``deepseek zb`` with
layers that leave their weight gradients to its ``WeightGradStore``, as those of its example do.
"""

import gc
import json
import os
import platform
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import torch.distributed as dist
import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the tests, which are not installed, fetch DeepSeek's package

from peers.executors import DeepSeek, Entrant, Ours, deepseek, entrants  # noqa: E402
from peers.linear import LinearCase  # noqa: E402
from peers.silence import Floor, NoTransport, SilentTransport, silent_group  # noqa: E402
from peers.truth import check, result_of, truth  # noqa: E402

from dualpipe.testing.launch import launch  # noqa: E402
from tests.record import upstream  # noqa: E402

BASE = "deepseek"


@dataclass(frozen=True)
class Turn:
    """Seconds per stage pass of one turn of one executor."""

    cpu: float
    wall: float


def one_turn(executor, steps: int, results: list) -> tuple[float, float, float]:
    """CPU seconds, start and end of some steps; their results are added to ``results``."""
    gc.collect()
    cpu, wall, began = 0.0, 0.0, time.monotonic()
    for _ in range(steps):
        for module in executor.modules:
            module.zero_grad()
        start, at = time.process_time(), time.monotonic()
        losses = executor.step()
        wall += time.monotonic() - at
        cpu += time.process_time() - start
        results.append(result_of(executor.modules, losses))
    return cpu, began, began + wall


def measure(case: LinearCase, chosen: dict[str, Entrant], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Turns of each executor, after one that is not counted; all of them are checked."""
    names = [name for name in chosen if not chosen[name].alone]

    def body(context):
        torch.set_num_threads(1)
        executors = {name: chosen[name].make(case) for name in names}
        turns, results = defaultdict(list), defaultdict(list)
        for number in range(1 + rounds):
            for at in range(len(names)):
                name = names[(at + number) % len(names)]
                dist.barrier()
                turns[name].append(one_turn(executors[name], steps, results[name]))
        dist.barrier()
        for executor in executors.values():
            executor.close()
        return {name: found[1:] for name, found in turns.items()}, dict(results)

    ranks = launch(case.ranks, body, timeout=900.0).values()
    found: dict[str, list[Turn]] = {}
    for name in names:
        stages = chosen[name].stages(case)
        for step in zip(*(results[name] for _, results in ranks), strict=True):
            check(name, step, truth_of(case, stages))
        passes = stages * case.microbatches * steps
        found[name] = [
            Turn(
                sum(cpu for cpu, *_ in turn) / passes,
                max(end - began for _, began, end in turn) * case.ranks / passes,
            )
            for turn in zip(*(turns[name] for turns, _ in ranks), strict=True)
        ]
    return found


TRUTHS: dict[tuple[LinearCase, int], tuple] = {}


def truth_of(case: LinearCase, layers: int):
    if (case, layers) not in TRUTHS:
        TRUTHS[case, layers] = truth(case, layers)
    return TRUTHS[case, layers]


def measure_alone(case: LinearCase, chosen: dict[str, Entrant], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Turns of each executor, one rank after another in a process of its own without the others."""

    names = [name for name in chosen if chosen[name].make_alone]

    def body(context, rank):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # what a rank receives is whatever was in memory
        turns = defaultdict(list)
        with silent_group(rank, case.ranks):
            executors = {name: chosen[name].make_alone(case) for name in names}
            for number in range(1 + rounds):
                for at in range(len(names)):
                    name = names[(at + number) % len(names)]
                    turns[name].append(one_turn(executors[name], steps, []))
            for executor in executors.values():
                executor.close()
        return {name: found[1:] for name, found in turns.items()}

    ranks = [launch(1, partial(body, rank=rank), timeout=900.0, backend=None).values()[0] for rank in range(case.ranks)]
    found: dict[str, list[Turn]] = {}
    for name in names:
        passes = chosen[name].stages(case) * case.microbatches * steps
        found[name] = [
            Turn(sum(cpu for cpu, *_ in turn) / passes, sum(end - began for _, began, end in turn) / passes)
            for turn in zip(*(turns[name] for turns in ranks), strict=True)
        ]
    return found


def contestants(package) -> dict[str, Entrant]:
    """The executors of this table: ours with DualPipe as published, DeepSeek's with stock layers too."""
    found = {name: entrant for name, entrant in entrants(package).items() if not name.startswith(("ours", "deepseek"))}

    def ours(case, transport=None):
        return Ours(case, "dualpipe", transport)

    def executor(case):
        return ours(case, lambda: NoTransport(dist.get_rank(), case.ranks))

    theirs = {}
    if package is not None:
        for name, stock in (("deepseek", True), ("deepseek zb", False)):
            make = partial(DeepSeek, package=package, stock=stock)
            theirs[name] = Entrant(make, "dualpipe", make_alone=make)
    mine = {
        "ours": Entrant(ours, "dualpipe", make_alone=partial(ours, transport=SilentTransport)),
        "executor": Entrant(executor, "dualpipe", make_alone=executor, alone=True),
        "floor": Entrant(Floor, "dualpipe", make_alone=Floor, alone=True),
    }
    return {**mine, **theirs, **found}


def summary(turns: dict[str, list[Turn]], what: str) -> dict[str, dict[str, float]]:
    """For each executor the median in microseconds, and the median and quartiles of its ratios to ``BASE``."""
    base = [getattr(turn, what) for turn in turns.get(BASE, [])]
    found = {}
    for name, those in turns.items():
        values = [getattr(turn, what) for turn in those]
        found[name] = {"us": median(values) * 1e6}
        if base:
            ratios = [value / other for value, other in zip(values, base, strict=True)]
            low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
            found[name] |= {"ratio": median(ratios), "low": low, "high": high}
    return found


def main(
    sizes: Annotated[str, typer.Option(help="Ranks/microbatches, separated by commas.")] = "4/16,2/16",
    rounds: Annotated[int, typer.Option(help="Turns of each executor that count, after one that does not.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps of a turn.")] = 4,
    executors: Annotated[str, typer.Option(help="Words, separated by commas; executors whose name has one.")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="A file for the figures.")] = None,
) -> None:
    package = None
    try:
        package = deepseek()
    except upstream.Unreachable as reason:
        print(f"without DeepSeek's package: {reason}")
    words = [word for word in executors.split(",") if word]
    chosen = {
        name: entrant
        for name, entrant in contestants(package).items()
        if not words or any(word in name for word in words)
    }
    if not chosen:
        raise typer.BadParameter(
            f"no executor has one of the words {executors!r} in its name", param_hint="--executors"
        )
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    figures = {"machine": machine, "rounds": rounds, "steps": steps, "sizes": {}}
    print(f"{machine}; medians of {rounds} rounds of {steps} steps, microseconds per stage pass")
    for size in sizes.split(","):
        if not re.fullmatch(r"\d+/\d+", size):
            raise typer.BadParameter(f"a size is RANKS/MICROBATCHES, as 4/16; got {size!r}", param_hint="--sizes")
        case = LinearCase(*map(int, size.split("/")))
        both, alone = measure(case, chosen, rounds, steps), measure_alone(case, chosen, rounds, steps)
        columns = {"cpu": summary(both, "cpu"), "wall": summary(both, "wall"), "host": summary(alone, "cpu")}
        figures["sizes"][size] = columns
        print(f"P={case.ranks} M={case.microbatches}")
        print(f"  {'':16}" + "".join(f"{what:>8} {'ratio':>6} {'quartiles':>11}" for what in columns))
        for name in chosen:
            print(f"  {name:16}" + "".join(cell(column.get(name)) for column in columns.values()), flush=True)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")
    print("every step over gloo had the losses and gradients of the plain loop")


def cell(found: dict[str, float] | None) -> str:
    if found is None:
        return f"{'-':>8} {'':6} {'':11}"
    if "ratio" not in found:
        return f"{found['us']:8.0f} {'':6} {'':11}"
    return f"{found['us']:8.0f} {found['ratio']:6.2f} {found['low']:5.2f}-{found['high']:<5.2f}"


if __name__ == "__main__":
    typer.run(main)
