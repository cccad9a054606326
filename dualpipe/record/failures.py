"""Finds which ranks of a recorded program failed, how, and during which op."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Mapping, Sequence

from dualpipe.record.events import Event, Message, MessageId, RankLog
from dualpipe.record.lineage import Lineage, match
from dualpipe.record.log import Raised
from dualpipe.schedule import MESSAGES, RF, B, F, Failure, Op, Program, printable
from dualpipe.schedule.failure import LATER

_COMPUTE = {"F": F, "B": B}
_TRANSPORT_ERRORS = frozenset({"RuntimeError", "DistBackendError", "DistNetworkError"})
"""The errors that a transport raises if the peer or the network fails; for wrong arguments it raises others."""
_SOURCE = re.compile(r"\[\S+\.cc:\d+\] ")
"""The line of gloo's own sources, with which its errors begin."""

_LONGEST = 4000
"""Of the text of a failure, in characters.  Its last part, the text of the error, is cut to 500."""

Codes = Sequence[int | None]
"""The exit code of every rank, ``None`` for a rank that was stopped while it ran; empty if no rank's code is known."""


def fails(log: RankLog, codes: Codes) -> bool:
    """Whether the rank failed.  If its exit code is known, the code decides: a rank with code 0 did not fail."""
    if codes:
        return codes[log.rank] != 0
    return log.raised is not None or not log.ended


def failures(
    logs: Sequence[RankLog],
    codes: Codes,
    ops: Mapping[MessageId, Op],
    messages: Mapping[MessageId, Message],
    lineage: Lineage,
    programs: Sequence[Program],
    step: int,
    guesses: Collection[MessageId] = (),
) -> tuple[tuple[Failure, ...], tuple[Program, ...]]:
    """The failures of all ranks, the likely causes first, and the programs, which end with the ops that failed.

    Errors raised by the program come first, in the order of time; then other exits, errors of the transport, and hangs.
    ``logs`` and ``messages`` cover all training steps, ``ops`` and ``programs`` only the one with the number ``step``;
    ``guesses`` are the messages whose ops are guesses.

    If a rank failed during a compute that its log does not have, the compute is appended to its program.  A failure
    between the receive of a tensor and the computation on it counts as a failure during that computation.
    """
    found: list[tuple[tuple[int, float], Failure]] = []
    ended = list(programs)
    for log in logs:
        if not fails(log, codes):
            continue
        reached = [f.step for f in log.forwards.values()] + [m.step for m in log.messages.values()]
        is_later = max(reached, default=step) > step
        op = None if is_later else _op_that_failed(log, ops, messages, lineage)
        if op is not None and op.kind in (F, B) and all(op not in slot for slot in ended[log.rank]):
            ended[log.rank] = (*ended[log.rank], (op,))
        guessed = " (a guess)" if op is not None and any(ops.get(id) == op for id in guesses) else ""
        where = LATER if is_later else f"during {op}{guessed}" if op is not None else _after(log, ended[log.rank])
        if op is not None and op.kind in MESSAGES and (first := _first_to_fail(logs, codes)) != log.rank:
            where += f", after rank {first} had failed"
        unmatched = _unmatched_at_failure(log, messages)
        if unmatched is not None and not fails(logs[unmatched.peer], codes):  # gloo raises where NCCL would hang
            name = ops[unmatched.id] if unmatched.id in ops else _unnamed(unmatched)
            place = f"posted at {unmatched.at}" + (f" {LATER}" if is_later else "")
            order, what = (3, 0.0), f"waited for {name}, {place}, until rank {unmatched.peer} had ended"
        else:
            order, what = _describe(log, codes[log.rank] if codes else None, where, ops, messages, is_later)
            if _raised_by_transport(log) and order[0] == 0:
                order = (2, order[1])
        found.append((order, Failure(log.rank, printable(what, limit=_LONGEST))))
    found.sort(key=lambda each: each[0])
    return tuple(failure for _, failure in found), tuple(ended)


def _unmatched_at_failure(log: RankLog, messages: Mapping[MessageId, Message]) -> Message | None:
    """The message during which a rank failed, if it has no partner.

    If its peer ended without a failure, this is a hang: gloo raises an error once the peer has ended, NCCL would wait.
    """
    raised = log.raised
    if raised is None or raised.during is None or not _raised_by_transport(log):
        return None
    partner = match(list(messages.values()))
    ids = (MessageId(log.rank, number) for number in raised.during[1])
    return next((messages[id] for id in ids if id in messages and id not in partner), None)


def _raised_by_transport(log: RankLog) -> bool:
    """Whether the transport raised the rank's error, as when its peer has ended: this is never the first failure."""
    raised = log.raised
    return (
        raised is not None
        and raised.error in _TRANSPORT_ERRORS
        and raised.during is not None
        and raised.during[0] == "M"
    )


def _first_to_fail(logs: Sequence[RankLog], codes: Codes) -> int:
    """The rank that ended first, with or without an error; ranks that were stopped while they ran are not counted."""

    def time(log: RankLog) -> float:
        if log.raised is not None:
            return log.raised.time
        still_ran = codes[log.rank] is None if codes else bool(log.waiting)
        return float("inf") if log.ended or still_ran else 0.0

    return min(logs, key=time).rank


def _describe(
    log: RankLog,
    code: int | None,
    where: str,
    ops: Mapping[MessageId, Op],
    messages: Mapping[MessageId, Message],
    is_later: bool,
) -> tuple[tuple[int, float], str]:
    """The key by which failures are sorted, and what happened in words."""
    raised = log.raised
    if raised is not None and raised.error != "SystemExit":
        said = printable(_first_sentence(raised.text) if _raised_by_transport(log) else raised.text)
        text = f": {said}" if said else ""
        of = _freed(raised) + _received(log, ops, messages)
        at = f" at {raised.at}" if raised.at else ""
        return (0, raised.time), f"raised {raised.error}{at} {where}{of}{text}"
    if code is not None and code < 0:
        return (1, 0.0), f"was killed by signal {-code} ({signal.Signals(-code).name}) {where}"
    if code is not None:
        return (1, 0.0), f"ended with exit code {code} {where}{_message(raised)}"
    if raised is not None:
        shown = 1 if _message(raised) else raised.text
        return (1, raised.time), f"ended with exit code {shown} {where}{_message(raised)}"
    if log.collecting is not None:
        each = log.collectives[log.collecting]
        members = " ".join(map(str, each.group))
        place = f"called at {each.at}" + (f" {LATER}" if is_later else "")
        return (3, 0.0), f"waited for {each.name} of the ranks {members}, {place}, until it was stopped"
    waiting = [MessageId(log.rank, number) for number in log.waiting]
    if waiting:
        awaited = " and ".join(str(ops[id]) if id in ops else _unnamed(messages[id]) for id in waiting)
        place = f"posted at {messages[waiting[0]].at}" + (f" {LATER}" if is_later else "")
        return (3, 0.0), f"waited for {awaited}, {place}, until it was stopped"
    last = f", {_last(log.events[-1])}" if log.events else ""
    return (2, 0.0), f"did not finish; it was stopped {where}{last}"


def _message(raised: Raised | None) -> str:
    """What ``sys.exit`` was given, if that is no number; the exit code is 1 then."""
    given = "" if raised is None or raised.error != "SystemExit" else printable(raised.text)
    return f": {given}" if given and not given.lstrip("-").isdigit() else ""


def _freed(raised: Raised) -> str:
    """Where an output was freed from which autograd was to run."""
    if not raised.freed:
        return ""
    asks = "does the backward allow for that, as Megatron's does with deallocate_pipeline_outputs?"
    return f", whose output was freed (its .data replaced) at {raised.freed} ({asks})"


def _received(log: RankLog, ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message]) -> str:
    """Which received tensor lacks the gradient that was asked for."""
    if log.raised is None or log.raised.during is None or log.raised.during[0] != "R":
        return ""
    id = MessageId(log.rank, log.raised.during[1][0])
    name = str(ops[id]) if id in ops else "a message"
    return f", of what it received as {name}, posted at {messages[id].at}, without requires_grad_()"


def _first_sentence(text: str) -> str:
    """What an error of the transport says, without the line of its sources and its advice."""
    return _SOURCE.sub("", text, count=1).split(". ")[0]


def _last(event: Event) -> str:
    """Where a rank was at its last event: the recorder adds one if the rank left its stack."""
    return f"{'at' if event['event'] == 'stopped' else 'last seen at'} {event['at']}"


def _unnamed(message: Message) -> str:
    return f"a message {'to' if message.send else 'from'} rank {message.peer}"


def _after(log: RankLog, program: Program) -> str:
    """Where a rank failed outside of every op.

    If that was in a forward without a received tensor, the program may have called the wrong one of its modules.
    """
    where = f"after {'+'.join(map(str, program[-1]))}" if program else "before its first op"
    if log.raised is None or log.raised.during is None or log.raised.during[0] != "F":
        return where
    forwards = [log.forwards[log.find(n)] for n in log.raised.during[1] if log.find(n) in log.forwards]
    if not forwards:
        return f"{where}, in a forward"
    called = list(dict.fromkeys(forward.module for forward in log.forwards.values()))
    name, _ = log.modules[forwards[0].module]
    return (
        f"{where}, in a forward of its {name} that takes no tensor from another rank (module {log.rank}."
        f"{called.index(forwards[0].module)}): is it the chunk for this lane and this half of the ranks?"
    )


def _op_that_failed(
    log: RankLog, ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message], lineage: Lineage
) -> Op | None:
    """The op in which the error was raised; outside of all ops, the compute whose received tensor is still unused."""
    if log.raised is not None and log.raised.during is not None:
        what, numbers = log.raised.during
        if what in ("C", "R"):
            return None
        if what == "M":
            return next((op for n in numbers if (op := ops.get(MessageId(log.rank, n))) is not None), None)
        return next((op for n in numbers if (op := lineage.op(_COMPUTE[what], log, n)) is not None), None)
    if log.waiting:
        return None
    used = {id for forward in log.forwards.values() for id in (*forward.messages, *forward.gradients)}
    for id in sorted((id for id in ops if id.rank == log.rank), reverse=True):
        message = messages[id]
        if not message.send and message.completed and id not in used:
            op = ops[id]
            return Op(F if op.kind is RF else B, *op.task)
    return None
