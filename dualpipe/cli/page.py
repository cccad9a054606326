"""A proof on the HTML page: findings as marks on the timeline, checks as a table.

It is part of the command line because neither the page nor the proofs know the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, assert_never

from dualpipe.page.model import Comparison, Counterexample, Mark, Page, Table
from dualpipe.schedule import COMPUTE, Op, Placed, Schedule

if TYPE_CHECKING:
    from dualpipe.cli.proving import Outcome
    from proofs.fault import Place
    from proofs.findings import Finding
    from proofs.report import Report, Result


def proofs_page(outcomes: Sequence[Outcome]) -> str:
    """The page of a run of ``dualpipe prove``."""
    from dualpipe.page.render import render

    sections = [_section(outcome) for outcome in outcomes]
    verdicts = [section.verdict for section in sections]
    worst = next((verdict for verdict in ("bad input", "refuted", "unknown") if verdict in verdicts), "proved")
    title = f"{sections[0].name}, proof" if len(sections) == 1 else f"{len(sections)} schedules"
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return render(Page(title, worst, sections, "" if len(sections) == 1 else counts))


def _section(outcome: Outcome) -> Comparison:
    if outcome.schedule is None or outcome.report is None:
        error = Table("What is wrong", ("error",), ((outcome.error,),))
        return Comparison(outcome.name, verdict="bad input", tables=(error,))
    source = "" if outcome.name == outcome.report.label else outcome.name
    return comparison(outcome.report, outcome.schedule, source=source)


def comparison(report: Report, after: Schedule, before: Schedule | None = None, source: str = "") -> Comparison:
    """The report on a schedule as a section of the page, together with the schedule that it replaces.

    If it deadlocks, its timeline is simulated with blocking messages, so that it stops where the story says.
    """
    from proofs.verdict import Refuted

    return Comparison(
        name=report.label or "schedule",
        before=before,
        after=after,
        verdict=report.verdict,
        source=source,
        counterexamples=counterexamples(report, after),
        tables=(*failures(report), verdicts(report)),
        blocking=isinstance(report.checks["deadlock"].verdict, Refuted),
    )


def counterexamples(report: Report, schedule: Schedule) -> tuple[Counterexample, ...]:
    """The stories of the checks that fail, each with its marks."""
    return tuple(
        Counterexample(name, result.story(result.finding), marks(result.finding, schedule))
        for name, result in report.checks.items()
        if result.finding is not None
    )


def failures(report: Report) -> tuple[Table, ...]:
    """How the recorded program failed, if it did."""
    rows = tuple((str(rank), what) for rank, what in report.failures)
    return (Table("How the program failed", ("rank", "what happened"), rows),) if rows else ()


def verdicts(report: Report) -> Table:
    """The checks with their verdicts, the seconds that each method took, and the story or the reason."""
    methods = sorted({method for result in report.checks.values() for method in result.seconds})
    rows = [
        (
            name,
            result.verdict.word,
            *(f"{result.seconds[method]:.2f}" if method in result.seconds else "" for method in methods),
            _brief(result),
        )
        for name, result in report.checks.items()
    ]
    return Table("Checks", ("check", "verdict", *(f"{method}, s" for method in methods), "story"), rows)


def _brief(result: Result) -> str:
    """The first line of the story and the remarks below it; the whole story has its own place on the page."""
    from proofs.report import describe

    lines = describe(result)
    if result.finding is not None:
        lines = [*lines[:1], *lines[len(result.story(result.finding).split("\n")) :]]
    return "\n".join(lines)


def marks(finding: Finding, schedule: Schedule) -> tuple[Mark, ...]:
    """The places of a finding, each with its line of the story, then other places that help to understand it."""
    from proofs.story import tell

    lines = tell(finding).split("\n")
    own = (_mark(place, line, schedule) for place, line in zip(finding.places(), lines, strict=False))
    return (*own, *_context(finding, schedule, lines[0]))


def _mark(place: Place, sentence: str, schedule: Schedule) -> Mark:
    op = str(place.op or "")
    if place.target is not None:
        return _arrow(place.rank, place.slot, op, sentence, place.target)
    peer = place.peer if place.peer is not None and place.peer < schedule.ranks else None
    return Mark(place.rank, place.slot, op, sentence, peer)


def _arrow(rank: int, slot: int, op: str, sentence: str, target: Placed) -> Mark:
    return Mark(rank, slot, op, sentence, target.rank, target.slot, str(target.op))


def _context(finding: Finding, schedule: Schedule, sentence: str) -> Iterator[Mark]:
    """Marks that the places of a finding do not give, since they need the schedule."""
    from proofs import findings

    match finding:
        case findings.Mismatch(_, receive, _):
            sender = _sender(schedule, receive.op)
            if sender is not None:
                text = f"what it expects is sent by rank {sender.rank} in slot {sender.slot} ({sender.op})"
                yield _arrow(receive.rank, receive.slot, str(receive.op), text, sender)
        case findings.Missing(op, rank, _):
            for at in _nearest_work(schedule, rank, op):
                yield Mark(at.rank, at.slot, str(at.op), sentence)
        case findings.OverBound(rank, slot, live):
            until = {held.op: held.until for held in live}
            for at in schedule:
                if at.rank == rank and at.op in until and at.slot <= slot:
                    yield Mark(at.rank, at.slot, str(at.op), f"{at.op} is live, waiting for {until[at.op]}")
        case findings.TouchedInFlight(message, _, by) | findings.Overwritten(message, _, by):
            for at in schedule:
                if by is not None and at.rank == message.rank and at.op == by:
                    yield Mark(at.rank, at.slot, str(by), f"{by} touches the memory of {message.op}")
        case (
            findings.Empty()
            | findings.Repeated()
            | findings.Stray()
            | findings.TooEarly()
            | findings.NoPeer()
            | findings.NotNeighbour()
            | findings.LeftOver()
            | findings.SentTwice()
            | findings.NotMember()
            | findings.WaitCycle()
            | findings.Unmatched()
            | findings.OutOfOrder()
        ):
            pass
        case _:
            assert_never(finding)


def _sender(schedule: Schedule, receive: Op) -> Placed | None:
    """The send of the message that a receive expects."""
    needs = schedule.needs(receive.bare)
    return next((at for at in schedule if at.op.bare in needs), None)


def _nearest_work(schedule: Schedule, rank: int, op: Op) -> list[Placed]:
    """The last compute of the op's microbatch at its stage; without one, the last op of that microbatch anywhere."""
    named = [at for at in schedule if (at.op.lane, at.op.mb) == (op.lane, op.mb)]
    here = [at for at in named if at.rank == rank and at.op.stage == op.stage and at.op.kind in COMPUTE]
    return here[-1:] or named[-1:]
