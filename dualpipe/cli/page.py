"""What a page shows of a proof: findings as marks on the timeline, checks as a table.

Here, and not with the page or with the proofs, since neither of the two knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualpipe.page.model import Comparison, Counterexample, Mark, Page, Table
from dualpipe.schedule import COMPUTE, Op, Placed, Schedule

if TYPE_CHECKING:
    from dualpipe.cli.proving import Outcome
    from proofs.findings import Finding, Mismatch, OverBound, Wait
    from proofs.prove import Report, Result


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
    """A proved schedule as a section of the page, beside the one that it replaces.

    Where it deadlocks, the timeline blocks as the proof does, so that it stops where the story says.
    """
    from proofs.verdict import Refuted

    return Comparison(
        name=report.label or "schedule",
        before=before,
        after=after,
        verdict=report.verdict,
        source=source,
        counterexamples=counterexamples(report, after),
        tables=(verdicts(report),),
        blocking=isinstance(report.checks["deadlock"].verdict, Refuted),
    )


def counterexamples(report: Report, schedule: Schedule) -> tuple[Counterexample, ...]:
    """The stories of the checks that fail, each with its marks."""
    from proofs.story import tell
    from proofs.verdict import Refuted

    found = []
    for name, result in report.checks.items():
        match result.verdict:
            case Refuted(finding, _) if finding is not None:
                found.append(Counterexample(name, tell(finding), marks(finding, schedule)))
    return tuple(found)


def verdicts(report: Report) -> Table:
    """The checks with their verdicts, the seconds of each method, and the story or the reason."""
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
    """The first line of the story, with what is known besides; the story itself has its own place on the page."""
    from proofs.prove import told
    from proofs.story import tell
    from proofs.verdict import Refuted

    lines = told(result)
    match result.verdict:
        case Refuted(finding, _) if finding is not None:
            lines = [*lines[:1], *lines[len(tell(finding).split("\n")) :]]
    return "\n".join(lines)


def marks(finding: Finding, schedule: Schedule) -> tuple[Mark, ...]:
    """The places of a finding, each with its sentence of the story."""
    from proofs import findings
    from proofs.story import tell

    story = tell(finding)
    match finding:
        case findings.Circle(_, waits):
            lines = story.split("\n")
            return tuple(_wait(wait, line) for wait, line in zip(waits, lines, strict=False))
        case findings.Mismatch():
            return _mismatch(finding, schedule, story.split("\n")[0])
        case findings.NeverMet(_, place, peer) | findings.LeftOver(place, peer, _, _):
            return (_mark(place, story, peer=_rank(peer, schedule)),)
        case findings.NoPeer(place, peer, _):
            return (_mark(place, story, peer=_rank(peer, schedule)),)
        case findings.NotNeighbour(place, peer, _, _) | findings.Stray(place, peer):
            return (_mark(place, story, peer=_rank(peer, schedule)),)
        case findings.TooEarly(place, _, later):
            return (_mark(place, story, later),)
        case findings.Repeated(first, second) | findings.SentTwice(first, second) | findings.OutOfOrder(first, second):
            return (_mark(second, story, first),)
        case findings.Missing(op, rank, _):
            return tuple(_mark(at, story) for at in _nearest_work(schedule, rank, op))
        case findings.OverBound():
            return _over_bound(finding, schedule, story.split("\n")[0])
        case _:
            return ()


def _mark(place: Placed, sentence: str, target: Placed | None = None, peer: int | None = None) -> Mark:
    if target is None:
        return Mark(place.rank, place.slot, str(place.op), sentence, peer)
    return Mark(place.rank, place.slot, str(place.op), sentence, target.rank, target.slot, str(target.op))


def _wait(wait: Wait, line: str) -> Mark:
    return _mark(wait.place, line, wait.partner)


def _rank(peer: int | None, schedule: Schedule) -> int | None:
    return peer if peer is not None and peer < schedule.ranks else None


def _mismatch(finding: Mismatch, schedule: Schedule, sentence: str) -> tuple[Mark, ...]:
    """What a receive gets, and where the message that it expects is sent."""
    needs = schedule.needs(finding.receive.op.bare)
    wanted = next((at for at in schedule if at.op.bare in needs), None)
    gets = _mark(finding.receive, sentence, finding.send)
    if wanted is None:
        return (gets,)
    told = f"what it expects is sent by rank {wanted.rank} in slot {wanted.slot} ({wanted.op})"
    return (gets, _mark(finding.receive, told, wanted))


def _nearest_work(schedule: Schedule, rank: int, op: Op) -> list[Placed]:
    """The last compute of the op's microbatch at its stage; without one, whatever names the microbatch at all."""
    named = [at for at in schedule if (at.op.lane, at.op.mb) == (op.lane, op.mb)]
    here = [at for at in named if at.rank == rank and at.op.stage == op.stage and at.op.kind in COMPUTE]
    return here[-1:] or named[-1:]


def _over_bound(finding: OverBound, schedule: Schedule, sentence: str) -> tuple[Mark, ...]:
    """The slot that is one too many, and the forwards of all that is live in it."""
    slot = Mark(finding.rank, finding.slot, "", sentence)
    live = {held.op: held.until for held in finding.live}
    held = [at for at in schedule if at.rank == finding.rank and at.op in live and at.slot <= finding.slot]
    return (slot, *(_mark(at, f"{at.op} is live, waiting for {live[at.op]}") for at in held))
