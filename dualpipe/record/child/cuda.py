"""Answer CUDA calls on the CPU, so that a program written for GPUs runs without one.

Tensors for ``cuda`` are made on the CPU, ``nccl`` becomes ``gloo``, and ``torch.cuda`` reports as many devices as there
are ranks.  Calls by torch itself to ``torch.cuda`` get the true answer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import nccl, streams, torch_cuda
from .engine import Engine
from .patches import Patches

_Device, _Generator = torch.device, torch.Generator


def answer(patches: Patches, devices: int) -> TorchFunctionMode:
    """Answer until ``patches.undo()``; enter the mode to move calls that name a device."""
    patches.put(torch, "device", _DeviceOnCpu)
    patches.put(torch, "Generator", _GeneratorOnCpu)
    patches.put(torch, "load", _load(torch.load))
    torch_cuda.answer(patches, devices)
    nccl.answer(patches, on_cpu)
    default_device, default_type = torch.set_default_device, torch.set_default_tensor_type
    patches.put(torch, "set_default_device", lambda device: default_device(None if device is None else on_cpu(device)))
    patches.put(torch, "set_default_tensor_type", lambda kind: default_type(_type_on_cpu(kind)))
    patches.put(torch, "get_device_module", _device_module(torch.get_device_module))
    patches.put(torch.random, "fork_rng", _fork_rng(torch.random.fork_rng))
    patches.put(torch.nn.Module, "cuda", lambda self, device=None: self)
    patches.put(torch.Tensor, "record_stream", lambda self, stream: None)
    mode = _OnCpu()
    patches.put(Variable, "_execution_engine", _OnCpuToo(Variable._execution_engine, mode))
    return mode


def _device_module(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_device_module(device: Any = None) -> Any:
        return torch.cuda if on_cpu(device) != device else original(device)

    return get_device_module


def _fork_rng(original: Callable[..., Any]) -> Callable[..., Any]:
    """``fork_rng`` of only the CPU, whose random state the program reads as that of the GPUs."""

    def fork_rng(devices: Any = None, enabled: bool = True, *args: Any, **kwargs: Any) -> Any:
        return original(devices=[], enabled=enabled)

    return fork_rng


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


def _type_on_cpu(kind: Any) -> Any:
    """``torch.FloatTensor`` for ``torch.cuda.FloatTensor``, as a text; any other type unchanged."""
    return kind.replace("torch.cuda.", "torch.") if isinstance(kind, str) else kind


class _OnCpu(TorchFunctionMode):
    """Moves every call that names a GPU to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        of_tensor = bool(args) and isinstance(args[0], torch.Tensor)
        if of_tensor and name in ("cuda", "pin_memory"):
            if name == "pin_memory":
                _pin(args[0])
            return args[0]
        if of_tensor and name == "is_pinned":
            return getattr(args[0], _PINNED, False)
        if of_tensor and name == "type":
            return _type(func, args, kwargs, streams.asked_by_torch())
        if name == "to" and len(args) > 1 and isinstance(args[1], int) and not isinstance(args[1], bool):
            args = (args[0], _Device("cpu"), *args[2:])
        if isinstance(kwargs.get("device"), int):
            kwargs = {**kwargs, "device": _Device("cpu")}
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        return _pin(result) if pinned else result


class _OnCpuToo(Engine):
    """What the program runs in a backward is moved, too.

    torch leaves the mode while it runs a call that the mode has seen, as of ``torch.autograd.backward``.
    """

    def __init__(self, engine: Any, mode: TorchFunctionMode) -> None:
        super().__init__(engine)
        self._mode = mode

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        active: Any = _get_current_function_mode_stack()  # type: ignore[no-untyped-call] # torch's own
        with nullcontext() if self._mode in active else self._mode:
            return self._engine.run_backward(*args, **kwargs)


_PINNED = "_dualpipe_recorder_pinned"


def _pin(tensor: Any) -> Any:
    """Let a tensor say that its memory is pinned."""
    setattr(tensor, _PINNED, True)
    return tensor


def _type(func: Any, args: Any, kwargs: Any, asked_by_torch: bool) -> Any:
    """``Tensor.type``: the name of a type on a GPU for the program, which cannot tell where its tensors are."""
    if len(args) > 1 or kwargs.get("dtype") is not None:
        return func(*map(_type_on_cpu, args), **{key: _type_on_cpu(value) for key, value in kwargs.items()})
    name = func(*args, **kwargs)
    return name if asked_by_torch else name.replace("torch.", "torch.cuda.", 1)
