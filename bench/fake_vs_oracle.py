"""Measure how much slower the fake ranks are than the oracle.

Both train the same model on the same data in this process.  On a shared machine the times of two runs are hardly
comparable, so the two alternate, and the result is the median ratio of consecutive runs.

    python bench/fake_vs_oracle.py --ranks 4 --microbatches 16
"""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
import typer

from dualpipe.schedule.generate import generate
from reference import fake, oracle
from reference.data import training_data
from reference.ledger import Ledger
from reference.model import ModelConfig, build_stages, criterion


def seconds(run: Callable[[], Iterable[object]]) -> float:
    start = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - start


def main(
    ranks: int = 4,
    microbatches: int = 16,
    schedule: str = "dualpipe",
    hidden: int = 64,
    sequence: int = 32,
    steps: int = 2,
    rounds: int = 9,
) -> None:
    torch.set_num_threads(1)
    plan = generate(schedule, ranks, microbatches)
    config = ModelConfig(hidden=hidden, sequence=sequence)
    stages = build_stages(config, plan.stages, seed=0)
    counts = [plan.microbatches[lane] for lane in plan.lanes]
    work = (
        stages,
        training_data(steps, counts, config.batch, config.sequence, seed=0),
        partial(criterion, scale=1 / microbatches),
        partial(torch.optim.AdamW, lr=1e-3),
    )
    plain = partial(oracle.train, *work)
    faked = partial(fake.train, plan, *work)
    measured = partial(fake.train, plan, *work, ledger=Ledger(ranks))
    for warm_up in (plain, faked, measured):
        seconds(warm_up)
    times = [(seconds(plain), seconds(faked), seconds(measured)) for _ in range(rounds)]
    size = f"P={ranks}, M={microbatches}, hidden {hidden}, sequence {sequence}"
    print(f"{schedule}, {size}; {rounds} rounds of {steps} steps")
    print(f"oracle                {statistics.median(t[0] for t in times) / steps * 1e3:8.1f} ms per step")
    for name, column in (("fake ranks", 1), ("fake ranks, ledger", 2)):
        ratios = sorted(t[column] / t[0] for t in times)
        middle = statistics.median(t[column] for t in times) / steps * 1e3
        print(
            f"{name:<20}  {middle:8.1f} ms per step, {statistics.median(ratios):.2f} times the oracle "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    typer.run(main)
