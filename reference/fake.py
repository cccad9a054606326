"""Fake ranks: run any schedule slot by slot in one process, with a mailbox for the messages.

Every rank is a generator that yields where it may have to wait; a seed chooses which rank moves next.  Messages are
matched in the order in which each pair of ranks posts them (``reference.mailbox``), so no choice can change a bit.

The messages of a slot are posted together.  By default the rank then continues: a compute op waits only for the receive
that it needs, and the end of the program waits for every message.  With ``blocking`` the rank continues only when all
messages of the slot have been matched.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dualpipe.schedule import MESSAGES, Chunk, Lane, Schedule
from reference.data import Batch, Steps
from reference.fault import Awaited, Deadlock, SetupError, Waiting
from reference.ledger import Ledger
from reference.mailbox import Layout, Mailbox
from reference.oracle import (
    Criterion,
    OptimizerFactory,
    Tensors,
    gradients_of,
    set_gradients,
    snapshot,
    sum_of_lanes,
    weights_of,
)
from reference.rank import Observer, Pause, Rank, Supply
from reference.replica import Replica
from reference.trace import StepTrace


def train(
    schedule: Schedule,
    stages: Sequence[nn.Module],
    steps: Steps,
    criterion: Criterion,
    optimizer: OptimizerFactory,
    *,
    blocking: bool = False,
    seed: int = 0,
    ledger: Ledger | None = None,
    observe: Observer | None = None,
) -> Iterator[StepTrace]:
    """Train on fake ranks, each with its own replicas and its own optimizer; yields every step.

    ``steps`` is the data by step, lane (in the order of ``Schedule.lanes``) and microbatch; all microbatches have the
    same shape.  ``stages`` are not changed and must be deterministic.  ``ledger`` measures live activations;
    ``observe(op, module)`` is called after every compute op.

    Raises ``SetupError`` if the stages or the data do not fit the schedule, ``Misstep`` for an op that its rank cannot
    run at that point, and ``Deadlock`` as soon as no rank can move.
    """
    lanes = schedule.lanes
    _check_fit(schedule, stages, steps)
    replicas = _replicas(schedule, stages, criterion, ledger)
    optimizers = [
        optimizer(parameters) for rank in range(schedule.ranks) if (parameters := _parameters(schedule, replicas, rank))
    ]
    boundaries = _boundaries(stages, steps)
    chance = random.Random(seed)
    for data in steps:
        for replica in replicas.values():
            replica.module.zero_grad(set_to_none=True)
        supply = Supply(dict(zip(lanes, data, strict=True)), boundaries)
        mail = Mailbox()
        ranks = [Rank(number, schedule, replicas, supply, mail, blocking, observe) for number in range(schedule.ranks)]
        _run([rank.run() for rank in ranks], chance)
        losses: dict[Lane, dict[int, Tensor]] = {lane: {} for lane in lanes}
        for rank in ranks:
            for (lane, mb), loss in rank.losses.items():
                losses[lane][mb] = snapshot(loss)
        for replica in replicas.values():
            replica.clear()
        lane_gradients, gradients = _reduce(lanes, replicas, len(stages))
        for stepper in optimizers:
            stepper.step()
        weights = {chunk: weights_of(replica.module) for chunk, replica in replicas.items()}
        yield StepTrace(losses, lane_gradients, gradients, weights)


def _run(programs: Sequence[Iterator[Pause]], chance: random.Random) -> None:
    """Move one rank at a time among those that can move, until all have finished.  Raises ``Deadlock``."""
    paused = dict.fromkeys(range(len(programs)), Pause(0, None))
    while paused:
        able = [rank for rank, pause in paused.items() if all(message.matched for message in pause.messages)]
        if not able:
            raise Deadlock([_waiting(rank, pause) for rank, pause in paused.items()])
        rank = chance.choice(able)
        pause = next(programs[rank], None)
        if pause is None:
            del paused[rank]
        else:
            paused[rank] = pause


def _waiting(rank: int, pause: Pause) -> Waiting:
    unmatched = [message for message in pause.messages if not message.matched]
    op = unmatched[0].op if pause.op is not None and pause.op.kind in MESSAGES else pause.op
    return Waiting(rank, pause.slot, op, tuple(Awaited(m.slot, m.op, m.peer) for m in unmatched))


def _replicas(
    schedule: Schedule, stages: Sequence[nn.Module], criterion: Criterion, ledger: Ledger | None
) -> dict[Chunk, Replica]:
    last = len(stages) - 1
    return {
        Chunk(lane, number): Replica(
            copy.deepcopy(stage),
            criterion if number == last else None,
            ledger.accounts[schedule.routes[lane][number]] if ledger else None,
        )
        for lane in schedule.lanes
        for number, stage in enumerate(stages)
    }


def _parameters(schedule: Schedule, replicas: Mapping[Chunk, Replica], rank: int) -> list[nn.Parameter]:
    """The parameters of the replicas that the rank holds."""
    return [
        parameter
        for (lane, stage), replica in replicas.items()
        if schedule.routes[lane][stage] == rank
        for parameter in replica.module.parameters()
    ]


def _reduce(
    lanes: Sequence[Lane], replicas: Mapping[Chunk, Replica], stages: int
) -> tuple[dict[Chunk, Tensors], dict[Chunk, Tensors]]:
    """Give every replica of a stage the sum over the lanes; returns the gradients before and after, by chunk."""
    before = {chunk: gradients_of(replica.module) for chunk, replica in replicas.items()}
    for stage in range(stages):
        total = sum_of_lanes([before[Chunk(lane, stage)] for lane in lanes])
        for lane in lanes:
            set_gradients(replicas[Chunk(lane, stage)].module, total)
    return before, {chunk: gradients_of(replica.module) for chunk, replica in replicas.items()}


def _boundaries(stages: Sequence[nn.Module], steps: Steps) -> tuple[Layout, ...]:
    """The layout of each stage's output, from a run of the first microbatch."""
    first: Batch | None = next((batch for lanes in steps for lane in lanes for batch in lane), None)
    if first is None:
        return ()
    layouts, x = [], first.tokens
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
            layouts.append(Layout.of(x))
    return tuple(layouts)


def _check_fit(schedule: Schedule, stages: Sequence[nn.Module], steps: Steps) -> None:
    if len(stages) != schedule.stages:
        raise SetupError(
            "the model must have as many stages as the schedule",
            f"got {len(stages)} for {schedule.stages}",
            "split it again",
        )
    for number, data in enumerate(steps):
        if len(data) != len(schedule.lanes):
            raise SetupError(
                "every step must have data for each lane of the schedule",
                f"step {number} has {len(data)} for {len(schedule.lanes)}",
                "divide the microbatches among the lanes",
            )
