"""gloo in place of NCCL: process groups for ``nccl`` are of gloo, and behave like NCCL's where a program can tell.

Calls by torch itself get the true answer.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .patches import Patches
from .streams import asked_by_torch

_REQUESTED: dict[str, str] = {}
"""What a program requested for each process group that is to have NCCL, by the name of the group."""
_VERSION = (2, 28, 9)  # of NCCL


def stands_for_nccl(group: Any) -> bool:
    """Whether the program requested this process group, or the default one for ``None``, of NCCL."""
    return _requested_for(group) is not None


def _requested_for(group: Any) -> str | None:
    return _REQUESTED.get(getattr(group or c10d._get_default_group(), "group_name", ""))


def _is_nccl(backend: Any) -> bool:
    return "nccl" in str(backend).lower()


def _gloo_for(backend: Any) -> Any:
    return "gloo" if backend is None or _is_nccl(backend) else backend


def _note(group: Any, requested: str | None) -> None:
    """Note what the program requested for a group, ``None`` if that is not NCCL.  A later group may have its name."""
    if not isinstance(group, dist.ProcessGroup):
        return
    _REQUESTED.pop(group.group_name, None)
    if requested is not None:
        _REQUESTED[group.group_name] = requested


class ProcessGroupNCCL:
    """The class of NCCL's process groups, of which there are none; a program makes its options, which gloo ignores."""

    class Options(types.SimpleNamespace):
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            super().__init__(is_high_priority_stream=is_high_priority_stream, config=types.SimpleNamespace())


def answer(patches: Patches, on_cpu: Any) -> None:
    """Answer until ``patches.undo()``."""
    patches.later(_REQUESTED.clear)
    _make_groups(patches, on_cpu)
    _answer_questions(patches)


def _make_groups(patches: Patches, on_cpu: Any) -> None:
    """Make groups of gloo for those of NCCL."""
    start = c10d.init_process_group

    def init_process_group(given: Any = None, *args: Any, **kwargs: Any) -> Any:
        on_a_gpu = kwargs.pop("device_id", None) is not None
        kwargs.pop("pg_options", None)
        requested = kwargs.pop("backend", given)
        if requested is None and on_a_gpu:
            requested = "nccl"
        result = start(_gloo_for(requested), *args, **kwargs)
        _note(c10d._get_default_group(), requested if _is_nccl(requested) else None)
        return result

    def new_group(new: Any) -> Callable[..., Any]:
        parameters = inspect.signature(new)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = parameters.bind(*args, **kwargs).arguments
            given.pop("device_id", None)
            given.pop("pg_options", None)
            asked = given.get("backend")
            requested = _requested_for(None) if asked is None else asked if _is_nccl(asked) else None
            if asked is not None:
                given["backend"] = _gloo_for(asked)
            group = new(**given)
            _note(group, requested)
            return group

        return call

    def without_devices(barrier: Any) -> Callable[..., Any]:
        def plain(group: Any = None, async_op: bool = False, device_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            return barrier(group, async_op, None, *args, **kwargs)

        return plain

    def helper(new: Any) -> Callable[..., Any]:
        """What ``new_group`` calls, and a program that names its groups itself."""
        parameters = inspect.signature(new)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = parameters.bind(*args, **kwargs).arguments
            requested = given["backend"]
            if not _is_nccl(requested):
                return new(**given)
            made = new(**given | {"backend": c10d.Backend("gloo"), "backend_options": None, "device_id": None})
            _note(made[0], requested)
            return made

        return call

    for module in (c10d, dist):
        patches.put(module, "init_process_group", init_process_group)
    patches.wrap(c10d.new_group, new_group)
    patches.wrap(c10d._new_process_group_helper, helper)
    patches.wrap(c10d.barrier, without_devices)
    from torch.distributed import device_mesh

    mesh = device_mesh.init_device_mesh
    on_mesh = lambda device_type, *args, **kwargs: mesh(on_cpu(device_type), *args, **kwargs)  # noqa: E731
    patches.put(device_mesh, "init_device_mesh", on_mesh)
    patches.put(dist, "init_device_mesh", on_mesh)


def _answer_questions(patches: Patches) -> None:
    """Answer the program's questions for the backend of a group and for NCCL."""

    def unless_torch_asks(answered: Callable[..., Any], depth: int) -> Callable[[Any], Callable[..., Any]]:
        """``depth`` is how many frames the caller is away from the function returned here."""

        def wrapper(original: Any) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                true = original(*args, **kwargs)
                return true if asked_by_torch(1 + depth) else answered(true, *args, **kwargs)

            return call

        return wrapper

    def backend(true: Any, group: Any = None) -> Any:
        return c10d.Backend(_requested_for(group) or true)

    def backend_config(true: str, group: Any = None) -> str:
        """As NCCL's, and with NCCL for the CPU, which is where the program's tensors for a GPU say that they are."""
        requested = _requested_for(group)
        if requested is None:
            return true
        pairs = {"cpu": "nccl", **c10d.BackendConfig(c10d.Backend(requested)).get_device_backend_map()}
        return ",".join(f"{device}:{name}" for device, name in pairs.items())

    def name(true: str, group: Any) -> str:
        return "nccl" if stands_for_nccl(group) else true

    def is_available(true: bool, backend: str) -> bool:
        return dist.is_backend_available(_gloo_for(backend)) if _is_nccl(backend) else true

    of_function, of_method = 2, 1
    patches.wrap(c10d.get_backend, unless_torch_asks(backend, of_function))
    patches.wrap(c10d.get_backend_config, unless_torch_asks(backend_config, of_function))
    patches.wrap(c10d.is_nccl_available, unless_torch_asks(lambda true: True, of_function))
    patches.wrap(c10d.is_backend_available, unless_torch_asks(is_available, of_function))
    for method in ("name", "_get_backend_name"):
        original = getattr(dist.ProcessGroup, method, None)
        if original is not None:
            patches.put(dist.ProcessGroup, method, unless_torch_asks(name, of_method)(original))
    for module in (c10d, dist):
        patches.put(module, "ProcessGroupNCCL", ProcessGroupNCCL)
    patches.put(torch.cuda.nccl, "version", lambda: _VERSION)
