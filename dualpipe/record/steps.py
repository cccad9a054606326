"""Select one of several training steps, each of which ends with an optimizer step on every rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from dualpipe.record.events import Forward, Message, MessageId, RankLog, RecordError


def computing_steps(logs: Sequence[RankLog]) -> list[int]:
    """The steps in which a forward ran, numbered by the optimizer steps before them.

    Forwards without gradients after the last step, as in an evaluation, are no step.

    Raises ``RecordError`` if a rank finished with fewer steps than another one.
    """
    last = [max((forward.step for forward in _training(log)), default=-1) for log in logs]
    most = max(range(len(logs)), key=last.__getitem__)
    for log in logs:
        if log.ended and log.forwards and last[log.rank] < last[most]:
            raise RecordError(
                "every rank ends a training step with an optimizer's step",
                f"rank {log.rank} computed in {last[log.rank] + 1} steps and rank {most} in {last[most] + 1}",
                "record a program of one step, or give every rank an optimizer",
            )
    steps = {forward.step for log in logs for forward in log.forwards.values() if forward.step <= max(last)}
    return sorted(steps) or [0]


def choose_step(logs: Sequence[RankLog], step: int | None, failed: bool) -> tuple[list[int], int]:
    """The numbers of the steps in which a forward ran, and which of them is chosen, from 1.

    ``step`` is the choice; the default is the first step whose gradients an optimizer uses.

    Raises ``RecordError`` if there is no such step, or for ranks with different numbers of steps unless one ``failed``.
    """
    try:
        steps = computing_steps(logs)
    except RecordError:
        if not failed:
            raise
        steps = [0]
    thrown_away = {number: at for log in logs for number, at in log.discarded.items()}
    if step is None:
        step = next((count for count, number in enumerate(steps, start=1) if number not in thrown_away), 1)
    if not 1 <= step <= len(steps):
        got = f"got {step}, and there were {len(steps)}"
        raise RecordError("--step is the number of a training step, from 1", got, "use one of them")
    return steps, step


def _training(log: RankLog) -> list[Forward]:
    """The forwards with gradients, or all if there are none."""
    every = [*log.forwards.values()]
    return [forward for forward in every if forward.grad] or every


def select_step(logs: Sequence[RankLog], step: int) -> list[RankLog]:
    """The logs restricted to one training step."""
    return [_select(log, step) for log in logs]


def _select(log: RankLog, step: int) -> RankLog:
    events, steps = [], 0
    for event in log.events:
        if event["event"] == "step":
            steps += 1
        elif steps == step or event["event"] in ("module", "join"):
            events.append(event)
    forwards = {n: f for n, f in log.forwards.items() if f.step == step}
    messages = {n: m for n, m in log.messages.items() if m.step == step}
    doubts = [doubt for doubt in log.doubts if doubt.step == step]
    return replace(log, events=events, forwards=forwards, messages=messages, doubts=doubts)


def check_within_step(
    step: int,
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    counted: Collection[MessageId],
) -> None:
    """Raise ``RecordError`` if one of the ``counted`` messages has one end in the step and one in another step."""
    for id, other in partner.items():
        one, two = messages[id], messages[other]
        if one.step == step != two.step and (id in counted or other in counted):
            raise RecordError(
                "both ends of a message are in the same training step",
                f"{_end(one)}, and {_end(two)}",
                "post it after the optimizer's step, make that step after all backwards and not in their hooks, or "
                "record a program of one step",
            )


def _end(message: Message) -> str:
    return (
        f"rank {message.id.rank} {'sends' if message.send else 'receives'} at {message.at} "
        f"after {message.step} optimizer steps"
    )
