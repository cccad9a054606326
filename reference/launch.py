"""Runs a function as several processes on this machine, each forked from this one, and brings their results back.

Forking shares what is imported already: importing torch and megatron takes many seconds, a fork milliseconds.  The
parent must not have started thread pools, process groups or CUDA.  Ranks meet through a file in a fresh folder, so
launches do not disturb each other.  None outlives the launch: not when a rank fails, the time is up or the user
presses Ctrl-C.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM})
_IMPORTED_LATE = ("torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch.profiler")
"""What torch imports at the first backward and the first optimizer: seconds, better spent here than in each rank."""


@dataclass(frozen=True)
class Context:
    """What a launched process knows: its rank, how many there are, and how to report ``progress`` (a small value)."""

    rank: int
    ranks: int
    progress: Callable[[Any], None]


@dataclass(frozen=True)
class Failure:
    """How a rank ended that did not return: the error's type and text, its traceback, seconds since the start."""

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
        """The ranks that failed, in order of time: the first is usually the cause."""
        return tuple(sorted((r for r in self.results if isinstance(r, Failure)), key=lambda f: f.seconds))

    def values(self) -> list[T]:
        """Every rank's result.  Raises ``RuntimeError`` with all failures if there is one."""
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
) -> Outcome[T]:
    """Run ``body`` in ``ranks`` processes.

    Parameters
    ----------
    timeout:
        Seconds after which every rank that still runs is ended.
    grace:
        Seconds that the other ranks have, once one has failed, to end by themselves and tell what they waited for.
    backend:
        Of the default process group, which every rank has joined when ``body`` is called; ``None`` for no process
        group.
    on_progress:
        Called in this process with the rank and what it reported.
    """

    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # asking for a GPU must not initialise CUDA before a fork
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    fork = get_context("fork")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dualpipe-") as folder:
        processes, pipes = [], []
        try:
            with _without_interrupts():
                for rank in range(ranks):
                    receiving, sending = fork.Pipe(duplex=False)
                    process = fork.Process(
                        target=_child, args=(rank, ranks, body, sending, Path(folder), timeout, backend, started)
                    )
                    process.start()
                    sending.close()
                    processes.append(process)
                    pipes.append(receiving)
            results = _collect(pipes, started, timeout, grace, on_progress)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()
    return Outcome(tuple(results), time.monotonic() - started)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off: Python drops an exception that is raised in what it calls around a fork."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(
    pipes: list[Connection], started: float, timeout: float, grace: float, on_progress: Callable[[int, Any], None]
) -> list[Any]:
    """Read every rank's messages until each has ended or the time is up."""
    results: dict[int, Any] = {}
    deadline, allowed = started + timeout, timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type] # wait() returns what it was given
            seconds = time.monotonic() - started
            try:
                what, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                what, value = "end", Failure(rank, "Killed", "the process ended without a word", "", seconds)
            if what == "progress":
                on_progress(rank, value)
                continue
            results[rank] = value
            if isinstance(value, Failure) and seconds + grace < deadline - started:
                deadline, allowed = time.monotonic() + grace, seconds + grace
    for rank in range(len(pipes)):
        if rank not in results:
            results[rank] = Failure(
                rank, "TimeUp", f"still running after {allowed:.0f} s, so it was ended", "", allowed
            )
    return [results[rank] for rank in range(len(pipes))]


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
    """The life of a rank.  It leaves by ``os._exit``: a process group with a broken connection may never close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the ranks
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
    _die_with_parent()
    torch.set_num_threads(1)

    def send(what: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((what, value)))

    try:
        if backend is not None:
            store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined] # public, unlisted
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
            )
            dist.barrier()  # a rank whose body ends at once must not be gone while another still connects to it
        send("end", body(Context(rank, ranks, lambda value: send("progress", value))))
    except BaseException as error:
        notes = "; ".join(getattr(error, "__notes__", []))
        told = str(error) or _line(error)
        text = f"{told} ({notes})" if notes else told
        trace = traceback.format_exc()
        send("end", Failure(rank, type(error).__name__, text, trace, time.monotonic() - started))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _line(error: BaseException) -> str:
    """The line that raised an error without a text, as a bare ``assert`` does."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _die_with_parent() -> None:
    """On Linux, be killed when the parent is gone, however it went; elsewhere a rank ends by its timeouts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
