"""The streams and events of a GPU on the CPU: all work has finished when a call returns, so nothing waits for them."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch


class Stream:
    """A stream: it can be current, and it is equal only to itself."""

    priority_range = staticmethod(lambda: (0, -1))

    def __init__(self, device: Any = None, priority: int = 0, **more: Any) -> None:
        self.priority = priority
        self.device = torch.device("cpu")
        self.device_index = 0
        self.stream_id = self.cuda_stream = id(self)
        self._entered: list[Stream] = []

    def __enter__(self) -> Stream:
        self._entered.append(CURRENT[0])
        CURRENT[0] = self
        return self

    def __exit__(self, *error: object) -> None:
        CURRENT[0] = self._entered.pop()

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


DEFAULT = Stream()
CURRENT = [DEFAULT]


class Event:
    """An event: it has happened as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False, *args: Any, **kwargs: Any) -> None:
        self._at: float | None = None

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between two recorded events."""
        if self._at is None or end_event._at is None:
            raise RuntimeError("both events are recorded before the time between them is known")
        return (end_event._at - self._at) * 1000.0

    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


class Context:
    """``torch.cuda.stream(stream)``, where the stream may be ``None``."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.stream.__exit__(*error)


def asked_by_torch(depth: int = 2) -> bool:
    """Whether the caller of the function that asks is torch itself."""
    return str(sys._getframe(depth).f_globals.get("__name__", "")).partition(".")[0] == "torch"


def of_any_device(stand_in: type, original: type) -> type:
    """A class in place of ``torch.Stream`` or ``torch.Event``, whose device is a GPU or is not named."""

    class OfAnyDevice(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (stand_in, original))

        def __call__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
            if asked_by_torch():
                return original(*(() if device is None else (device,)), *args, **kwargs)
            return stand_in(**kwargs)

    return OfAnyDevice(original.__name__, (), {})
