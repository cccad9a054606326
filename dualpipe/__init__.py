"""DualPipe that can be trusted: a pipeline schedule as a value that is run, proved and compared bit by bit.

The names below need the standard library alone.  ``dualpipe.pipeline`` (which needs torch) runs a schedule.
"""

from dualpipe.generate import dualpipe, dualpipev, one_f_one_b, zb1p
from dualpipe.schedule import DOWN, UP, Kind, Lane, Op, Schedule
from dualpipe.schedulefile import dumps, load, loads

__all__ = [
    "DOWN",
    "UP",
    "Kind",
    "Lane",
    "Op",
    "Schedule",
    "dualpipe",
    "dualpipev",
    "dumps",
    "load",
    "loads",
    "one_f_one_b",
    "zb1p",
]
