"""Gradients that a program keeps in tensors of its own, such as the float32 gradients of master weights.

After a backward such a program adds ``.grad`` to its own tensor and clears ``.grad``.  Its optimizer never sees the
parameter of the module, but another one, of which that tensor is the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from .applied import Kind
from .log import program_line
from .marks import key_of
from .parameters import Parameters
from .patches import Patches
from .regions import weak_storage

_KEEPS_ORDER = frozenset({"_to_copy", "clone", "copy_", "cat"})
"""Operators whose output has the elements of the inputs one after the other."""


class _Copy(NamedTuple):
    """What was made from gradients of one parameter alone.

    It has the parameter's id, the dtype in which it was summed, its shape in memory, and the line that made it.
    """

    parameter: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    at: str = ""


class _Memory(NamedTuple):
    """The copies in one storage (weak), by the offset at which they begin, in elements of its dtype."""

    storage: Any
    dtype: torch.dtype
    copies: dict[int, _Copy]


class Masters:
    """The tensors that a program makes from gradients, and the optimizers that use them."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._memory: dict[int, _Memory] = {}
        self._optimizers: WeakSet[Optimizer] = WeakSet()

    def watch(self, patches: Patches) -> None:
        """Watch which optimizers the program makes, until ``patches.undo()``."""

        def watched(original: Callable[..., None]) -> Callable[..., None]:
            @functools.wraps(original)
            def add_param_group(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
                original(optimizer, param_group)
                self._optimizers.add(optimizer)

            return add_param_group

        patches.put(Optimizer, "add_param_group", watched(Optimizer.add_param_group))

    def made(self, kind: Kind, output: Tensor, inputs: Collection[Tensor]) -> None:
        """An operator has made a tensor, or written to one."""
        key = key_of(output)
        if key is None or (kind.mutable and not (kind.adds or kind.replaces)) or not output.is_floating_point():
            return
        inputs = [each for each in inputs if not kind.mutable or key_of(each) != key]
        parts = [self._parts(each) for each in inputs]
        if not all(parts) or not parts or self._parameters.with_gradient_at(key) is not None:
            return
        if kind.name in _KEEPS_ORDER and output.numel() == sum(each.numel() for each in inputs):
            if not all(each.is_contiguous() and (each.dim() == 1 or len(inputs) == 1) for each in (output, *inputs)):
                return
            at = 0
            for tensor, found in zip(inputs, parts, strict=True):
                for offset, copy in found.items():
                    self._keep(output, at + offset, copy)
                at += tensor.numel()
            return
        of = {copy.parameter for found in parts for copy in found.values()}
        if len(of) == 1 and output.numel() == self._parameters.size(next(iter(of))):
            self._keep(output, 0, _Copy(of.pop(), output.dtype, tuple(output.shape), output.stride()))

    def _keep(self, output: Tensor, offset: int, copy: _Copy) -> None:
        storage = output.untyped_storage()._cdata
        memory = self._memory.get(storage)
        if memory is None or memory.storage.expired() or memory.dtype != output.dtype:
            memory = self._memory[storage] = _Memory(weak_storage(output), output.dtype, {})
        memory.copies[int(output.storage_offset()) + offset] = copy._replace(at=program_line())

    def _parts(self, tensor: Tensor) -> dict[int, _Copy]:
        """The gradient that a tensor is, or what it has that was made from gradients, by the offset in the tensor."""
        key = key_of(tensor)
        if key is None:
            return {}
        if (parameter := self._parameters.with_gradient_at(key)) is not None:
            return {0: _Copy(parameter, tensor.dtype, tuple(tensor.shape), tensor.stride())}
        memory = self._memory.get(key[0])
        if memory is None or memory.storage.expired():
            return {}
        end = key[1] + tensor.numel()
        return {at - key[1]: copy for at, copy in memory.copies.items() if key[1] <= at < end}

    def gradients(self, parameters: Iterable[Tensor]) -> tuple[dict[int, Tensor], dict[int, str]]:
        """The gradients of parameters that the program's optimizers take from its own tensors, by the parameter's id.

        Then the parameters whose gradient is cleared without that, each with the line that made the last tensor from
        it, or an empty text.  Parameters that an optimizer has itself are in neither.
        """
        used = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        optimized = {id(parameter) for parameter in used}
        storages = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage() for p in used if _has_memory(p.grad)}
        others = {id(parameter): parameter for parameter in parameters if id(parameter) not in optimized}
        taken: dict[int, Tensor] = {}
        elsewhere = dict.fromkeys((n for n, p in others.items() if used and self._is_cleared(p)), "")
        for number, memory in self._memory.items():
            for offset, copy in memory.copies.items() if not memory.storage.expired() else ():
                if copy.parameter in others and number in storages:
                    kept = torch.empty(0, dtype=memory.dtype).set_(storages[number], offset, copy.shape, copy.stride)
                    taken[copy.parameter] = _as_summed(kept, copy, others[copy.parameter])
                elif copy.parameter in elsewhere:
                    elsewhere[copy.parameter] = copy.at
        return taken, {parameter: at for parameter, at in elsewhere.items() if parameter not in taken}

    def _is_cleared(self, parameter: Tensor) -> bool:
        """Whether a parameter had a gradient, which is zero or ``None`` now."""
        gradient = parameter.grad
        return self._parameters.has_received(parameter) and (gradient is None or not bool(gradient.any()))


def _has_memory(gradient: Tensor | None) -> bool:
    return gradient is not None and key_of(gradient) is not None


def _as_summed(kept: Tensor, copy: _Copy, parameter: Tensor) -> Tensor:
    """A gradient in the dtype in which it was summed, if that has its values, and in the shape of its parameter."""
    narrow = kept.to(copy.dtype)
    if torch.equal(narrow.to(kept.dtype), kept):
        kept = narrow
    return kept.view(parameter.shape) if kept.is_contiguous() else kept
