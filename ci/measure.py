"""Measures schedules: a JSON object of name and text comes in on standard input, one of figures goes out.

Schedules of both sides of a change are measured by the same simulator, that of the tree under judgement.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(text: str) -> dict[str, Any]:
    """Makespan, bubble, peaks and messages with F, B and W of one unit each; ``stuck`` where it cannot finish."""
    from dualpipe.schedule import SENDS, ScheduleError
    from dualpipe.schedule.text import loads
    from dualpipe.timeline.simulate import simulate

    try:
        schedule = loads(text)
        timeline = simulate(schedule)
    except ScheduleError as error:
        return {"stuck": str(error)}
    return {
        "makespan": timeline.makespan,
        "bubble": sum(timeline.bubble),
        "peak_activations": list(timeline.peak_activations),
        "peak_pending_w": list(timeline.peak_pending_w),
        "messages": sum(placed.op.kind in SENDS for placed in schedule),
    }


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever the tree prints is not the answer
    json.dump({name: measure(text) for name, text in json.load(sys.stdin).items()}, answer)
