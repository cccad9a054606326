"""Answer CUDA calls on the CPU, so that a program written for GPUs runs without one.

Tensors for ``cuda`` are made on the CPU, ``nccl`` becomes ``gloo``, and ``torch.cuda`` reports as many devices as there
are ranks.  Calls by torch itself to ``torch.cuda`` get the true answer.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.overrides import TorchFunctionMode

from .patches import Patches

_Device, _Generator = torch.device, torch.Generator


def answer(patches: Patches, devices: int) -> TorchFunctionMode:
    """Answer until ``patches.undo()``; enter the mode to move calls that name a device."""
    patches.put(torch, "device", _DeviceOnCpu)
    patches.put(torch, "Generator", _GeneratorOnCpu)
    patches.put(torch, "load", _load(torch.load))
    current = [0]
    for name, value in _torch_cuda(devices, current).items():
        patches.put(torch.cuda, name, value)
    for name, value in _torch_accelerator(devices, current).items():
        if hasattr(torch.accelerator, name):
            patches.put(torch.accelerator, name, value)
    moved = torch.set_default_device
    patches.put(torch, "set_default_device", lambda device: moved(None if device is None else on_cpu(device)))
    for name, value in {"nvtx": _Nothing("nvtx"), "cudart": _Nothing("cudart")}.items():
        patches.put(torch.cuda, name, value)
    patches.put(torch.nn.Module, "cuda", lambda self, device=None: self)
    patches.put(torch.Tensor, "record_stream", lambda self, stream: None)
    _distributed(patches)
    return _OnCpu()


def on_cpu(device: Any) -> Any:
    """The CPU for a GPU; any other device unchanged."""
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(device, _Device) and device.type == "cuda":
        return _Device("cpu")
    return device


class _DeviceType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Device)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("type", kwargs.get("device"))
        if isinstance(first, int) or (isinstance(first, str) and first.partition(":")[0] == "cuda"):
            return _Device("cpu")
        return on_cpu(_Device(*args, **kwargs))


class _DeviceOnCpu(metaclass=_DeviceType):
    """Replaces ``torch.device``: makes real devices, and never a GPU."""


class _GeneratorType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)

    def __call__(cls, device: Any = "cpu") -> Any:
        return _Generator(_Device("cpu") if isinstance(device, int) else on_cpu(device))


class _GeneratorOnCpu(metaclass=_GeneratorType):
    """Replaces ``torch.Generator``."""


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load`` to the CPU; a function given as ``map_location`` is not changed."""

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, dict):
            map_location = {key: on_cpu(value) for key, value in map_location.items()}
        return original(f, "cpu" if map_location is None else on_cpu(map_location), *args, **kwargs)

    return load


class _OnCpu(TorchFunctionMode):
    """Moves every call that names a GPU to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], torch.Tensor) and name in ("cuda", "pin_memory"):
            return args[0]
        if name == "to" and len(args) > 1 and isinstance(args[1], int) and not isinstance(args[1], bool):
            args = (args[0], _Device("cpu"), *args[2:])
        if isinstance(kwargs.get("device"), int):
            kwargs = {**kwargs, "device": _Device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})


class _Nothing(types.ModuleType):
    """A module whose functions all do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class _Stream:
    """A stream or an event: on the CPU all work has finished when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.device = _Device("cpu")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def wait_event(self, *args: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


def _asked_by_torch() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0] == "torch"


def _torch_cuda(devices: int, current: list[int]) -> dict[str, Any]:
    available, count, initialized = torch.cuda.is_available, torch.cuda.device_count, torch.cuda.is_initialized

    def is_available() -> bool:
        return available() if _asked_by_torch() else True

    def device_count() -> int:
        return count() if _asked_by_torch() else devices

    def is_initialized() -> bool:
        return bool(initialized()) if _asked_by_torch() else True  # type: ignore[no-untyped-call] # torch's own

    class Chosen:
        """``with torch.cuda.device(1):``"""

        def __init__(self, device: Any) -> None:
            self._index, self._before = _index(device, current[0]), 0

        def __enter__(self) -> None:
            self._before, current[0] = current[0], self._index

        def __exit__(self, *error: object) -> None:
            current[0] = self._before

    return {
        "device": Chosen,
        "is_initialized": is_initialized,
        "get_device_properties": constant(_PROPERTIES),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * devices,
        "initial_seed": torch.initial_seed,
        "memory_stats": lambda device=None: {},
        "memory_snapshot": list,
        "memory_summary": constant(""),
        "can_device_access_peer": constant(True),
        "is_available": is_available,
        "device_count": device_count,
        "set_device": lambda device: current.__setitem__(0, _index(device, current[0])),
        "current_device": lambda: current[0],
        "get_device_name": constant("CPU in place of a GPU"),
        "get_device_capability": constant((9, 0)),
        "is_bf16_supported": constant(True),
        "mem_get_info": constant((0, 0)),
        "current_stream": constant(_Stream()),
        "default_stream": constant(_Stream()),
        "stream": lambda stream: stream if stream is not None else _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
        **{name: constant(None) for name in _IDLE},  # a function each: torch._dynamo has a table of them
        **{name: constant(0) for name in _ZERO},
    }


def _torch_accelerator(devices: int, current: list[int]) -> dict[str, Any]:
    true = {name: getattr(torch.accelerator, name) for name in ("is_available", "device_count", "current_accelerator")}

    def unless_torch_asks(name: str, value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: true[name](*args, **kwargs) if _asked_by_torch() else value

    return {
        "is_available": unless_torch_asks("is_available", True),
        "device_count": unless_torch_asks("device_count", devices),
        "current_accelerator": unless_torch_asks("current_accelerator", _Device("cpu")),
        "set_device_index": lambda device: current.__setitem__(0, _index(device, current[0])),
        "set_device_idx": lambda device: current.__setitem__(0, _index(device, current[0])),
        "current_device_index": lambda: current[0],
        "current_device_idx": lambda: current[0],
        "current_stream": constant(_Stream()),
        "synchronize": constant(None),
        "set_stream": constant(None),
    }


def constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _index(device: Any, current: int) -> int:
    """The number of a device; ``None``, a negative number and one without a number mean the current one."""
    if isinstance(device, int):
        return device if device >= 0 else current
    return int(str(device).partition(":")[2] or current)


_IDLE = (
    *("synchronize", "empty_cache", "ipc_collect", "init", "set_stream", "set_per_process_memory_fraction"),
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all"),
    *("reset_peak_memory_stats", "reset_accumulated_memory_stats"),
    *("reset_max_memory_allocated", "reset_max_memory_cached"),
)
_ZERO = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "utilization")
_PROPERTIES = types.SimpleNamespace(
    name="CPU in place of a GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32
)


def _distributed(patches: Patches) -> None:
    def backend(name: Any) -> Any:
        return "gloo" if name is None or "nccl" in str(name) else name

    def everywhere(name: str, function: Any) -> None:
        patches.put(c10d, name, function)
        patches.put(dist, name, function)

    start, new, barrier = c10d.init_process_group, c10d.new_group, c10d.barrier

    def init_process_group(given: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        return start(backend(kwargs.pop("backend", given)), *args, **kwargs)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        if "backend" in kwargs:
            kwargs["backend"] = backend(kwargs["backend"])
        return new(*(backend(a) if isinstance(a, str) else a for a in args), **kwargs)

    def plain_barrier(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_ids", None)
        return barrier(*args, **kwargs)

    everywhere("init_process_group", init_process_group)
    everywhere("new_group", new_group)
    everywhere("barrier", plain_barrier)
    from torch.distributed import device_mesh

    mesh = device_mesh.init_device_mesh
    on_mesh = lambda device_type, *args, **kwargs: mesh(on_cpu(device_type), *args, **kwargs)  # noqa: E731
    patches.put(device_mesh, "init_device_mesh", on_mesh)
    patches.put(dist, "init_device_mesh", on_mesh)
