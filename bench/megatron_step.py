"""Measures a training step on Megatron: DualPipe, DualPipeV and Megatron's own 1F1B, side by side on a CPU.

    python bench/megatron_step.py                          # P = 2 and 4, about four minutes
    python bench/megatron_step.py --sizes 2/8 --rounds 1   # a first look

All train one model (a GPT of two layers for each rank, hidden size 128) on the same M microbatches, with P ranks and no
data parallelism.  DualPipe has two replicas of each stage, so a rank holds twice the parameters.

Implementations take turns, each in new processes.  A round gives for each the median step of its processes: CPU seconds
of all ranks, wall seconds of the slowest rank, and the most memory that a rank held beyond what it held before the
model was built.  A ratio is to 1F1B in the same round; printed are its median over the rounds, the smallest and the
largest.  The mean loss of every step of DualPipe must be that of 1F1B, up to rounding.  DualPipeV's is not compared:
Megatron seeds the weights of each stage by its number, so twice as many stages start with other weights.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, machine

from dualpipe.testing.launch import launch
from reference.megatron import data, production, truth
from reference.megatron.case import Case
from reference.megatron.training import finalize_model_grads, forward_step

BASE = "1F1B"
_ROUNDING = 1e-3
_RUNS = Callable[[Case, Any], list["Step"]]


class Sized(Case):
    """A model whose layers take milliseconds."""

    hidden = 128
    sequence = 64
    vocabulary = 256


class Straight(Sized):
    """Of 1F1B: a stage on each rank, and one lane."""

    lanes = 1

    @property
    def stages(self) -> int:
        return self.pp


@dataclass(frozen=True)
class Step:
    """One step on one rank; ``memory`` in bytes, ``loss`` the sum over this rank's microbatches and their number."""

    cpu: float
    wall: float
    memory: int
    loss: tuple[float, int]


def parties(ranks: int, microbatches: int, steps: int) -> dict[str, tuple[Case, Any]]:
    """By name, the case and the implementation that runs it; all have the same layers."""
    sizes = {"pp": ranks, "microbatches": microbatches, "steps": steps}
    layout = "|".join(["Ett", *["tt"] * (ranks - 2), "ttL"])
    folded = "|".join(["Et", *["t"] * (2 * ranks - 2), "tL"])
    return {
        BASE: (Straight(layout=layout, **sizes), truth),
        "DualPipe": (Sized(layout=layout, **sizes), production),
        "DualPipe, late W": (Sized(layout=layout, late_w="all", **sizes), production),
        "DualPipeV": (Sized(layout=folded, schedule="dualpipev", **sizes), production),
    }


def timed(case: Case, chunks: Any, optimizer: Any, schedule: Any, batches: Any, reports: bool, **_: Any) -> list[Step]:
    """In place of ``reference.megatron.training.train``: the same loop, which measures instead of recording."""
    config = chunks[0][1].config
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    steps = []
    for number in range(case.steps):
        dist.barrier()
        cpu, wall = time.process_time(), time.monotonic()
        for _, chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        store = schedule(forward_step, batches(number))
        optimizer.step()
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        losses = [entry["lm loss"] for entry in store] if reports else []
        loss = (float(sum(total / tokens for total, tokens in losses)), len(losses))
        steps.append(Step(cpu, wall, _memory(), loss))
    return steps


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(case: Case, module: Any) -> list[list[Step]]:
    """Train in new processes; returns the steps of each rank.  The first step is not counted."""

    def body(context: Any) -> list[tuple[Any, ...]]:
        torch.set_num_threads(1)
        module.train = timed
        before = _memory()
        steps: list[Any] = module.run_rank(case, context)
        return [astuple(replace(step, memory=step.memory - before)) for step in steps]

    return [[Step(*step) for step in rank] for rank in launch(module.ranks(case), body, 600.0).values()]


def same_microbatches() -> None:
    """Number microbatches as they come from the data, whatever lane they are for."""
    real = data.batch

    def batch(case: Case, step: int, replica: int, number: int) -> data.Batch:
        found = real(case, step, 0, case.lanes * number + replica)
        return found._replace(replica=replica, number=number)

    data.batch = batch


def figures(ranks: list[list[Step]]) -> dict[str, float]:
    """The median step after the first."""
    counted = list(zip(*ranks, strict=True))[1:]
    return {
        "cpu": median(sum(step.cpu for step in each) for each in counted),
        "wall": median(max(step.wall for step in each) for each in counted),
        "memory": max(step.memory for step in counted[-1]),
    }


def mean_losses(ranks: list[list[Step]]) -> Iterator[float]:
    for each in zip(*ranks, strict=True):
        yield sum(step.loss[0] for step in each) / sum(step.loss[1] for step in each)


def measure(size: str, rounds: int, steps: int) -> dict[str, Any]:
    """The figures of each implementation by round; raises if one trains otherwise than 1F1B."""
    chosen = parties(*map(int, size.split("/")), steps)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        losses: dict[str, list[float]] = {}
        for name, (case, module) in chosen.items():
            measured = run(case, module)
            losses[name] = list(mean_losses(measured))
            found.setdefault(name, []).append(figures(measured))
            same = case.layers_of_stages == chosen[BASE][0].layers_of_stages
            if same and not all(
                math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip(losses[name], losses[BASE], strict=True)
            ):
                raise SystemExit(f"{name} at {size}: losses {losses[name]} instead of {losses[BASE]}")
    return {"size": size, "rounds": found}


def show(measured: dict[str, Any]) -> None:
    found = measured["rounds"]
    print(f"\nP/M = {measured['size']}; ratios to 1F1B of the same round: median (smallest to largest)")
    print(f"{'':18} {'CPU s':>7} {'ratio':>20}  {'wall s':>7} {'ratio':>20}  {'MiB a rank':>10} {'ratio':>6}")
    for name, rows in found.items():
        cells = [f"{name:18}"]
        for kind in ("cpu", "wall"):
            ratios = [row[kind] / base[kind] for row, base in zip(rows, found[BASE], strict=True)]
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells.append(f"{median(row[kind] for row in rows):7.2f} {spread:>20} ")
        memory, base = (median(row["memory"] for row in each) for each in (rows, found[BASE]))
        cells.append(f"{memory / 2**20:10.0f} {memory / base:6.2f}")
        print(" ".join(cells), flush=True)


def main(
    sizes: Annotated[str, typer.Option(help="Ranks/microbatches, separated by commas.")] = "2/8,4/16",
    rounds: Annotated[int, typer.Option(help="Turns of every implementation.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of a turn; the first is not counted.")] = 6,
    output: Annotated[Path | None, typer.Option(help="Write the figures of every round to this file, as JSON.")] = None,
) -> None:
    same_microbatches()
    print(describe(machine()))
    results = []
    for size in sizes.split(","):
        results.append(measure(size, rounds, steps))
        show(results[-1])
    print("every step of DualPipe had the mean loss of 1F1B's")
    if output is not None:
        output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
