"""The computes of a timeline, short enough to write in a test."""

from dualpipe.schedule import COMPUTE, show_slot
from dualpipe.timeline.simulate import Timeline


def spans(timeline: Timeline, rank: int) -> list[tuple[str, float, float]]:
    """The computes of a rank with start and end."""
    return [(show_slot(s.ops), s.start, s.end) for s in timeline.spans[rank] if s.ops[0].kind in COMPUTE]
