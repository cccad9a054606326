"""Measures the bubble: one model of stages that sleep, run by each executor of a pipeline schedule in turn.

    python bench/bubble.py                                  # the whole table, about 8 minutes
    python bench/bubble.py --sizes 4/8 --repeats 1          # a first look, about half a minute

A rank's share of the model sleeps F, B and W for each microbatch (20 ms by default) and computes nearly nothing,
so that many ranks fit on few cores.  Each share is two layers: stages of DualPipe and 1F1B have both, those of a V
have one.  With a delay a message arrives that long after its send was posted: one shim around ``isend`` and
``irecv``, the same for every executor, holds back the receiver's wait.

Executors take turns; what is compared are the ratios within a turn.  Each figure is the time of a step over the work of
a rank, M (F + B + W); ``simulated`` is the same figure of ``dualpipe.timeline.simulate``.  Every step of every executor
is checked: losses and gradients against a plain loop, and that each rank slept for all its work.

ours        dualpipe.pipeline, with late W: none, tail, all
deepseek    DeepSeek's package, dualpipe 1.0.0 of PyPI, in a folder of its own (tests/record/upstream.py)
torch       torch.distributed.pipelining: Schedule1F1B, ScheduleZBVZeroBubble, ScheduleDualPipeV
"""

import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.distributed as dist
import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the tests, which are not installed, fetch DeepSeek's package

from peers.executors import Entrant, deepseek, entrants  # noqa: E402
from peers.truth import check, result_of, truth  # noqa: E402
from sleeping.links import RING, delay_links  # noqa: E402
from sleeping.model import PARTS, SLEPT, Case  # noqa: E402

from dualpipe.schedule.generate import generate  # noqa: E402
from dualpipe.testing.launch import launch  # noqa: E402
from dualpipe.timeline.simulate import Costs, simulate  # noqa: E402
from tests.record import upstream  # noqa: E402


def measure(case: Case, chosen: dict[str, Entrant], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of each executor, after one that is not counted; all of them are checked."""
    times = torch.zeros(case.ranks, case.ranks, RING, dtype=torch.float64).share_memory_()
    work = dict.fromkeys("FBW", PARTS * case.microbatches)

    def body(context):
        torch.set_num_threads(1)
        if case.delay:
            delay_links(times, case.delay)
        executors = {name: entrant.make(case) for name, entrant in chosen.items()}
        steps = defaultdict(list)
        for _ in range(1 + repeats):
            for name, executor in executors.items():
                for module in executor.modules:
                    module.zero_grad()
                SLEPT.clear()
                dist.barrier()
                began = time.monotonic()
                losses = executor.step()
                ended = time.monotonic()
                if work != SLEPT:
                    raise RuntimeError(f"rank {context.rank} of {name} did {dict(SLEPT)} of {work}")
                steps[name].append((began, ended, result_of(executor.modules, losses)))
        dist.barrier()
        for executor in executors.values():
            executor.close()
        return dict(steps)

    ranks = launch(case.ranks, body, timeout=600.0).values()
    idle = Case(case.ranks, case.microbatches, 0.0, 0.0, 0.0, 0.0)
    wanted = truth(idle, PARTS * case.ranks)
    seconds = {}
    for name in chosen:
        seconds[name] = []
        for step in zip(*(rank[name] for rank in ranks), strict=True):
            check(name, [result for *_, result in step], wanted)
            seconds[name].append(max(ended for _, ended, _ in step) - min(began for began, *_ in step))
    return {name: found[1:] for name, found in seconds.items()}


def simulated(case: Case, entrant: Entrant) -> float:
    """The makespan over the work of a rank.  Every latency begins when the send is posted, as that of the shim."""
    schedule = generate(entrant.schedule, case.ranks, case.microbatches)
    costs = Costs(case.F, case.B, case.W, latency=case.delay / (case.ranks / schedule.stages))
    timeline = simulate(schedule, costs, eager=True, blocking=entrant.blocking)
    return timeline.makespan * case.ranks / schedule.stages / case.work


def report(case: Case, seconds: dict[str, list[float]], chosen: dict[str, Entrant]) -> None:
    """A line for each executor: medians with their spread, the simulated figure, and ours against it."""
    unit = case.F
    print(
        f"P={case.ranks} M={case.microbatches}, F=B={unit * 1e3:g} ms, W={case.W / unit:g} F, "
        f"delay {case.delay / unit:g} F, {len(next(iter(seconds.values())))} steps"
    )
    ours = [name for name in seconds if name.startswith("ours")]
    print(
        f"  {'executor':16} {'step/work':>9} {'spread':>13} {'simulated':>9}  " + "  ".join(f"{n:>9}/it" for n in ours)
    )
    for name, times in seconds.items():
        figures = sorted(each / case.work for each in times)
        spread = f"{figures[0]:.3f}-{figures[-1]:.3f}"
        ratios = (median(a / b for a, b in zip(seconds[own], times, strict=True)) for own in ours)
        line = f"  {name:16} {median(figures):9.3f} {spread:>13} {simulated(case, chosen[name]):9.3f}  "
        print(line + "  ".join(f"{ratio:12.3f}" for ratio in ratios), flush=True)


def cases(sizes: str, unit: float, weights: str, delays: str, every: bool) -> list[Case]:
    """W of 1 F with all delays, the other W without one; with ``every``, all combinations."""
    found: list[Case] = []
    for size in sizes.split(","):
        if not re.fullmatch(r"\d+/\d+", size):
            raise typer.BadParameter(f"a size is RANKS/MICROBATCHES, as 4/8; got {size!r}", param_hint="--sizes")
        pairs = [(float(weight), float(delay)) for weight in weights.split(",") for delay in delays.split(",")]
        found += [
            Case(*map(int, size.split("/")), unit, unit, weight * unit, delay * unit)
            for weight, delay in pairs
            if every or weight == 1 or delay == 0
        ]
    return found


def main(
    sizes: Annotated[str, typer.Option(help="Ranks/microbatches, separated by commas.")] = "4/8,4/16,8/16",
    unit: Annotated[float, typer.Option(help="Milliseconds of F and B of a rank's share.")] = 20.0,
    weights: Annotated[str, typer.Option(help="W as multiples of F.")] = "1,0.7,1.3",
    delays: Annotated[
        str, typer.Option(help="Delays of a message as multiples of F; other W than 1 with 0.")
    ] = "0,0.25,0.5",
    every: Annotated[bool, typer.Option("--every", help="All combinations of W and delay.")] = False,
    repeats: Annotated[int, typer.Option(help="Steps of each executor that count, after one that does not.")] = 3,
    executors: Annotated[str, typer.Option(help="Words, separated by commas; executors whose name has one.")] = "",
) -> None:
    package, words = None, [word for word in executors.split(",") if word]
    if not words or any(word in "deepseek" for word in words):
        try:
            package = deepseek()
        except upstream.Unreachable as reason:
            print(f"without DeepSeek's package: {reason}")
    chosen = {
        name: entrant for name, entrant in entrants(package).items() if not words or any(word in name for word in words)
    }
    if not chosen:
        raise typer.BadParameter(
            f"no executor has one of the words {executors!r} in its name", param_hint="--executors"
        )
    began = time.monotonic()
    for case in cases(sizes, unit * 1e-3, weights, delays, every):
        report(case, measure(case, chosen, repeats), chosen)
    print(f"{time.monotonic() - began:.0f} s; every step had the losses and gradients of the plain loop")


if __name__ == "__main__":
    typer.run(main)
