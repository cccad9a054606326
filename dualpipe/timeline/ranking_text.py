"""A ranking of schedules as text: its table, what is left out, and its verdict."""

from __future__ import annotations

from dualpipe.schedule import full_backwards
from dualpipe.timeline.comparison import Candidate, Ranking
from dualpipe.timeline.summary import describe_collectives


def table(ranking: Ranking) -> list[list[str]]:
    """The figures of the candidates as rows of text below a head; peaks are those of the rank that holds most."""
    with_bytes = any(each.bytes is not None for each in ranking.candidates)
    head = ["schedule", "makespan", "bubble", "activations", "pending W", "parameters", "messages"]
    rows = [head + ["activation bytes", "bytes"] * with_bytes]
    for each in ranking.candidates:
        peaks = (each.activations, each.pending_w, each.parameters)
        row = [each.name, f"{each.timeline.makespan:g}", f"{each.timeline.bubble_share:.1%}"]
        row += [*(f"{max(values):g}" for values in peaks), f"{each.messages}"]
        row += [f"{max(values):g}" for values in (each.activation_bytes, each.bytes) if values is not None]
        rows.append(row)
    return rows


def left_out(ranking: Ranking) -> list[str]:
    """A line for each schedule that does not fit or cannot take part."""
    excess = {each.name: ranking.limits.excess(each) for each in ranking.candidates}
    absent = (f"{each.name}: {each.reason}" for each in ranking.absent)
    return [*(f"{name} {reason}" for name, reason in excess.items() if reason), *absent]


def without_full_backward(ranking: Ranking) -> list[str]:
    """The schedules to which a cost of ``BW`` does not apply, since they never run B and W as one backward."""
    return [
        each.name
        for each in ranking.candidates
        if not any(full_backwards(slot) for program in each.timeline.schedule.programs for slot in program)
    ]


def with_collectives(ranking: Ranking) -> list[str]:
    """A line for each schedule that has collectives: how many, which take no time, and which schedules have none."""
    notes = {
        each.name: describe_collectives(each.timeline.schedule, each.timeline.costs) for each in ranking.candidates
    }
    lines = [f"{name} has {note}" for name, note in notes.items() if note]
    if lines and not all(notes.values()):
        lines.append("schedules without collectives are compared without any, so add them for a fair comparison")
    return lines


def describe(ranking: Ranking) -> str:
    """The ranking as aligned lines, with its verdict as the last one."""
    if not ranking.candidates:
        return "\n".join([*left_out(ranking), verdict(ranking)])
    rows = table(ranking)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*lines, *with_collectives(ranking), *left_out(ranking), verdict(ranking)])


def caption(ranking: Ranking, each: Candidate) -> str:
    """The title of a candidate's timeline."""
    parts = [f"{each.name}: makespan {each.timeline.makespan:g}", f"bubble {each.timeline.bubble_share:.1%}"]
    parts.append(f"parameters {max(each.parameters):g}")
    if each in ranking.best:
        parts.append("best" if each is ranking.best[0] else "as fast")
    return ", ".join(filter(None, [*parts, ranking.limits.excess(each)]))


def verdict(ranking: Ranking) -> str:
    """The best schedule in one line."""
    if not ranking.best:
        return "best: none" + (" of them fits" if ranking.candidates else "")
    first, *others = ranking.best
    as_fast = f"; as fast: {', '.join(each.name for each in others)}" if others else ""
    return f"best: {first.name}, makespan {first.timeline.makespan:g}{as_fast}"
