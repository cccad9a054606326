"""The recorder in a process that has just started, put there by ``sitecustomize``.

Every Python process that the recorded command starts comes here: the ranks, what launches them, and helpers that have
nothing to do with torch.  So nothing happens until the process has imported ``torch.distributed``, and nothing is
written until it has joined a process group.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any


def start(folder: str) -> None:
    """Arrange that the recorder is put in place as soon as torch.distributed has been imported."""
    settings = json.loads((Path(folder) / "settings.json").read_text())
    if sys.platform == "linux" and os.getppid() == settings["launcher"]:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the recorder
    sys.meta_path.insert(0, _Finder(functools.partial(install, folder, settings)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch as usual, and calls back when the outermost import of it is over."""

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
    """torch has been imported: answer CUDA calls, and watch from the moment on when a process group exists."""
    import torch.distributed as dist

    from . import cuda
    from .patches import Patches

    if not dist.is_available():
        return
    patches = Patches()
    devices = int(settings["devices"] or os.environ.get("WORLD_SIZE", 0) or 1)
    cuda.answer(patches, devices).__enter__()  # type: ignore[no-untyped-call] # torch's own
    from torch.distributed import distributed_c10d as c10d

    begin = c10d.init_process_group
    sessions = [0]

    @functools.wraps(begin)
    def init_process_group(backend: Any = None, init_method: Any = None, *args: Any, **kwargs: Any) -> Any:
        sessions[0] += 1
        if settings["store"] and not args and kwargs.get("store") is None and init_method in (None, "env://"):
            result = begin(backend, **_met_in_a_file(kwargs, f"{settings['store']}-{sessions[0]}"))
        else:
            result = begin(backend, init_method, *args, **kwargs)
        if "gloo" in dist.get_backend():  # it connects all ranks at once: none may end while another still connects
            dist.barrier()
        _record(folder, settings, sessions[0])
        return result

    for module in (c10d, dist):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]


def _met_in_a_file(kwargs: dict[str, Any], path: str) -> dict[str, Any]:
    """The ranks that the recorder has launched meet in a file: a port may be taken by then."""
    import torch.distributed as dist

    ranks = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(path, ranks)  # type: ignore[attr-defined] # public, unlisted
    given = {key: value for key, value in kwargs.items() if key not in ("store", "rank", "world_size") or value != -1}
    return {"rank": int(os.environ["RANK"]), "world_size": ranks, **given, "store": store}


def _record(folder: str, settings: dict[str, Any], session: int) -> None:
    """Watch this process from now on; a second process group is a second recording."""
    import torch.distributed as dist

    from . import compute, messages
    from .flow import Flow
    from .log import to_file
    from .patches import Patches

    global _WATCH
    if _WATCH is not None:
        _stop()
    flow = Flow(to_file(str(Path(folder) / f"{os.getpid()}-{session}.events")))
    patches = Patches()
    mode = compute.watch(flow, patches, settings["together"], settings["containers"])
    messages.watch(flow, patches)
    mode.__enter__()  # type: ignore[no-untyped-call] # torch's own
    _WATCH = (flow, patches, mode)
    flow.write("rank", rank=dist.get_rank(), ranks=dist.get_world_size(), parent=os.getppid(), session=session)
    atexit.register(_stop)
    Finalize(None, _stop, exitpriority=0)  # what multiprocessing forks ends without atexit


_WATCH: Any = None


def _stop() -> None:
    global _WATCH
    if _WATCH is None:
        return
    flow, patches, mode = _WATCH
    _WATCH = None
    flow.write("end")
    mode.__exit__(None, None, None)
    patches.undo()
