"""The costs of a measured run, from the trace that ``dualpipe verify --trace`` wrote.

Of each stage the median F, B and W; of the links the median time of the messages whose receiver was waiting when they
were sent, since only then is the time until it goes on that of the message.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from dualpipe.errors import RuleError
from dualpipe.timeline.perfetto import TICK
from dualpipe.timeline.timeline import Costs

MEASURED = "measured"
"""The name of the process of a trace that has the measured runs."""
_MICROSECOND = 1e-6

Event = Mapping[str, Any]


class StageTimes(NamedTuple):
    """Medians in seconds; ``None`` for what was not measured.  ``BW`` is a full backward."""

    F: float | None
    B: float | None
    W: float | None
    BW: float | None


@dataclass(frozen=True)
class Measured:
    """What a trace says.

    Attributes
    ----------
    stages:
        The times of each stage, by number.
    latency:
        Median seconds of a message, or ``None`` if no receiver was waiting for one when it was sent.
    """

    ranks: int
    stages: Mapping[int, StageTimes]
    latency: float | None

    @property
    def costs(self) -> Costs:
        """The costs of a share, 1/P of the model: the mean over the depth, and each measured stage as ``stages``.

        B and W get half of a full backward each where no backward was split, and a stage without a kind of op has the
        mean of the others.
        """
        share = len(self.stages) / self.ranks  # measured stages that a share has
        slices = [self._slice(times).times(share) for times in self.stages.values()]
        F, B, W, BW = (mean(getattr(each, name) for each in slices) for name in ("F", "B", "W", "backward"))  # noqa: N806
        return Costs(F, B, W, BW=BW, latency=self.latency or 0.0, stages=tuple(slices))

    def _slice(self, times: StageTimes) -> Costs:
        whole = self._or_mean("BW", times.BW)
        half = (whole or 0.0) / 2
        given = {"F": times.F, "B": times.B, "W": times.W}
        found = {kind: self._or_mean(kind, time) for kind, time in given.items()}
        forward, backward, weights = (half if time is None else time for time in found.values())
        return Costs(forward, backward, weights, BW=whole)

    def _or_mean(self, kind: str, time: float | None) -> float | None:
        """The time of a stage, or if it has none the mean of the others."""
        if time is not None:
            return time
        others = [getattr(stage, kind) for stage in self.stages.values()]
        return mean(each for each in others if each is not None) if any(others) else None


def read(path: Path) -> Measured:
    """The costs in a trace file.  Raises ``RuleError`` for a file that has no measured run."""
    rule = "--cost-from is a trace that `dualpipe verify --trace FILE` wrote"
    try:
        events = json.loads(path.read_text())["traceEvents"]
        names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        own = {pid for pid, name in names.items() if name == MEASURED}
        return _measured([event for event in events if event["ph"] == "X" and event["pid"] in own])
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
        stage: StageTimes(*(median(kinds[kind]) if kinds.get(kind) else None for kind in StageTimes._fields))
        for stage, kinds in sorted(took.items())
    }
    if not stages:
        raise LookupError("no op was measured")
    latencies = list(_latencies(sends, waits))
    return Measured(len(ranks), stages, median(latencies) if latencies else None)


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


def describe(measured: Measured) -> str:
    """The times of each stage, and of the links, in milliseconds."""
    lines = ["measured, ms:  stage  " + "  ".join(f"{kind:>7}" for kind in StageTimes._fields)]
    for stage, times in measured.stages.items():
        cells = (f"{time * 1e3:7.3f}" if time is not None else f"{'-':>7}" for time in times)
        lines.append(f"{stage:20}  {'  '.join(cells)}")
    link = "no receiver was waiting when its message was sent, so 0 is used"
    lines.append(f"latency: {link if measured.latency is None else f'{measured.latency * 1e3:.3f} ms'}")
    return "\n".join(lines)
