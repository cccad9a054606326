"""Measures schedules: reads a JSON object of texts by name, and prints one of figures by name.

The schedules of both sides of a change are measured by the same simulator, the one of the present tree.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(text: str) -> dict[str, Any]:
    """Makespan, bubble, peaks and messages with F, B and W of one unit each; ``stuck`` if it cannot finish."""
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
    output, sys.stdout = sys.stdout, sys.stderr  # whatever the imported code prints must not get into the JSON
    json.dump({name: measure(text) for name, text in json.load(sys.stdin).items()}, output)
