"""Start the recorder in a new process; called by ``sitecustomize``.

Every Python process of the recorded command comes here: the ranks, their launchers, and helpers that do not use torch.
So the recorder does nothing until the process has imported torch, and writes nothing until it has joined a process
group.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from . import stacks
from .ranks import die_with_parent


def start(folder: str) -> None:
    """Arrange that the recorder is installed as soon as torch has been imported."""
    settings = json.loads((Path(folder) / "settings.json").read_text())
    if os.getppid() == settings["launcher"]:
        die_with_parent()
    stacks.answer(folder)
    sys.meta_path.insert(0, _Finder(functools.partial(install, folder, settings)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch as usual, and calls ``then`` when its import has finished."""

    def __init__(self, then: Any) -> None:
        self._then = then

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader, then = spec.loader, self._then
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            then()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(folder: str, settings: dict[str, Any]) -> None:
    """Answer CUDA calls, and watch the process once it joins a process group; torch has been imported."""
    import torch.distributed as dist

    from . import cuda, nccl
    from .patches import Patches

    if not dist.is_available():
        return
    patches = Patches()
    devices = int(settings["devices"] or os.environ.get("WORLD_SIZE", 0) or 1)
    cuda.answer(patches, devices).__enter__()  # type: ignore[no-untyped-call] # torch's own
    from torch.distributed import distributed_c10d as c10d

    atexit.register(_note_early_error, folder)
    begin = c10d.init_process_group
    sessions = [0]

    @functools.wraps(begin)
    def init_process_group(backend: Any = None, init_method: Any = None, *args: Any, **kwargs: Any) -> Any:
        sessions[0] += 1
        if settings["store"] and not args and kwargs.get("store") is None and init_method in (None, "env://"):
            result = begin(backend, **_with_file_store(kwargs, f"{settings['store']}-{sessions[0]}"))
        else:
            result = begin(backend, init_method, *args, **kwargs)
        if nccl.stands_for_nccl(None) or "gloo" in dist.get_backend():
            # gloo connects all ranks at once, so none may end while another is connecting
            dist.barrier()
        _record(folder, settings, sessions[0])
        return result

    for module in (c10d, dist):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]


def _with_file_store(kwargs: dict[str, Any], path: str) -> dict[str, Any]:
    """Let ranks that the recorder launched meet through a file, because the port may be taken by then."""
    import torch.distributed as dist

    ranks = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(path, ranks)  # type: ignore[attr-defined] # public, unlisted
    given = {key: value for key, value in kwargs.items() if key not in ("store", "rank", "world_size") or value != -1}
    return {"rank": int(os.environ["RANK"]), "world_size": ranks, **given, "store": store}


def _record(folder: str, settings: dict[str, Any], session: int) -> None:
    """Watch this process from now on.  A second process group is a second recording."""
    import torch.distributed as dist

    from . import collectives, compute, messages, ranges
    from .log import to_file
    from .patches import Patches

    global _WATCH, _JOINED
    if _WATCH is not None:
        _stop()
    _JOINED = True
    flow = ranges.RangedFlow(to_file(str(Path(folder) / f"{os.getpid()}-{session}.events")))
    patches = Patches()
    ranges.watch(flow, patches)
    mode = compute.watch(flow, patches, settings["together"], settings["containers"])
    transport = messages.watch(flow, patches)
    collectives.watch(flow, patches, transport)
    plain = None
    if settings["plain_step"] is not None:
        from .plain import Plain

        path = str(Path(folder) / "plain" / str(session) / f"{dist.get_rank()}.pt")
        plain = Plain(flow, transport, path, settings["plain_step"], settings["plain_seconds"], settings["containers"])
        plain.watch(patches)
    mode.__enter__()  # type: ignore[no-untyped-call] # torch's own
    _WATCH = (flow, patches, mode, plain)
    flow.write("rank", rank=dist.get_rank(), ranks=dist.get_world_size(), parent=os.getppid(), session=session)
    atexit.register(_stop)
    Finalize(None, _stop, exitpriority=0)  # a process forked by multiprocessing runs no atexit hooks


_WATCH: Any = None
_JOINED = False


def _note_early_error(folder: str) -> None:
    """At the end of a rank that never joined a process group: the error that ended it."""
    error = getattr(sys, "last_value", None)
    if _JOINED or error is None or not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return
    from .flow import Flow
    from .log import to_file

    flow = Flow(to_file(str(Path(folder) / f"{os.getpid()}-0.events")))
    flow.write("rank", rank=int(os.environ["RANK"]), ranks=int(os.environ["WORLD_SIZE"]))
    flow.raised(error)


def _stop() -> None:
    global _WATCH
    if _WATCH is None:
        return
    flow, patches, mode, plain = _WATCH
    _WATCH = None
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)  # of a process that multiprocessing forked, and else
    if error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0)):
        flow.raised(error)
    else:
        if plain is not None:
            plain.end()
        flow.write("end")
    mode.__exit__(None, None, None)
    patches.undo()
