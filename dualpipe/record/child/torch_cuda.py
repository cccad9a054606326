"""The answers to calls of ``torch.cuda`` and ``torch.accelerator`` on the CPU.

There are as many devices as ranks.  The random state of every device is that of the CPU, on which its tensors are.
All work has finished when a call returns, so streams and events have nothing to wait for.  Calls by torch itself get
the true answer.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .log import program_line
from .patches import Patches
from .streams import CURRENT, DEFAULT, Context, Event, Stream, asked_by_torch, of_any_device

_Device = torch.device
AT_SYNCHRONIZE: list[Callable[[], None]] = []
"""What a device waits for when the program waits for it: messages, which run on streams of their own."""
_MEMORY = 80 * 2**30  # bytes of a device


class _Nothing(types.ModuleType):
    """A module whose functions all do nothing; what they return is a context and a decorator that do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def index_of(device: Any, current: int) -> int:
    """The number of a device; ``None``, a negative number and one without a number mean the current one."""
    if isinstance(device, int):
        return device if device >= 0 else current
    return int(str(device).partition(":")[2] or current)


def _synchronize(*args: Any, **kwargs: Any) -> None:
    """Wait for all streams of a device, those of NCCL among them."""
    for wait in list(AT_SYNCHRONIZE) if not asked_by_torch() else ():
        wait()


def answer(patches: Patches, devices: int) -> None:
    """Answer the calls until ``patches.undo()``."""
    current = [0]
    answers = {**_of_devices(devices, current), **_of_streams(), **_of_memory(), **_of_random(devices)}
    for name, value in answers.items():
        patches.put(torch.cuda, name, value)
    for module in (torch.cuda.random, torch.cuda.memory, torch.cuda.streams):
        for name in answers.keys() & vars(module).keys():
            patches.put(module, name, answers[name])
    patches.put(torch, "Stream", of_any_device(Stream, torch.Stream))
    patches.put(torch, "Event", of_any_device(Event, torch.Event))
    for kind in ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool"):
        patches.put(torch.cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    for name, value in _of_accelerator(devices, current).items():
        if hasattr(torch.accelerator, name):
            patches.put(torch.accelerator, name, value)
    for name in set(torch.cuda.__all__) - answers.keys() - _TRUE_ON_CPU:
        value = getattr(torch.cuda, name, None)
        if isinstance(value, types.FunctionType):
            patches.put(torch.cuda, name, _unanswered(name, value))
        elif isinstance(value, type) and name in _CLASSES:
            patches.put(torch.cuda, name, type(name, (value,), {"__new__": _refuse(name), "__init__": _refuse(name)}))


def _unanswered(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails on the CPU, with an error that names it when the program calls it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if asked_by_torch():
            return original(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        except (AssertionError, RuntimeError, AttributeError, TypeError) as error:
            raise RuntimeError(_unanswered_text(name)) from error

    return call


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(_unanswered_text(name))

    return refuse


def _unanswered_text(name: str) -> str:
    return (
        "the recorder answers CUDA calls on the CPU: "
        f"the program calls torch.cuda.{name} at {program_line()}, which it does not answer; "
        "record it without that call"
    )


_CLASSES = frozenset({"CUDAGraph", "graph", "MemPool", "GreenContext", "CUDAPluggableAllocator", "ExternalStream"})
_TRUE_ON_CPU = frozenset({"get_arch_list", "is_tf32_supported"})


def _of_devices(devices: int, current: list[int]) -> dict[str, Any]:
    available, count, initialized = torch.cuda.is_available, torch.cuda.device_count, torch.cuda.is_initialized
    lazy_call: Any = torch.cuda._lazy_call  # calls a function once CUDA is initialized

    def is_available() -> bool:
        return available() if asked_by_torch() else True

    def device_count() -> int:
        return count() if asked_by_torch() else devices

    def is_initialized() -> bool:
        return bool(initialized()) if asked_by_torch() else True  # type: ignore[no-untyped-call] # torch's own

    def call_now(function: Callable[[], Any], **kwargs: Any) -> None:
        if asked_by_torch():
            lazy_call(function, **kwargs)
        else:
            function()

    class Chosen:
        """``with torch.cuda.device(1):``"""

        def __init__(self, device: Any) -> None:
            self._index, self._before = index_of(device, current[0]), 0

        def __enter__(self) -> None:
            self._before, current[0] = current[0], self._index

        def __exit__(self, *error: object) -> None:
            current[0] = self._before

    class ChosenByTensor(Chosen):
        """``with torch.cuda.device_of(tensor):``"""

        def __init__(self, tensor: Any) -> None:
            super().__init__(None)

    return {
        "device": Chosen,
        "device_of": ChosenByTensor,
        "_lazy_call": call_now,
        "is_initialized": is_initialized,
        "is_available": is_available,
        "device_count": device_count,
        "set_device": lambda device: current.__setitem__(0, index_of(device, current[0])),
        "current_device": lambda: current[0],
        "get_device_properties": constant(_PROPERTIES),
        "get_device_name": constant(_PROPERTIES.name),
        "get_device_capability": constant((9, 0)),
        "can_device_access_peer": constant(True),
        "is_bf16_supported": constant(True),
        "get_sync_debug_mode": constant(0),
        "is_current_stream_capturing": constant(False),
        "nvtx": _Nothing("nvtx"),
        "cudart": _Nothing("cudart"),
        "profiler": _Nothing("profiler"),
        "synchronize": _synchronize,
        **{name: constant(None) for name in ("init", "ipc_collect", "set_sync_debug_mode")},
        **{name: constant(0) for name in ("utilization", "memory_usage", "temperature", "power_draw", "clock_rate")},
    }


def _of_streams() -> dict[str, Any]:
    return {
        "Stream": Stream,
        "Event": Event,
        "StreamContext": Context,
        "stream": lambda stream: Context(stream),
        "current_stream": lambda device=None: CURRENT[0],
        "default_stream": lambda device=None: DEFAULT,
        "set_stream": lambda stream: None if stream is None else CURRENT.__setitem__(0, stream),
    }


def _of_memory() -> dict[str, Any]:
    nothing = ("empty_cache", "set_per_process_memory_fraction", "_record_memory_history", "_dump_snapshot")
    resets = ("peak_memory_stats", "accumulated_memory_stats", "max_memory_allocated", "max_memory_cached")
    zero = ("memory_allocated", "memory_reserved", "memory_cached", "device_memory_used")
    return {
        "mem_get_info": constant((_MEMORY, _MEMORY)),
        "memory_stats": lambda device=None: defaultdict(int),
        "host_memory_stats": lambda: defaultdict(int),
        "memory_snapshot": lambda *args, **kwargs: [],
        "memory_summary": constant(""),
        "list_gpu_processes": constant(""),
        "get_allocator_backend": constant("native"),
        "get_per_process_memory_fraction": constant(1.0),
        **{name: constant(None) for name in (*nothing, *(f"reset_{what}" for what in resets))},
        **{name: constant(0) for name in (*zero, *(f"max_{name}" for name in zero))},
    }


def _of_random(devices: int) -> dict[str, Any]:
    generator = torch.default_generator

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    def set_rng_state_all(new_states: Any) -> None:
        for state in new_states:
            generator.set_state(state)

    return {
        "get_rng_state": get_rng_state,
        "get_rng_state_all": lambda: [generator.get_state() for _ in range(devices)],
        "set_rng_state": set_rng_state,
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": manual_seed,
        "manual_seed_all": lambda seed: manual_seed(seed),
        "seed": lambda: generator.seed(),
        "seed_all": lambda: generator.seed(),
        "initial_seed": lambda: generator.initial_seed(),
        "default_generators": (generator,) * devices,
    }


def _of_accelerator(devices: int, current: list[int]) -> dict[str, Any]:
    true = {name: getattr(torch.accelerator, name) for name in ("is_available", "device_count", "current_accelerator")}

    def unless_torch_asks(name: str, value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: true[name](*args, **kwargs) if asked_by_torch() else value

    return {
        "is_available": unless_torch_asks("is_available", True),
        "device_count": unless_torch_asks("device_count", devices),
        "current_accelerator": unless_torch_asks("current_accelerator", _Device("cpu")),
        "set_device_index": lambda device: current.__setitem__(0, index_of(device, current[0])),
        "set_device_idx": lambda device: current.__setitem__(0, index_of(device, current[0])),
        "current_device_index": lambda: current[0],
        "current_device_idx": lambda: current[0],
        "current_stream": lambda device=None: CURRENT[0],
        "synchronize": _synchronize,
        "set_stream": lambda stream: CURRENT.__setitem__(0, stream),
    }


_PROPERTIES = types.SimpleNamespace(
    name="CPU in place of a GPU",
    major=9,
    minor=0,
    total_memory=_MEMORY,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    is_integrated=0,
    is_multi_gpu_board=0,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    uuid="",
)
