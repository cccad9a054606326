"""Fake ranks: any schedule run slot by slot in one process, messages going through a mailbox.

Every rank is a generator that stops where it would have to wait; a seed chooses who moves next.  Messages meet in
the order in which each pair of ranks posts them (``reference.mailbox``), so no choice can change a bit.

A slot of messages is posted at once.  By default the rank then goes on: a compute op waits only for the receive
it needs, and the end of the program for every message.  With ``blocking`` the slot is over only when each of its
messages has met its partner.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualpipe.schedule import MESSAGES, Lane, Schedule
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

Place = tuple[Lane, int]
"""A replica by its lane and stage."""


@dataclass(frozen=True)
class FakeStep:
    """One training step; the tensors are detached copies on the CPU, as in ``reference.oracle.StepTruth``.

    ``losses[l][mb]`` with lanes in the order of ``Schedule.lanes`` (``None`` where the schedule never computes it); by
    (lane, stage): ``lane_gradients`` before the replicas are summed, ``gradients`` that each replica's optimizer
    was handed, and ``weights`` after its step.
    """

    losses: tuple[tuple[Tensor | None, ...], ...]
    lane_gradients: Mapping[Place, Tensors]
    gradients: Mapping[Place, Tensors]
    weights: Mapping[Place, Tensors]


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
) -> Iterator[FakeStep]:
    """Train on fake ranks, each with its own copies of its stages and its own optimizer, and tell of each step.

    ``steps`` is the data by step, lane (in the order of ``Schedule.lanes``) and microbatch; all microbatches have the
    same shape.  ``stages`` stay as they are and must be deterministic.  ``ledger`` measures live activations;
    ``observe(op, module)`` is called after every compute op.

    Raises ``SetupError`` if stages or data do not fit, ``Misstep`` for an op that cannot be done where it stands,
    and ``Deadlock`` as soon as no rank can move.
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
        losses = {place: loss for rank in ranks for place, loss in rank.losses.items()}
        for replica in replicas.values():
            replica.forget()
        lane_gradients, gradients = _reduce(lanes, replicas, len(stages))
        for stepper in optimizers:
            stepper.step()
        yield FakeStep(
            tuple(
                tuple(_snapshot_or_none(losses.get((lane, mb))) for mb in range(len(batches)))
                for lane, batches in zip(lanes, data, strict=True)
            ),
            lane_gradients,
            gradients,
            {place: weights_of(replica.module) for place, replica in replicas.items()},
        )


def _run(programs: Sequence[Iterator[Pause]], chance: random.Random) -> None:
    """Move one rank that can move at a time, until all are over.  Raises ``Deadlock``."""
    standing = dict.fromkeys(range(len(programs)), Pause(0, None))
    while standing:
        able = [rank for rank, pause in standing.items() if all(message.met for message in pause.messages)]
        if not able:
            raise Deadlock([_waiting(rank, pause) for rank, pause in standing.items()])
        rank = chance.choice(able)
        pause = next(programs[rank], None)
        if pause is None:
            del standing[rank]
        else:
            standing[rank] = pause


def _waiting(rank: int, pause: Pause) -> Waiting:
    unmet = [message for message in pause.messages if not message.met]
    op = unmet[0].op if pause.op is not None and pause.op.kind in MESSAGES else pause.op
    return Waiting(rank, pause.slot, op, tuple(Awaited(m.slot, m.op, m.peer) for m in unmet))


def _replicas(
    schedule: Schedule, stages: Sequence[nn.Module], criterion: Criterion, ledger: Ledger | None
) -> dict[Place, Replica]:
    last = len(stages) - 1
    return {
        (lane, number): Replica(
            copy.deepcopy(stage),
            criterion if number == last else None,
            ledger.accounts[schedule.routes[lane][number]] if ledger else None,
        )
        for lane in schedule.lanes
        for number, stage in enumerate(stages)
    }


def _parameters(schedule: Schedule, replicas: Mapping[Place, Replica], rank: int) -> list[nn.Parameter]:
    """Those of the replicas that the rank holds."""
    return [
        parameter
        for (lane, stage), replica in replicas.items()
        if schedule.routes[lane][stage] == rank
        for parameter in replica.module.parameters()
    ]


def _reduce(
    lanes: Sequence[Lane], replicas: Mapping[Place, Replica], stages: int
) -> tuple[dict[Place, Tensors], dict[Place, Tensors]]:
    """Give every replica of a stage the sum over the lanes; returns the gradients before and after, by replica."""
    before = {place: gradients_of(replica.module) for place, replica in replicas.items()}
    for stage in range(stages):
        total = sum_of_lanes([before[lane, stage] for lane in lanes])
        for lane in lanes:
            set_gradients(replicas[lane, stage].module, total)
    return before, {place: gradients_of(replica.module) for place, replica in replicas.items()}


def _boundaries(stages: Sequence[nn.Module], steps: Steps) -> tuple[Layout, ...]:
    """What each stage puts out, seen by running the first microbatch that there is."""
    first: Batch | None = next((batch for lanes in steps for lane in lanes for batch in lane), None)
    if first is None:
        return ()
    layouts, x = [], first.tokens
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
            layouts.append(Layout.of(x))
    return tuple(layouts)


def _snapshot_or_none(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else snapshot(loss)


def _check_fit(schedule: Schedule, stages: Sequence[nn.Module], steps: Steps) -> None:
    if len(stages) != schedule.stages:
        raise SetupError(
            "the model has as many stages as the schedule", f"got {len(stages)} for {schedule.stages}", "cut it anew"
        )
    for number, data in enumerate(steps):
        if len(data) != len(schedule.lanes):
            raise SetupError(
                "every step has data for each lane of the schedule",
                f"step {number} has {len(data)} for {len(schedule.lanes)}",
                "deal the microbatches to the lanes",
            )
