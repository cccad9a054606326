"""The costs of a measured run, from the trace that ``dualpipe verify --trace`` wrote.

Each stage gets the medians of its F, B and W.  The latency is the median over the messages whose receiver was already
waiting when they were sent: only then is the time until the receiver goes on the time of the message.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any, NamedTuple

from dualpipe.errors import RuleError
from dualpipe.timeline.perfetto import TICK
from dualpipe.timeline.timeline import Costs

MEASURED = "measured"
"""The name of the process of a trace that has the measured runs."""
_MICROSECOND = 1e-6

Event = Mapping[str, Any]


class Times(NamedTuple):
    """What was measured of one kind of op or message: seconds, with the quartiles below and above the median."""

    median: float
    lower: float
    upper: float
    samples: int

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.lower:.4g} to {self.upper:.4g}, {self.samples})"


def times_of(samples: list[float]) -> Times | None:
    """The median and the quartiles of samples in seconds; ``None`` without samples."""
    if not samples:
        return None
    lower, _, upper = quantiles(samples * 2 if len(samples) == 1 else samples, n=4, method="inclusive")
    return Times(median(samples), lower, upper, len(samples))


class StageTimes(NamedTuple):
    """The times of a stage; ``None`` for what was not measured.  ``BW`` is a full backward."""

    F: Times | None
    B: Times | None
    W: Times | None
    BW: Times | None

    def medians(self) -> tuple[float | None, ...]:
        return tuple(None if each is None else each.median for each in self)


@dataclass(frozen=True)
class Measured:
    """What a trace says.

    Attributes
    ----------
    stages:
        The times of each stage, by number.
    latency:
        The times of messages, or ``None`` if no receiver was waiting for one when it was sent.
    remarks:
        What was measured and is left out, one sentence each.
    """

    ranks: int
    stages: Mapping[int, StageTimes]
    latency: Times | None
    remarks: tuple[str, ...] = ()

    @property
    def costs(self) -> Costs:
        """The costs of a share, 1/P of the model: the mean over the depth, and each measured stage as ``stages``.

        A stage without a split backward has its own full backward, of which B and W get the parts that they have at
        the stages that were measured with both, or half each if there are none.  A stage without a full backward has
        the sum of its B and W.  A stage without F, or without any backward, has the mean of the others.
        """
        share = len(self.stages) / self.ranks  # measured stages that a share has
        slices = [self._slice(times).times(share) for times in self.stages.values()]
        F, B, W, BW = (mean(getattr(each, name) for each in slices) for name in ("F", "B", "W", "backward"))  # noqa: N806
        latency = 0.0 if self.latency is None else self.latency.median
        return Costs(F, B, W, BW=BW, latency=latency, stages=tuple(slices))

    def _slice(self, times: StageTimes) -> Costs:
        forward, backward, weights, whole = times.medians()
        forward = self._forward() if forward is None else forward
        if backward is None or weights is None:
            if whole is None:
                whole = self._whole()
            b, w = self._split() or (0.0, 0.0)
            part = b / (b + w) if b + w else 0.5
            backward, weights = whole * part, whole * (1 - part)
        return Costs(forward, backward, weights, BW=whole)

    def _forward(self) -> float:
        """The mean F of the stages at which one was measured."""
        return mean(times.F.median for times in self.stages.values() if times.F)

    def _split(self) -> tuple[float, float] | None:
        """The mean B and W of the stages at which both were measured."""
        split = [(times.B.median, times.W.median) for times in self.stages.values() if times.B and times.W]
        return (mean(b for b, _ in split), mean(w for _, w in split)) if split else None

    def _whole(self) -> float:
        """The time of B and W together, averaged over the stages at which a backward was measured."""
        return mean(whole for times in self.stages.values() if (whole := _backward(times)) is not None)

    @property
    def doubts(self) -> list[str]:
        """A line for each stage whose full backward is not within a factor of 2 of a B and a W."""
        split = self._split()
        lines = []
        for stage, times in self.stages.items():
            if times.BW is None or split is None:
                continue
            own = times.B.median + times.W.median if times.B and times.W else split[0] + split[1]
            if not own / 2 <= times.BW.median <= 2 * own:
                where = "" if times.B and times.W else " of other stages"
                lines.append(
                    f"stage {stage}: a full backward takes {times.BW.median:.4g} s, B and W{where} {own:.4g} s"
                )
        return lines


def _backward(times: StageTimes) -> float | None:
    if times.B is not None and times.W is not None:
        return times.B.median + times.W.median
    return None if times.BW is None else times.BW.median


def read(path: Path) -> Measured:
    """The costs in a trace file.  Raises ``RuleError`` for a file that has no measured run."""
    rule = "a trace with costs is one that `dualpipe verify --trace FILE` wrote"
    try:
        events = json.loads(path.read_text())["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        own = {pid for pid, name in names.items() if name == MEASURED}
        return _measured([event for event in events if event["ph"] == "X" and event["pid"] in own])
    except RuleError:
        raise
    except OSError as error:
        raise RuleError(rule, f"{path}: {error.strerror or error}", "name another file") from error
    except (ValueError, KeyError, TypeError, LookupError) as error:
        raise RuleError(rule, f"{path} has no measured run", "name such a trace") from error


def _measured(slices: Iterable[Event]) -> Measured:
    took: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    waits: dict[tuple[str, float], float] = {}
    sends: dict[str, list[Event]] = defaultdict(list)
    ranks = set()
    for event in slices:
        kind, args = event["cat"], event["args"]
        if kind in ("F", "B", "W"):
            ranks.add(args["rank"])
            name = "BW" if kind == "B" and "note" in args else str(kind)
            if kind != "W" or "note" not in args:  # a W within a full backward has no time of its own
                took[args["stage"]][name].append(event["dur"] * _MICROSECOND)
        elif kind == "bubble" and event["name"].startswith("waits for "):
            end = event["ts"] + event["dur"]
            waits[event["name"].removeprefix("waits for "), round(end, 1)] = event["ts"]
        elif kind in ("SF", "SB"):
            sends[event["name"]].append(event)
    stages = {
        stage: StageTimes(*(times_of(kinds.get(kind, [])) for kind in StageTimes._fields))
        for stage, kinds in sorted(took.items())
    }
    if not stages:
        raise LookupError("no op was measured")
    check_stages(stages)
    return Measured(len(ranks), stages, times_of(list(_latencies(sends, waits))))


def check_stages(stages: Mapping[int, StageTimes]) -> None:
    """Raises ``RuleError`` where stages have no times, and no other stage has any to use instead."""
    rule, fix = "a trace with costs has ops of every stage, forwards and backwards", "record the whole run again"
    if absent := sorted(set(range(max(stages) + 1)) - stages.keys()):
        raise RuleError(rule, f"no op of stage {absent[0]} was measured, and ops of stage {max(stages)} were", fix)
    if all(times.F is None for times in stages.values()):
        raise RuleError(rule, "no forward was measured", fix)
    if all(_backward(times) is None for times in stages.values()):
        raise RuleError(rule, "no backward was measured, neither a full one nor both B and W of a stage", fix)


def _latencies(sends: Mapping[str, list[Event]], waits: Mapping[tuple[str, float], float]) -> Iterable[float]:
    """The seconds of each message whose receiver waited for it from before it was sent."""
    for name, events in sends.items():
        for event in events:
            completed = event["ts"] + event["dur"] - TICK
            waited = waits.get((_receive_of(name), round(completed, 1)))
            if waited is not None and waited <= event["ts"]:
                yield (completed - event["ts"]) * _MICROSECOND


def _receive_of(send: str) -> str:
    """The receive that a send goes to: ``2SF3>`` to ``3RF3>``, ``2SB3>`` to ``1RB3>``."""
    stage, _, rest = send.partition("S")
    return f"{int(stage) + (1 if rest[0] == 'F' else -1)}R{rest.partition('@')[0]}"


def describe(measured: Measured, latency: float | None = None) -> str:
    """The times of each stage and of the messages, in seconds; ``latency`` is one that is used instead."""
    rows = [["stage", *StageTimes._fields]]
    rows += [
        [f"{stage}", *("-" if each is None else f"{each}" for each in times)]
        for stage, times in measured.stages.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["measured, in seconds: median (lower to upper quartile, number of samples)"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    found = measured.latency
    link = "no receiver was waiting when its message was sent" if found is None else f"{found} s"
    used = ", so 0 is used" if found is None else ""
    lines.append(f"latency: {link}{used if latency is None else f'; --latency overrides it: {latency:g} s'}")
    lines += measured.remarks
    lines += [f"warning: {doubt}; measure again where nothing else runs" for doubt in measured.doubts]
    return "\n".join(lines)
