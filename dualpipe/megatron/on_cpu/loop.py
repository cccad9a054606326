"""Stand-ins that let the training loop of Megatron-LM run on a CPU over gloo, in addition to those of megatron-core.

The loop asks the GPU for its properties and its memory, and puts tensors there by name, in many modules that import one
another late.  So these stand-ins replace functions of torch itself, for the whole process.

==========================================  =================================================================
in the loop                                 stand-in
==========================================  =================================================================
device "cuda" of constructors and ``to``    the CPU
``Module.cuda()``                           returns the module
properties of the GPU                       those of an imaginary one for each rank, without memory
statistics of memory                        0
state of the GPU's random generator         the CPU generator's
events and ranges of profilers              do nothing
backend "nccl"                              gloo, without a device
==========================================  =================================================================

``dualpipe record`` answers all of these itself, so under it none of them is replaced, and the backend stays "nccl".
These are replaced under it, too:

==========================================  =================================================================
in the loop                                 stand-in
==========================================  =================================================================
seed that a data loader draws               drawn apart: on a GPU it takes nothing from dropout's generator
test whether there is a GPU                 left out (``allow_no_cuda`` of ``initialize_megatron``)
fused kernels, and warming them up          left out
==========================================  =================================================================

``CPU_ARGUMENTS`` are the options without kernels for GPUs; ``dualpipe.megatron.launch`` sets them after parsing.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import dataloader

from dualpipe.megatron.on_cpu.core import answered, install_cpu_standins, on_cpu, replace

CPU_ARGUMENTS: Mapping[str, Any] = MappingProxyType(
    {
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "no_persist_layer_norm": True,
    }
)
"""Arguments of Megatron-LM with the values without kernels for GPUs; those that a version lacks are not set."""

_CONSTRUCTORS = ("arange", "empty", "full", "ones", "rand", "randn", "randint", "tensor", "zeros")
_LEGACY = {"LongTensor": torch.long, "FloatTensor": torch.float, "IntTensor": torch.int, "DoubleTensor": torch.double}
_MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "device_memory_used")
_WITHOUT_EFFECT = ("set_device", "empty_cache", "reset_peak_memory_stats", "set_stream", "ipc_collect")
_PROPERTIES = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=1 << 30, multi_processor_count=1)


class _Event:
    """An event of the CPU's only stream: everything recorded before it has ended."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes the options of ``torch.cuda.Event``."""

    def record(self, stream: Any = None) -> None:
        """Does nothing."""

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return 0.0


def install_loop_standins() -> None:
    """Let Megatron-LM's loop run on the CPU; call it before the loop is imported, then ``adapt_loop``.

    Includes ``install_cpu_standins``; ``remove_cpu_standins`` undoes both.
    """
    install_cpu_standins()
    if not answered():
        _answer_cuda()
    replace(dataloader._BaseDataLoaderIter, "__init__", _drawing_apart(dataloader._BaseDataLoaderIter.__init__))


def _answer_cuda() -> None:
    """Replace what names a GPU."""
    cuda = torch.cuda
    for name in _CONSTRUCTORS:
        replace(torch, name, on_cpu(getattr(torch, name)))
    for name, dtype in _LEGACY.items():
        replace(cuda, name, _legacy_type(name, dtype))
    for name in _WITHOUT_EFFECT:
        replace(cuda, name, _nothing)
    for name in _MEMORY:
        replace(cuda, name, lambda *args, **options: 0)
    replace(cuda, "memory_stats", lambda *args, **options: collections.defaultdict(int))
    replace(cuda, "device_count", lambda: 1)
    replace(cuda, "get_device_name", lambda *args: _PROPERTIES.name)
    replace(cuda, "get_device_capability", lambda *args: (_PROPERTIES.major, _PROPERTIES.minor))
    replace(cuda, "get_device_properties", lambda *args: _PROPERTIES)
    replace(cuda, "get_rng_state", lambda *args: torch.get_rng_state())
    replace(cuda, "set_rng_state", lambda state, *args: torch.set_rng_state(state))
    replace(cuda, "manual_seed", _nothing)
    replace(cuda, "Event", _Event)
    for name in ("range_push", "range_pop"):
        replace(cuda.nvtx, name, _nothing)
    replace(cuda.nvtx, "range", lambda *args, **options: contextlib.nullcontext())
    replace(Tensor, "record_stream", _nothing)
    replace(Tensor, "to", _to_cpu(Tensor.to))
    replace(nn.Module, "cuda", lambda self, device=None: self)
    replace(torch.distributed, "init_process_group", _over_gloo(torch.distributed.init_process_group))


def adapt_loop(initialize: ModuleType, replace_everywhere: Callable[[list[tuple[Any, Any]]], None]) -> None:
    """Change ``megatron.training.initialize``, once it is imported, to start without a GPU and without its kernels.

    ``replace_everywhere`` takes pairs of an old and a new function, and replaces the old one in every module.
    """
    if hasattr(initialize, "fused_kernels"):  # until 0.16
        replace(initialize.fused_kernels, "load", _nothing)
    started = initialize.initialize_megatron
    replace_everywhere(
        [(started, functools.partial(started, allow_no_cuda=True)), (initialize.set_jit_fusion_options, _nothing)]
    )


def with_cpu_arguments(args: Any) -> Any:
    """Set ``CPU_ARGUMENTS`` in Megatron-LM's parsed arguments, and print what that changes on the first rank.

    The backend is gloo, unless ``dualpipe record`` puts gloo in the place of the one that the arguments name.
    """
    wanted = CPU_ARGUMENTS if answered() else {"distributed_backend": "gloo", **CPU_ARGUMENTS}
    changed = {name: value for name, value in wanted.items() if getattr(args, name, value) != value}
    vars(args).update(changed)
    if changed and getattr(args, "rank", 0) == 0:
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        _announce(f"dualpipe: on the CPU, with {settings}")
    return args


@functools.cache
def _announce(text: str) -> None:
    """Print a text once, since Megatron-LM parses its command line more than once."""
    print(text, file=sys.stderr)


def _legacy_type(name: str, dtype: torch.dtype) -> type:
    """A type such as ``torch.cuda.FloatTensor``: a call makes a tensor on the CPU, and no tensor is an instance.

    Megatron-LM asks for instances before it converts inputs to half precision.
    """
    return type(name, (), {"__new__": lambda cls, data=(): torch.tensor(data, dtype=dtype)})


def _nothing(*args: Any, **options: Any) -> None:
    """Does nothing: there is no GPU."""


def _to_cpu(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def moved(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if _is_gpu(options.get("device")):
            options["device"] = "cpu"
        return to(self, *("cpu" if _is_gpu(arg) else arg for arg in args), **options)

    return moved


def _is_gpu(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"


def _drawing_apart(construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def constructed(*args: Any, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            construct(*args, **options)

    return constructed


def _over_gloo(initialize: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialize)
    def initialized(backend: str | None = None, *args: Any, **options: Any) -> None:
        options.pop("device_id", None)
        initialize("gloo", *args, **options)

    return initialized
