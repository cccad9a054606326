"""``record_ranks()``: forks ranks that call a function, and records them."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from dualpipe.record.child import cuda
from dualpipe.record.child.log import to_file
from dualpipe.record.child.patches import Patches
from dualpipe.record.child.ranks import IMPORTED_LATE
from dualpipe.record.events import read_folder
from dualpipe.record.hang import Watchdog
from dualpipe.record.recording import Recording, assemble
from dualpipe.testing.recorder import record


def record_ranks(
    ranks: int,
    body: Callable[[int], None],
    timeout: float = 60.0,
    stall: float = 10.0,
    cuda_on_cpu: bool = False,
    together: Sequence[str] = (),
    containers: Sequence[str] = (),
    check: bool = True,
    step: int = 1,
) -> Recording:
    """Fork ``ranks`` processes with a gloo process group, call ``body(rank)`` in each, and record them.

    Parameters
    ----------
    timeout, stall:
        Seconds after which the ranks are ended: in all, and when every rank waits for messages and none comes.  A
        body that hangs is no error here: the recording has what was done until then, and its ``ended`` says who came
        to the end.
    cuda_on_cpu:
        Answer CUDA calls on the CPU.
    together, containers:
        As for ``record``.
    check:
        Whether an error on a rank is one here; without, the recording has what was done until then.
    step:
        Which training step, counted from 1; each ends with an optimizer's step.

    Raises
    ------
    RuntimeError
        If ``body`` raised on a rank, with that rank's traceback, or ended its process, and ``check`` is set.
    RecordError
        If something cannot be named.
    """
    for late in IMPORTED_LATE:  # once here, not once a rank
        importlib.import_module(late)
    fork = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="dualpipe-record-") as scratch:
        folder = Path(scratch)

        def rank_main(rank: int) -> None:
            code = 1
            try:
                torch.set_num_threads(1)
                store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined] # public, unlisted
                wait = timedelta(seconds=timeout)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=wait)
                dist.barrier()  # a rank that ends at once must not be gone before the others have found it
                sink = to_file(str(folder / f"{rank}.events"))
                sink({"event": "rank", "rank": rank, "ranks": ranks})
                with ExitStack() as stack:
                    if cuda_on_cpu:
                        patches = Patches()
                        stack.callback(patches.undo)
                        stack.enter_context(cuda.answer(patches, ranks))
                    stack.enter_context(record(together, containers, sink))
                    _until_it_exits(body, rank)
                code = 0
            except BaseException:
                (folder / f"{rank}.error").write_text(traceback.format_exc())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # a process group with a broken connection may never close

        processes: list[BaseProcess] = [fork.Process(target=rank_main, args=(rank,)) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, timeout, stall)
            died = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
        finally:
            started = [process for process in processes if process.pid is not None]
            for process in started:
                process.kill()
            for process in started:
                process.join()
        failed = {int(path.stem): path.read_text() for path in sorted(folder.glob("*.error"), key=_written)}
        silent = {rank: f"ended with exit code {code}" for rank, code in died.items() if rank not in failed}
        if check and (failed or silent):
            raise RuntimeError("\n".join(f"rank {rank}: {said}" for rank, said in (failed | silent).items()))
        logs, _ = read_folder(folder, ranks, 1)
        return assemble(logs, step=step)


def _until_it_exits(body: Callable[[int], None], rank: int) -> None:
    """Call the body; that it exits with code 0 is an end like any other."""
    try:
        body(rank)
    except SystemExit as end:
        if end.code:
            raise


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float, stall: float) -> None:
    """Until every rank has ended, one has failed, or the time is up."""
    started = time.monotonic()
    watchdog = Watchdog(folder, stall)
    while any(process.exitcode is None for process in processes):
        now = time.monotonic()
        if any(process.exitcode for process in processes) or now - started > timeout or watchdog.hangs(now):
            return
        time.sleep(0.01)
