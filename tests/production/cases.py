"""Small cases and faulty parts that the tests of production share."""

from collections.abc import Callable
from contextlib import nullcontext

import torch

from dualpipe.runtime.transport import Message
from dualpipe.schedule import Op, Schedule, Slot
from dualpipe.schedule.generate import generate
from reference.case import Case
from reference.model import ModelConfig
from reference.report import Comparison, Report
from reference.verify import PROCESSES

TINY = ModelConfig(hidden=16, heads=2, sequence=8, batch=1)


class Alone:
    """The transport of ``rank`` alone, where every receive gives ones.

    ``calls`` are the calls made to it, ``messages`` all that were posted.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.calls: list[tuple[str, str]] = []
        self.messages: list[Message] = []

    def post(self, messages):
        for message in messages:
            self.calls.append(("post", message.label))
            if not message.sends:
                message.tensors = [torch.ones(spec.shape, dtype=spec.dtype) for spec in message.specs]
        self.messages += messages

    def wait(self, message):
        self.calls.append(("wait", message.label))
        return () if message.sends else message.tensors

    def drain(self):
        self.calls.append(("drain", ""))

    def agree(self, record):
        self.calls.append(("agree", ""))

    def phase(self, kind):
        return nullcontext()

    def close(self):
        pass


def tiny(name: str = "dualpipe", ranks: int = 2, microbatches: int = 4, **options) -> Case:
    return Case(generate(name, ranks, microbatches), TINY, **{"steps": 2, "timeout": 6.0, **options})


def processes(report: Report) -> Comparison:
    (comparison,) = (comparison for comparison in report.comparisons if comparison.name == PROCESSES)
    return comparison


def rewrite(schedule: Schedule, rank: int, change: Callable[[Slot], list[Slot]]) -> Schedule:
    """The schedule with every slot of one rank replaced by what ``change`` makes of it."""
    programs = list(schedule.programs)
    programs[rank] = tuple(new for slot in programs[rank] for new in change(slot) if new)
    return Schedule(schedule.routes, tuple(programs), schedule.name)


def without(schedule: Schedule, rank: int, dropped: Op) -> Schedule:
    """The schedule with one op of one rank left out."""
    changed = rewrite(schedule, rank, lambda slot: [tuple(op for op in slot if op != dropped)])
    assert changed != schedule, f"rank {rank} has no {dropped}"
    return changed
