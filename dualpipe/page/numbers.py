"""The numbers of the drawn timelines as a table: makespan, bubble, peaks, pending weight gradients, messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dualpipe.page.drawing import Run
from dualpipe.page.model import Table
from dualpipe.schedule import MESSAGES, SENDS


def numbers(runs: Sequence[Run], compared: bool) -> Table:
    """One column per run, and with ``compared`` a last one for what changed.

    A schedule that gets stuck has no makespan, bubble or peaks: its column has only the messages.
    """
    rows = [_row(name, [value(ran) for ran in runs], compared) for name, value in ROWS.items()]
    head = ["before", "after", "change"] if compared else ["value"]
    return Table("Numbers", ["", *head], rows)


def _row(name: str, values: list[float | tuple[int, ...] | None], compared: bool) -> list[str]:
    percent = name.endswith("share")
    cells = [_text(value, percent, name) for value in values]
    return [name, *cells, _change(values[0], values[-1], percent)] if compared else [name, *cells]


def _text(value: float | tuple[int, ...] | None, percent: bool, name: str) -> str:
    match value:
        case None:
            return "never ends" if name == "makespan" else "—"
        case tuple():
            return " ".join(map(str, value))
        case _:
            return f"{value:.1%}" if percent else f"{value:g}"


def _change(before: float | tuple[int, ...] | None, after: float | tuple[int, ...] | None, percent: bool) -> str:
    if before == after:
        return "same"
    if before is None or after is None:
        return "—"
    if isinstance(before, tuple) or isinstance(after, tuple):
        return "differs"
    more = after - before
    return f"{100 * more:+.1f} points" if percent else f"{more:+g}"


def _ended(value: Callable[[Run], float | tuple[int, ...]]) -> Callable[[Run], float | tuple[int, ...] | None]:
    return lambda ran: None if ran.waits else value(ran)


def _count(kinds: frozenset[str]) -> Callable[[Run], int]:
    return lambda ran: sum(at.op.kind in kinds for at in ran.timeline.schedule)


ROWS: dict[str, Callable[[Run], float | tuple[int, ...] | None]] = {
    "makespan": _ended(lambda ran: ran.timeline.makespan),
    "bubble, all ranks": _ended(lambda ran: sum(ran.timeline.bubble)),
    "bubble share": _ended(lambda ran: ran.timeline.bubble_share),
    "peak activations by rank": _ended(lambda ran: ran.timeline.peak_activations),
    "peak pending W by rank": _ended(lambda ran: ran.timeline.peak_pending_w),
    "messages sent": _count(frozenset(SENDS)),
    "message ops": _count(frozenset(MESSAGES)),
    "slots": lambda ran: sum(map(len, ran.timeline.schedule.programs)),
}
