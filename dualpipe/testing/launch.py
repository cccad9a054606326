"""Run a function as several ranks on this machine, each a process forked from this one, and collect their results.

A fork shares what has been imported: importing torch and Megatron takes many seconds, forking takes milliseconds.  The
parent must not have started thread pools, process groups or CUDA.  The ranks meet through a file in a new folder, so
concurrent launches do not interfere.  No rank outlives the launch, whether a rank fails, the time is up or the user
presses Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist

from dualpipe.record.child.ranks import IMPORTED_LATE, die_with_parent

T = TypeVar("T")

TIME_UP = "TimeUp"
"""The ``kind`` of the failure of a rank that was still running and had to be killed."""
_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM})
_POLL = 0.05
"""Seconds between two checks of ranks that report nothing."""


@dataclass(frozen=True)
class Context:
    """A rank's number, the number of ranks, and the function with which it reports ``progress`` (a small value)."""

    rank: int
    ranks: int
    progress: Callable[[Any], None]


@dataclass(frozen=True)
class Failure:
    """Why a rank returned nothing: the error's type and text, its traceback, and the seconds since the start."""

    rank: int
    kind: str
    text: str
    trace: str
    seconds: float

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.text}"


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What each rank returned, or how it failed."""

    results: tuple[T | Failure, ...]
    seconds: float

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The failures in order of time; the first is usually the cause."""
        return tuple(sorted((r for r in self.results if isinstance(r, Failure)), key=lambda f: f.seconds))

    def values(self) -> list[T]:
        """Every rank's result.  Raises ``RuntimeError`` with all failures if a rank failed."""
        if self.failures:
            raise RuntimeError("\n".join(map(str, self.failures)))
        return [r for r in self.results if not isinstance(r, Failure)]


def launch(
    ranks: int,
    body: Callable[[Context], T],
    timeout: float = 120.0,
    grace: float = 10.0,
    backend: str | None = "gloo",
    on_progress: Callable[[int, Any], None] = lambda rank, value: None,
    is_stuck: Callable[[], bool] = lambda: False,
) -> Outcome[T]:
    """Run ``body`` in ``ranks`` processes.

    Parameters
    ----------
    timeout:
        Seconds until every rank that still runs is killed.
    grace:
        Seconds that the other ranks have, once one has failed, to end by themselves and report what they waited for.
    backend:
        The backend of the default process group, which every rank joins before ``body`` is called; ``None`` for no
        group.
    on_progress:
        Called in this process with the rank and the value that it reported.
    is_stuck:
        Called in this process while no rank reports anything; the ranks are killed once it returns true.
    """
    # asking whether there is a GPU must not initialise CUDA before a fork
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in IMPORTED_LATE:  # once here instead of once in each rank
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    fork = get_context("fork")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            with _interrupts_blocked():
                for rank in range(ranks):
                    receiving, sending = fork.Pipe(duplex=False)
                    process: BaseProcess = fork.Process(
                        target=_child, args=(rank, ranks, body, sending, Path(folder), timeout, backend, started)
                    )
                    process.start()
                    sending.close()
                    processes.append(process)
                    pipes.append(receiving)
            results = _collect(processes, pipes, started, timeout, grace, on_progress, is_stuck)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()
    return Outcome(tuple(results), time.monotonic() - started)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM: Python drops an exception that is raised in a hook of ``os.register_at_fork``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(
    processes: Sequence[BaseProcess],
    pipes: Sequence[Connection],
    started: float,
    timeout: float,
    grace: float,
    on_progress: Callable[[int, Any], None],
    is_stuck: Callable[[], bool],
) -> list[Any]:
    """Read every rank's reports until each rank has ended, the time is up or the ranks are stuck."""
    results: dict[int, Any] = {}
    deadline, allowed = started + timeout, timeout
    while len(results) < len(pipes):
        running = {rank: pipe for rank, pipe in enumerate(pipes) if rank not in results}
        left = deadline - time.monotonic()
        connection.wait(list(running.values()), max(0.0, min(_POLL, left)))
        ended = {rank for rank in running if processes[rank].exitcode is not None}
        readable = [rank for rank, pipe in running.items() if pipe.poll()]
        before = len(results)
        for rank in readable:
            seconds = time.monotonic() - started
            try:
                what, value = pickle.loads(pipes[rank].recv_bytes())
            except (EOFError, OSError):  # killed, perhaps in the middle of a report
                processes[rank].join(_POLL)
                what, value = "end", _lost(rank, processes[rank], seconds)
            if what == "progress":
                on_progress(rank, value)
                continue
            results[rank] = value
        for rank in ended.difference(readable):  # a child of the rank's own may hold its pipe open
            results[rank] = _lost(rank, processes[rank], time.monotonic() - started)
        for failure in [results[rank] for rank in running if isinstance(results.get(rank), Failure)]:
            if failure.seconds + grace < deadline - started:
                deadline, allowed = time.monotonic() + grace, failure.seconds + grace
        if len(results) == before and (left <= 0 or (not readable and is_stuck())):
            allowed = allowed if left <= 0 else time.monotonic() - started
            break
    for rank in range(len(pipes)):
        if rank not in results:
            results[rank] = Failure(rank, TIME_UP, f"still running after {allowed:.0f} s, so stopped", "", allowed)
    return [results[rank] for rank in range(len(pipes))]


def _lost(rank: int, process: BaseProcess, seconds: float) -> Failure:
    return Failure(rank, "Killed", f"ended with exit code {process.exitcode} without a result", "", seconds)


def _child(
    rank: int,
    ranks: int,
    body: Callable[[Context], Any],
    pipe: Connection,
    folder: Path,
    timeout: float,
    backend: str | None,
    started: float,
) -> NoReturn:
    """Run one rank.  It leaves by ``os._exit``, since a process group with a broken connection may never close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
    die_with_parent()
    torch.set_num_threads(1)

    def send(what: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((what, value)))

    try:
        if backend is not None:
            store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined] # public, unlisted
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
            )
            dist.barrier()  # no body may end while another rank is still connecting to its process
        send("end", body(Context(rank, ranks, lambda value: send("progress", value))))
    except BaseException as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        text = (str(error) or _raising_line(error)) + (f" ({notes})" if notes else "")
        trace = traceback.format_exc()
        send("end", Failure(rank, type(error).__name__, text, trace, time.monotonic() - started))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _raising_line(error: BaseException) -> str:
    """The line that raised an error without a text, such as a bare ``assert``."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
