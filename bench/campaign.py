"""A stress test: kills, stops, delays and exceptions at random moments of random runs; then a long run with delays.

    python bench/campaign.py --trials 60 --steps 1000

Each trial trains a pipeline in a loop that catches every error and goes on.  One rank has a fault, in half of the
trials after a random op of a step, in the others at a random time, so also while the messages of a slot are posted.
The other ranks must behave like this:

delay         every step returns the right gradients
exception     an error within seconds, and an error at every later call
kill, stop    likewise; for a stop within the timeout

No gradient of a step that returned may differ from plain PyTorch's.  In the long run every rank sleeps after random
ops; it compares every step bitwise and prints memory, threads and open files four times.  Exits with 1 if any of this
fails.
"""

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import typer
from torch import nn

from dualpipe.pipeline import Feed, Pipeline, ProcessGroupTransport, TensorSpec
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import Failure, launch

WIDTH, BATCH, STEPS = 8, 3, 4


@dataclass(frozen=True)
class Trial:
    """One rank has the fault ``what``: after op number ``at`` of a step, modulo the number of its ops.

    If ``at`` is a fraction: after that part of a step's time.
    """

    name: str
    ranks: int
    microbatches: int
    what: str
    rank: int
    step: int
    at: int | float
    timeout: float

    @property
    def schedule(self) -> Schedule:
        return generate(self.name, self.ranks, self.microbatches)


def draw(chance: random.Random, timeout: float) -> Trial:
    name = chance.choice(["dualpipe", "dualpipe", "dualpipev", "1f1b", "zb1p"])
    ranks = chance.choice([2, 4, 6])
    microbatches = 2 * ranks + 2 * chance.randrange(4)
    what = chance.choice(["kill", "stop", "delay", "exception"])
    rank, step = chance.randrange(ranks), chance.randrange(STEPS - 1)
    if chance.random() < 0.5:
        return Trial(name, ranks, microbatches, what, rank, step, chance.randrange(40), timeout)
    return Trial(name, ranks, microbatches, what, rank, max(1, step), chance.uniform(0.02, 0.9), timeout)


def stage_of(number: int) -> nn.Module:
    torch.manual_seed(number)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def feed_of(schedule: Schedule, step: int) -> Feed:
    torch.manual_seed(1000 + step)
    inputs = {lane: [(torch.randn(BATCH, WIDTH),) for _ in range(n)] for lane, n in schedule.microbatches.items()}
    return Feed(inputs, {lane: [()] * len(given) for lane, given in inputs.items()})


_TRUTHS: dict[int, list[list[torch.Tensor]]] = {}


def truth(schedule: Schedule, step: int) -> list[list[torch.Tensor]]:
    """Gradients of each stage: the sum over the first lane, plus that over the second.  Cached for one schedule."""
    if step not in _TRUTHS:
        _TRUTHS[step] = _truth(schedule, step)
    return _TRUTHS[step]


def _truth(schedule: Schedule, step: int) -> list[list[torch.Tensor]]:
    feed, sums = feed_of(schedule, step), []
    for lane in schedule.lanes:
        stages = [stage_of(number) for number in range(schedule.stages)]
        for (x,) in feed.inputs[lane]:
            for stage in stages:
                x = stage(x)
            x.square().mean().backward()
        sums.append([[p.grad for p in stage.parameters()] for stage in stages])
    return [[sum(rest, first) for first, *rest in zip(*lanes, strict=True)] for lanes in zip(*sums, strict=True)]


def pipeline_of(schedule: Schedule, timeout: float, observe=None) -> Pipeline:
    rank = dist.get_rank()
    stages = {
        (lane, stage): stage_of(stage)
        for lane, route in schedule.routes.items()
        for stage, holder in enumerate(route)
        if holder == rank
    }
    boundary = [TensorSpec((BATCH, WIDTH), torch.float32)]
    transport = ProcessGroupTransport(timeout=timeout)
    return Pipeline(schedule, stages, lambda y: y.square().mean(), boundary, transport, observe=observe)


def wrong(pipeline: Pipeline, schedule: Schedule, step: int) -> bool:
    return not all(
        torch.equal(parameter.grad, wanted)
        for (_, stage), module in pipeline.stages.items()
        for parameter, wanted in zip(module.parameters(), truth(schedule, step)[stage], strict=True)
    )


def stop_for(seconds: float) -> None:
    """Stop this process; a child kills it after that time."""
    stopped = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(stopped, signal.SIGKILL)
        os._exit(0)
    os.kill(stopped, signal.SIGSTOP)


class Fault:
    """The fault of a trial, on its rank."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.struck, self.seconds = trial, False, 0.0

    def strike(self, *_: object) -> None:
        self.struck = True
        if self.trial.what == "exception":
            raise ValueError("planted")
        if self.trial.what == "delay":
            time.sleep(self.trial.timeout / 3)
        elif self.trial.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            stop_for(self.trial.timeout + 8.0)

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """A context in which to run a step.  If the trial has its fault at this step, the fault strikes in time.

        If the step ends too early, the fault strikes in the next one.  None strikes in the last step, since no other
        rank may wait for the end of that.
        """
        trial, began = self.trial, time.monotonic()
        if isinstance(trial.at, int) or not trial.step <= step < STEPS - 1 or self.struck:
            yield
            self.seconds = time.monotonic() - began
            return
        seconds = trial.at * self.seconds
        if trial.what in ("kill", "stop"):  # from a thread: a handler of signals waits for the end of a call
            timer = threading.Timer(seconds, self.strike)
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
            return
        signal.signal(signal.SIGALRM, self.strike)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def run(trial: Trial) -> str:
    """Run a trial; returns what went wrong, an empty text if nothing did."""
    schedule = trial.schedule

    def body(context):
        now, ops = [0], [0]
        target = trial.at % sum(len(slot) for slot in schedule.programs[trial.rank])
        fault = Fault(trial) if context.rank == trial.rank else None

        def observe(slot, op, began, ended):
            ops[0] += 1
            if fault and isinstance(trial.at, int) and (now[0], ops[0]) == (trial.step, target + 1):
                fault.strike()

        pipeline = pipeline_of(schedule, trial.timeout, observe)
        outcomes, longest = [], 0.0
        for step in range(STEPS):
            now[0], ops[0] = step, 0
            for module in pipeline.stages.values():
                module.zero_grad()
            started = time.monotonic()
            try:
                with fault.during(step) if fault else nullcontext():
                    pipeline.step(feed_of(schedule, step))
            except BaseException as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append("wrong" if wrong(pipeline, schedule, step) else "ok")
            longest = max(longest, time.monotonic() - started)
        return outcomes, longest, fault is None or fault.struck

    outcome = launch(trial.ranks, body, timeout=60.0)
    faults = []
    struck = all(isinstance(result, Failure) or result[2] for result in outcome.results)
    for rank, result in enumerate(outcome.results):
        if isinstance(result, Failure):
            if rank != trial.rank or trial.what not in ("kill", "stop"):
                faults.append(str(result))
            continue
        outcomes, longest, _ = result
        if "wrong" in outcomes:
            faults.append(f"rank {rank} returned a wrong gradient: {outcomes}")
        if (trial.what == "delay" or not struck) and outcomes != ["ok"] * STEPS:
            faults.append(f"rank {rank} failed though the run was only delayed: {outcomes}")
        if struck and trial.what != "delay" and (outcomes[-1] == "ok" or outcomes[: trial.step] != ["ok"] * trial.step):
            faults.append(f"rank {rank}: {outcomes}")
        if longest > trial.timeout + 8.0:
            faults.append(f"rank {rank} needed {longest:.1f} s")
    return "; ".join(faults)


def soak(steps: int) -> bool:
    """Whether every step of a long run with random delays gave the right gradients on every rank."""
    schedule = generate("dualpipe", 4, 8)

    def body(context):
        chance = random.Random(context.rank)

        def linger(*_: object) -> None:
            if chance.random() < 0.01:
                time.sleep(chance.uniform(0.0, 0.01))

        pipeline, bad, rows = pipeline_of(schedule, 60.0, linger), 0, []
        for step in range(steps):
            for module in pipeline.stages.values():
                module.zero_grad()
            pipeline.step(feed_of(schedule, step % 7))
            bad += wrong(pipeline, schedule, step % 7)
            if (step + 1) % max(1, steps // 4) == 0:
                with open("/proc/self/statm") as file:
                    resident = int(file.read().split()[1]) * resource.getpagesize() / 2**20
                files = len(os.listdir("/proc/self/fd"))
                rows.append(f"{step + 1}: {resident:.0f} MiB, {threading.active_count()} threads, {files} files")
        return bad, rows

    results = launch(4, body, timeout=1800.0).values()
    for rank, (bad, rows) in enumerate(results):
        print(f"rank {rank}: {bad} of {steps} steps wrong; {'; '.join(rows)}")
    return not any(bad for bad, _ in results)


def main(trials: int = 60, seed: int = 0, steps: int = 1000, timeout: float = 6.0) -> None:
    chance, failed, began = random.Random(seed), 0, time.monotonic()
    counts: dict[str, int] = {}
    for number in range(trials):
        trial = draw(chance, timeout)
        counts[trial.what] = counts.get(trial.what, 0) + 1
        if fault := run(trial):
            failed += 1
            print(f"{number}: {trial}: {fault}", flush=True)
    kinds = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"{trials - failed} of {trials} trials passed ({kinds}) in {time.monotonic() - began:.0f} s", flush=True)
    right = steps == 0 or soak(steps)
    raise typer.Exit(0 if right and not failed else 1)


if __name__ == "__main__":
    typer.run(main)
