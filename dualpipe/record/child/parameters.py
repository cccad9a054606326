"""The modules and parameters of one rank, and where the parameters keep their gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from .marks import Key, key_of
from .regions import is_readable, weak_storage


def state_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module, of which a subclass may have an attribute, as Megatron's DDP has."""
    yield from nn.Module.parameters(module)
    yield from nn.Module.buffers(module)


class Parameters:
    """The called modules by number, their parameters, and the memory of their gradients."""

    def __init__(self) -> None:
        self._modules: dict[int, tuple[nn.Module, int]] = {}  # id -> module, kept alive, and its number
        self._parameters: dict[int, tuple[nn.Parameter, set[int]]] = {}  # id -> parameter and the modules that hold it
        self._gradients: dict[Key, tuple[Any, int]] = {}  # memory -> the storage (weak), and the parameter's id
        self._sizes: dict[int, dict[int, int]] = {}  # storage -> the elements of each gradient in it, by offset
        self._copies: dict[Key, tuple[Any, list[int]]] = {}  # memory -> the storage (weak), and parameters' ids
        self._names: dict[int, str] = {}  # parameter's id -> its name in the largest module that was called
        self._main: dict[int, Key] = {}  # parameter's id -> the memory of its main_grad
        self.replaced: set[int] = set()  # ids of parameters whose main_grad has become another tensor
        self._hooks: dict[int, Any] = {}  # parameter's id -> the handle of its hook
        self._added: set[int] = set()  # ids of parameters
        self._received: set[int] = set()  # the same since the beginning

    def number(self, module: nn.Module) -> tuple[int, list[int] | None]:
        """The number of a module and, if the module is new, the numbers of the modules in it."""
        known = self._modules.get(id(module))
        if known is not None:
            return known[1], None
        number = len(self._modules)
        self._modules[id(module)] = (module, number)
        held = [self.number(child)[0] for child in nn.Module.modules(module) if child is not module]
        for name, parameter in nn.Module.named_parameters(module):
            if is_functorch_wrapped_tensor(parameter):
                continue  # what torch.func puts there for one call
            self._parameters.setdefault(id(parameter), (parameter, set()))[1].add(number)
            self._names[id(parameter)] = name
            self.note_gradient(parameter)
        return number, held

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._parameters

    def trainable(self, modules: Collection[int]) -> bool:
        """Whether any of the modules has a parameter that requires a gradient."""
        return any(p.requires_grad and not held.isdisjoint(modules) for p, held in self._parameters.values())

    def sharded(self, modules: Collection[int]) -> bool:
        """Whether any of the modules has a parameter that is sharded over ranks, as by ``fully_shard``."""
        return any(hasattr(p, "to_local") and not held.isdisjoint(modules) for p, held in self._parameters.values())

    def holders(self, parameter: int) -> set[int]:
        return self._parameters[parameter][1]

    def note_gradient(self, parameter: Tensor) -> None:
        """Remember the memory of a parameter's gradient, which Megatron keeps in ``main_grad``."""
        for gradient in (parameter.grad, getattr(parameter, "main_grad", None)):
            if isinstance(gradient, Tensor) and (key := key_of(gradient)):
                self._gradients[key] = (weak_storage(gradient), id(parameter))
                self._sizes.setdefault(key[0], {})[key[1]] = gradient.numel()
        kept = getattr(parameter, "main_grad", None)
        if isinstance(kept, Tensor) and (key := key_of(kept)):
            if self._main.get(id(parameter), key) != key:
                self.replaced.add(id(parameter))
            self._main[id(parameter)] = key

    def with_gradient_at(self, key: Key | None) -> int | None:
        """The id of the parameter whose gradient has this memory."""
        entry = self._gradients.get(key) if key else None
        if entry is None or key is None:
            return None
        if entry[0].expired():
            del self._gradients[key]
            return None
        return entry[1]

    def with_gradients_in(self, tensor: Tensor) -> list[int]:
        """The ids of the parameters whose gradients are in the memory of a tensor, or that it was copied from."""
        key = key_of(tensor)
        storage, copied = self._copies.get(key, (None, [])) if key else (None, [])
        if storage is not None and not storage.expired():
            return copied
        return self.held_in(tensor)

    def held_in(self, tensor: Tensor) -> list[int]:
        """The ids of the parameters whose gradients share memory with a tensor: a part of one, or a buffer of many."""
        key = key_of(tensor)
        if key is None:
            return []
        start, end = key[1], key[1] + max(tensor.numel(), 1)
        sizes = list(self._sizes.get(key[0], {}).items())  # other threads send, too
        found = (self._gradients.get((key[0], at)) for at, size in sizes if at < end and start < at + size)
        return [parameter for entry in found if entry is not None for kept, parameter in [entry] if not kept.expired()]

    def note_copy(self, made: Tensor, inputs: Collection[Tensor]) -> None:
        """An operator has made a tensor.  One made only from gradients, and as large as these, is a copy of them."""
        of = [self.with_gradient_at(key_of(tensor)) for tensor in inputs]
        parameters = [parameter for parameter in of if parameter is not None]
        key = key_of(made)
        if key is None or len(parameters) < len(inputs) or not parameters:
            return
        if made.numel() == sum(tensor.numel() for tensor in inputs):
            self._copies[key] = weak_storage(made), parameters

    def size(self, parameter: int) -> int:
        """The number of elements of a parameter."""
        return self._parameters[parameter][0].numel()

    def name(self, parameter: int) -> str:
        """The name of a parameter in the largest module that holds it."""
        return self._names[parameter]

    def value(self, parameter: int) -> str:
        """A digest of a parameter's values, by which tied weights show; none if all elements are equal."""
        with _disable_current_modes():
            value = self._parameters[parameter][0].data
            if type(value) is not Tensor or value.is_meta or not is_readable(value):  # a sharded one would communicate
                return ""
            flat = value.cpu().reshape(-1)
            if not flat.numel() or bool((flat == flat[0]).all()):
                return ""
            return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    def listen(self) -> None:
        """From now on note the memory of gradients before hooks of the program move them elsewhere."""
        self._added.clear()
        for key, (parameter, _) in self._parameters.items():
            self.note_gradient(parameter)
            if key not in self._hooks and parameter.requires_grad and parameter.is_leaf:
                listen = parameter.register_post_accumulate_grad_hook
                self._hooks[key] = listen(self.note_gradient)  # type: ignore[no-untyped-call] # torch's own

    def leaves(self) -> list[nn.Parameter]:
        """The parameters to which autograd adds gradients."""
        return [p for p, _ in self._parameters.values() if p.requires_grad and p.is_leaf]

    def numbered(self, parameter: int) -> tuple[int, str]:
        """The number of a parameter among all of the rank, and its name."""
        return list(self._parameters).index(parameter), self._names[parameter]

    def add_to(self, parameter: int) -> None:
        """A gradient of this parameter has been set or added to."""
        self._added.add(parameter)
        self._received.add(parameter)

    def added(self) -> set[int]:
        """The ids of the parameters that got a gradient since ``listen``."""
        return set(self._added)

    def has_received(self, parameter: Tensor) -> bool:
        """Whether the parameter has ever got a gradient."""
        return id(parameter) in self._received

    def stop_listening(self) -> None:
        while self._hooks:
            self._hooks.popitem()[1].remove()
