"""gloo in place of NCCL: process groups for ``nccl`` are of gloo, and behave like NCCL's where a program can tell."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .patches import Patches

_NAMES: set[str] = set()
"""The names of the process groups that a program requested of NCCL."""


def stands_for_nccl(group: Any) -> bool:
    """Whether the program requested this process group, or the default one for ``None``, of NCCL."""
    return getattr(group or c10d._get_default_group(), "group_name", None) in _NAMES


def answer(patches: Patches, on_cpu: Any) -> None:
    """Answer until ``patches.undo()``."""

    def backend(name: Any) -> Any:
        return "gloo" if name is None or "nccl" in str(name) else name

    def everywhere(name: str, function: Any) -> None:
        patches.put(c10d, name, function)
        patches.put(dist, name, function)

    start, new = c10d.init_process_group, c10d.new_group

    def init_process_group(given: Any = None, *args: Any, **kwargs: Any) -> Any:
        on_a_gpu = kwargs.pop("device_id", None) is not None
        kwargs.pop("pg_options", None)
        requested = kwargs.pop("backend", given)
        result = start(backend(requested), *args, **kwargs)
        if "nccl" in str(requested) or (requested is None and on_a_gpu):
            _NAMES.add(c10d._get_default_group().group_name)
        return result

    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        requested = kwargs.get("backend", next((a for a in args if isinstance(a, str)), None))
        of_nccl = stands_for_nccl(None) if requested is None else "nccl" in str(requested)
        if "backend" in kwargs:
            kwargs["backend"] = backend(kwargs["backend"])
        group = new(*(backend(a) if isinstance(a, str) else a for a in args), **kwargs)
        if of_nccl and isinstance(group, dist.ProcessGroup):
            _NAMES.add(group.group_name)
        return group

    def without_devices(barrier: Any) -> Any:
        def plain(group: Any = None, async_op: bool = False, device_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            return barrier(group, async_op, None, *args, **kwargs)

        return plain

    everywhere("init_process_group", init_process_group)
    everywhere("new_group", new_group)
    patches.wrap(c10d.barrier, without_devices)
    from torch.distributed import device_mesh

    mesh = device_mesh.init_device_mesh
    on_mesh = lambda device_type, *args, **kwargs: mesh(on_cpu(device_type), *args, **kwargs)  # noqa: E731
    patches.put(device_mesh, "init_device_mesh", on_mesh)
    patches.put(dist, "init_device_mesh", on_mesh)
    patches.later(_NAMES.clear)
