"""The summary of a timeline that ``dualpipe simulate`` prints, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

from dualpipe.errors import RuleError
from dualpipe.schedule import COLLECTIVES, Kind, Schedule
from dualpipe.timeline.simulate import Costs, Timeline

COSTS = ("F", "B", "W", "BW", "FB", "latency", *(str(kind) for kind in Kind if kind in COLLECTIVES))


class Summary(TypedDict):
    """One value per key, or one per rank; times in the unit of the costs."""

    schedule: str
    ranks: int
    microbatches: int
    makespan: float
    bubble: list[float]
    bubble_share: float
    peak_activations: list[int]
    peak_pending_w: list[int]
    collectives: dict[str, int]


def parse_costs(text: str) -> Costs:
    """Parse costs such as ``"F=1,B=1,W=1,FB=2.5"``; costs that are not given have their defaults.

    Raises ``RuleError`` for any other text.
    """
    given = parse_numbers("--cost", text, COSTS)
    return replace(Costs(), **given)  # type: ignore[arg-type] # stages is not one of COSTS


def parse_numbers(option: str, text: str, names: Sequence[str]) -> dict[str, float]:
    """The numbers of an option such as ``F=1,B=1``, by name.  Raises ``RuleError`` for any other text."""
    given: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if name not in names or not equals:
            raise RuleError(f"{option} must be NAME=NUMBER,...", f"got {part!r}", f"names are {', '.join(names)}")
        if name in given:
            raise RuleError(
                f"{option} must give each name once", f"got {name} twice in {text!r}", "leave one of them out"
            )
        given[name] = number
    return given


def describe_costs(costs: Costs) -> str:
    """Costs in the form that ``parse_costs`` reads: F, B and W, and of the others those that are not the default."""
    default = Costs()
    given = {name: getattr(costs, name) for name in COSTS}
    shown = {n: value for n, value in given.items() if n in ("F", "B", "W") or value != getattr(default, n)}
    return ",".join(f"{name}={value:g}" for name, value in shown.items())


def headline(schedule: Schedule) -> tuple[str, str]:
    """A schedule's name, and its sizes in words."""
    return _headline(schedule.name, schedule.ranks, sum(schedule.microbatches.values()))


def _headline(name: str, ranks: int, microbatches: int) -> tuple[str, str]:
    return name or "unnamed schedule", f"{ranks} ranks, {microbatches} microbatches"


def count_collectives(schedule: Schedule) -> dict[str, int]:
    """How many collectives of each kind a schedule has; kinds that it does not have are left out."""
    count = Counter(placed.op.kind for placed in schedule if placed.op.kind in COLLECTIVES)
    return {str(kind): count[kind] for kind in Kind if count[kind]}


def describe_collectives(schedule: Schedule, costs: Costs) -> str:
    """How many collectives a schedule has, and which of them take no time; empty if it has none."""
    count = count_collectives(schedule)
    free = [kind for kind in count if not getattr(costs, kind)]
    head = "collectives: " + ", ".join(f"{number} {kind}" for kind, number in count.items())
    if not free:
        return head if count else ""
    return f"{head}; {', '.join(free)} without a cost (as in --cost {free[0]}=1), so without time of their own"


def summarise(timeline: Timeline) -> Summary:
    schedule = timeline.schedule
    return Summary(
        schedule=schedule.name,
        ranks=schedule.ranks,
        microbatches=sum(schedule.microbatches.values()),
        makespan=timeline.makespan,
        bubble=list(timeline.bubble),
        bubble_share=timeline.bubble_share,
        peak_activations=list(timeline.peak_activations),
        peak_pending_w=list(timeline.peak_pending_w),
        collectives=count_collectives(schedule),
    )


def describe(summary: Summary, note: str = "") -> str:
    """The summary as a few aligned lines, with a note below its head if there is one."""
    head = ", ".join(_headline(summary["schedule"], summary["ranks"], summary["microbatches"]))
    rows = ["rank  bubble  peak activations  peak pending W"]
    columns = zip(summary["bubble"], summary["peak_activations"], summary["peak_pending_w"], strict=True)
    rows += [f"{rank:4}  {bubble:6g}  {live:16}  {waiting:14}" for rank, (bubble, live, waiting) in enumerate(columns)]
    total = f"makespan {summary['makespan']:g}, bubble {sum(summary['bubble']):g} in all"
    return "\n".join([head, *filter(None, [note]), f"{total}, {summary['bubble_share']:.1%} of the ranks' time", *rows])
