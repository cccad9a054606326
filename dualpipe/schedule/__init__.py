"""The schedule as a value, and all that makes one: its text, tables of other tools, phase tables, lowering.

Everything here needs the standard library alone.  This module has the vocabulary that everything else consumes.
"""

from dualpipe.schedule.failure import Failure, printable
from dualpipe.schedule.op import (
    COMPUTE,
    DOWN,
    MESSAGES,
    RB,
    RECEIVES,
    RF,
    SB,
    SENDS,
    SF,
    UP,
    B,
    Chunk,
    F,
    Kind,
    Lane,
    Op,
    Placed,
    Program,
    ScheduleError,
    Slot,
    Task,
    W,
    full_backwards,
    show_slot,
)
from dualpipe.schedule.routes import Routes, check_routes
from dualpipe.schedule.value import Schedule, check_name, check_slot

__all__ = [
    "COMPUTE",
    "DOWN",
    "MESSAGES",
    "RB",
    "RECEIVES",
    "RF",
    "SB",
    "SENDS",
    "SF",
    "UP",
    "B",
    "Chunk",
    "F",
    "Failure",
    "Kind",
    "Lane",
    "Op",
    "Placed",
    "Program",
    "Routes",
    "Schedule",
    "ScheduleError",
    "Slot",
    "Task",
    "W",
    "check_name",
    "check_routes",
    "check_slot",
    "full_backwards",
    "printable",
    "show_slot",
]
