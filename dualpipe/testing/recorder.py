"""``record()``: record the part of a pipeline that runs in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist

from dualpipe.record.child import collectives, compute, messages, ranges
from dualpipe.record.child.log import Event, Sink
from dualpipe.record.child.patches import Patches
from dualpipe.record.child.plain import Plain
from dualpipe.record.lanes import parse
from dualpipe.record.launch import TOGETHER
from dualpipe.record.recording import Recording, assemble_events

_active = False


class LiveRecording:
    """The events of this rank so far."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def gather(
        self,
        group: dist.ProcessGroup | None = None,
        name: str = "recorded",
        step: int | None = None,
        lanes: Sequence[str] = (),
    ) -> Recording:
        """The recording of all ranks; every rank of the group must call this, and every rank gets it.

        ``step`` is the training step, counted from 1; the default is the first that ends with an optimizer's step.

        ``lanes`` are the ranks of each lane's stages, such as ``"0 1 2 3"``, for a run whose messages do not show them.

        Raises ``RecordError`` if an op cannot be named.
        """
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, self.events, group=group)
        return assemble_events(dict(enumerate(parts)), name, step, parse(lanes) if lanes else None)


@contextmanager
def record(
    together: Collection[str] = (),
    containers: Collection[str] = (),
    sink: Sink | None = None,
    plain: tuple[str, int, float] | None = None,
) -> Iterator[LiveRecording]:
    """Record what this rank computes and sends inside the ``with``.

    Parameters
    ----------
    together:
        More names of methods that overlap a forward with a backward; all that one call computes is one slot.
    containers:
        Names of module classes whose call runs the pipeline and is not the forward of a stage.
    sink:
        Also called with every event as it happens.
    plain:
        A file for a plain run of one training step, the step (from 1, or 0 for the first that is not thrown away), and
        the seconds that the plain run may take: see ``dualpipe.record.plain``.

    Raises ``RuntimeError`` inside another recording of the same process.
    """
    global _active
    if _active:
        raise RuntimeError("a process makes one recording at a time; end the first one before the next")
    recording = LiveRecording()

    def write(event: Event) -> None:
        recording.events.append(event)
        if sink is not None:
            sink(event)

    flow, patches = ranges.RangedFlow(write), Patches()
    with ExitStack() as stack:
        stack.callback(patches.undo)
        ranges.watch(flow, patches)
        operators = compute.watch(flow, patches, (*TOGETHER, *together), containers)
        transport = messages.watch(flow, patches)
        collectives.watch(flow, patches, transport)
        again = None if plain is None else Plain(flow, transport, *plain, containers)
        if again is not None:
            again.watch(patches)
        _active = True
        try:
            with operators:
                yield recording
                if again is not None:
                    again.end()
            flow.write("end")
        except BaseException as error:
            flow.raised(error)
            raise
        finally:
            _active = False
