"""Stand-ins that let megatron-core train on a CPU over gloo.

Megatron names the GPU in code that does not depend on it.  ``install_cpu_standins`` replaces exactly that code, and
nothing if there is a GPU.  Written for megatron-core 0.16.1; of what later versions lack, nothing is replaced.

Two things are missing on a CPU.  torch lacks the GPU itself:

=========================================  ==================================================================
in Megatron                                stand-in
=========================================  ==================================================================
``torch.cuda.current_device()`` as device  returns ``"cpu"``
literal ``device="cuda"``, pinned memory   these modules see a ``torch`` whose constructors use the CPU's plain memory
state of the GPU's random generator        the CPU generator's, kept apart in the tracker as on a GPU
``Tensor.type()`` compared with a string   a CPU tensor's type reads ``torch.cuda...``
``Tensor.cuda()`` when saving              returns the tensor
``torch.cuda.synchronize()`` when saving   does nothing: there is no GPU to wait for
streams, events and ranges of a profiler   there is one stream, on which everything runs in order
=========================================  ==================================================================

``dualpipe record`` answers all of these calls itself, so under it none of them is replaced.  And Megatron lacks what
it builds for a GPU, under the recorder too:

=========================================  ==================================================================
in Megatron                                stand-in
=========================================  ==================================================================
``moe_utils.te_general_gemm``              ``None``, which Megatron tests for but never sets
layer norms under sequence parallelism     PyTorch's, marked for the all-reduce as Apex's are
absent classes of layers in attention      a class without instances, as latent attention asks for their type
small functions under ``torch.compile``    run uncompiled, which saves a compiler and seconds in each rank
splits of the all-to-all of tokens         moved "to the CPU", as numpy arrays: no tensor says that it is on a GPU
a manager process for the results          a queue; a killed rank would leave the process behind
=========================================  ==================================================================
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import queue
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_CONSTRUCTORS = ("empty", "ones", "tensor", "zeros")
_LITERAL_CUDA = (
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
_ABSENT_LAYERS = ("TEColumnParallelLinear", "TELinear")
_installed: list[tuple[Any, str, Any]] = []
_ABSENT = object()


def install_cpu_standins() -> None:
    """Let megatron-core run on the CPU.  Does nothing if there is a GPU or on a second call."""
    if _installed or (torch.cuda.is_available() and not answered()):
        return
    if not answered():
        _answer_cuda()
    _replace_what_is_built_for_gpus()
    torch.compiler.set_stance("force_eager")


def answered() -> bool:
    """Whether calls for a GPU are answered on the CPU already, as by ``dualpipe record``, whose GPUs are CPUs."""
    return torch.device("cuda").type == "cpu"


def _answer_cuda() -> None:
    """Replace what names a GPU."""
    from megatron.core.tensor_parallel import random

    for name in _LITERAL_CUDA:
        replace(importlib.import_module(name), "torch", _TorchOnCpu())
    replace(torch.cuda, "current_device", lambda: "cpu")
    replace(torch.Tensor, "cuda", lambda self, *args, **options: self)
    replace(torch.cuda, "synchronize", lambda device=None: None)
    replace(torch.Tensor, "type", _type_as_on_gpu(torch.Tensor.type))
    replace(random, "_get_cuda_rng_state", lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state())
    replace(random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state))
    replace(random.CudaRNGStatesTracker, "add", _add_state)
    replace(random.CudaRNGStatesTracker, "fork", _fork_state)
    replace(torch.cuda, "Stream", _Stream)
    for name in ("current_stream", "default_stream"):
        replace(torch.cuda, name, lambda device=None: _Stream())
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "Event", _Event)
    replace(torch.Tensor, "record_stream", lambda self, stream: None)
    for name in ("range_push", "range_pop"):
        replace(torch.cuda.nvtx, name, lambda *message: 0)


def _replace_what_is_built_for_gpus() -> None:
    """Replace what Megatron takes from libraries and kernels that a CPU does not have."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if hasattr(filesystem_async, "_get_write_results_queue"):
        replace(filesystem_async, "_get_write_results_queue", queue.Queue)
    replace(moe_utils, "te_general_gemm", None)
    replace(token_dispatcher, "maybe_move_tensor_to_cpu", _moved_to_cpu)
    for name in _ABSENT_LAYERS:
        if not isinstance(getattr(multi_latent_attention, name), type):
            replace(multi_latent_attention, name, type(name, (), {}))
    replace(WrappedTorchNorm, "__new__", _norm_for_sequence_parallel(WrappedTorchNorm.__new__))


def remove_cpu_standins() -> None:
    """Undo ``install_cpu_standins``."""
    if _installed:
        torch.compiler.set_stance("default")
    while _installed:
        owner, name, before = _installed.pop()
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``remove_cpu_standins``."""
    _installed.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


class _Stream:
    """A CPU's only stream: what is issued on it has ended when the next thing is issued."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        """Takes what ``torch.cuda.Stream`` takes."""

    def wait_stream(self, other: _Stream) -> None:
        """Does nothing: everything issued on ``other``, a stream or an event, has ended."""

    def synchronize(self) -> None:
        """Does nothing."""

    def record_event(self) -> _Stream:
        return self


class _Event:
    """An event of the only stream: it has happened as soon as it is recorded."""

    def record(self, stream: Any = None) -> None:
        """Does nothing."""

    def wait(self, stream: Any = None) -> None:
        """Does nothing."""


def _moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


class _TorchOnCpu(ModuleType):
    """``torch`` with constructors that read the device "cuda" as the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _CONSTRUCTORS:
            setattr(self, name, on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def on_cpu(construct: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A constructor of tensors that reads the device "cuda" as the CPU, and pins no memory."""

    @functools.wraps(construct)
    def constructed(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return construct(*args, **kwargs)

    return constructed


def _type_as_on_gpu(of: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = of(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_


def _norm_for_sequence_parallel(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False  # refused only because nothing marks the parameters of PyTorch's norm
        module = build(cls, plain, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module

    return norm


def _add_state(self: Any, name: str, seed: int) -> None:
    """``CudaRNGStatesTracker.add`` with a CPU generator: adds a state and leaves the current one alone."""
    if seed in self.seeds_ or name in self.states_:
        raise ValueError(f"the tracker of random states already has seed {seed} or name {name}")
    self._is_initialized = True
    self.seeds_.add(seed)
    self.states_[name] = torch.Generator().manual_seed(seed).get_state()


@contextlib.contextmanager
def _fork_state(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """``CudaRNGStatesTracker.fork`` with the CPU generator: within, the named state; afterwards, the previous one."""
    running = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(running)
