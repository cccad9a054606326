"""Ranges in the program's own torch.profiler traces: module calls, runs of the engine, messages.

While the program profiles itself, each of them is a range ``dualpipe:NUMBER``, and the log says what it was.  Which op
that is follows later from the events of all ranks, as for the schedule file; its name then replaces the number in the
traces (``dualpipe.record.traces``).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.profiler.profiler import _KinetoProfile

from .calls import Call
from .flow import Flow
from .log import Sink
from .marks import Marks
from .patches import Patches
from .posts import Posted

PREFIX = "dualpipe:"


def watch(flow: Flow, patches: Patches) -> None:
    """Note the traces that the program exports, until ``patches.undo()``."""
    for owner in (_KinetoProfile, profiler.profile):
        patches.put(owner, "export_chrome_trace", _export(flow, owner.export_chrome_trace))


def _export(flow: Flow, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def export_chrome_trace(self: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, path, *args, **kwargs)
        flow.write("trace", path=os.path.abspath(os.fspath(path)))
        return result

    return export_chrome_trace


class RangedFlow(Flow):
    """A flow that also marks what happens as ranges of a running profiler."""

    def __init__(self, sink: Sink) -> None:
        self._entered: dict[object, tuple[int, Any]] = {}  # what is in progress -> its number and its range
        self._ranges = 0
        super().__init__(sink)

    def begin(self, module: nn.Module, inputs: Sequence[Tensor] | None) -> Call:
        call = super().begin(module, inputs)
        self._enter(id(call))
        return call

    def end(self, call: Call) -> None:
        self._leave(id(call), "call", [number for _, number in call.made or ()])
        super().end(call)

    def run(self, roots: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> Marks:
        made = super().run(roots, grads, inputs)
        self._enter("run")
        return made

    def ran(self, completed: bool) -> None:
        self._leave("run", "run", [self._engine_runs.count])
        super().ran(completed)

    def post(self, messages: Sequence[Posted]) -> list[int]:
        numbers = super().post(messages)
        self._mark("post", numbers)
        return numbers

    def write(self, event: str, **fields: Any) -> None:
        if event == "completed":
            self._leave(self._wait_of(fields["messages"]), "wait", fields["messages"])
        super().write(event, **fields)
        if event == "wait":
            self._enter(self._wait_of(fields["messages"]))
        elif event == "weights" and fields["run"] is None:
            self._mark("weights", fields["forwards"])

    def note_error(self, error: BaseException, what: str, numbers: Iterable[int], freed: str = "") -> None:
        numbers = list(numbers)
        self._leave(self._wait_of(numbers), "wait", [])
        super().note_error(error, what, numbers, freed)

    @staticmethod
    def _wait_of(messages: Sequence[int]) -> object:
        """A wait for messages, which helper threads may do as well."""
        return threading.get_ident(), *messages

    def _enter(self, key: object) -> None:
        if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined] # public, unlisted
            return
        entered = profiler.record_function(f"{PREFIX}{self._ranges}")
        self._entered[key] = self._ranges, entered
        self._ranges += 1
        entered.__enter__()  # type: ignore[no-untyped-call] # torch's own

    def _leave(self, key: object, what: str, numbers: Sequence[int]) -> None:
        """What was entered ends; ``numbers`` are its forwards, its messages or its run, as the log counts them."""
        number, entered = self._entered.pop(key, (0, None))
        if entered is None:
            return
        entered.__exit__(None, None, None)
        if numbers:
            super().write("range", number=number, what=what, numbers=list(numbers))

    def _mark(self, what: str, numbers: Sequence[int]) -> None:
        """A range of an instant."""
        self._enter(what)
        self._leave(what, what, numbers)
