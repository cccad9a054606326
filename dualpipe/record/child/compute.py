"""Watch torch's compute: module calls, the autograd engine, every operator and ``Tensor.grad``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .applied import applied, kind_of
from .engine import Engine
from .flow import Flow
from .patches import Patches


def watch(flow: Flow, patches: Patches, together: Collection[str], containers: Collection[str]) -> TorchDispatchMode:
    """Watch calls, the engine, ``.grad`` and optimizers until ``patches.undo()``; enter the mode to watch operators."""
    patches.put(nn.Module, "__call__", _call(flow, nn.Module.__call__, frozenset(containers)))
    patches.put(Variable, "_execution_engine", _Watched(flow, Variable._execution_engine))
    patches.wrap(torch.autograd.backward, lambda original: _backward(flow, original))
    patches.put(torch.Tensor, "grad", _gradient(flow))
    patches.put(torch.Tensor, "data", _data(flow))
    patches.put(torch.Tensor, "retain_grad", _retaining(flow, torch.Tensor.retain_grad))
    patches.put(nn.Parameter, "__setattr__", _attribute(flow))
    patches.put(torch.UntypedStorage, "resize_", _resize(flow, torch.UntypedStorage.resize_))
    flow.arrivals.watch(patches)
    flow.together = frozenset(together)
    patches.later(register_optimizer_step_post_hook(lambda *args: flow.write("step")).remove)
    patches.later(flow.stop)
    return _Operators(flow)


def _call(flow: Flow, original: Callable[..., Any], containers: frozenset[str]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - replaces that method
        if flow.calling or flow.running or type(self).__qualname__ in containers:
            return original(self, *args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = flow.begin(self, None if not tensors else [] if any(map(_without_data, tensors)) else tensors)
        try:
            output = original(self, *args, **kwargs)
        except BaseException as error:
            flow.end(call)
            flow.note_error(error, "F", (number for _, number in call.made or ()))
            raise
        flow.end(call)
        if call.made is not None:
            flow.called(call.made, output)
        return output

    return __call__


def _without_data(tensor: Tensor) -> bool:
    """Whether torch uses the tensor only to infer shapes."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


class _Watched(Engine):
    """Notes every run, and the marks of what runs in it."""

    def __init__(self, flow: Flow, engine: Any) -> None:
        super().__init__(engine)
        self._flow = flow

    def run_backward(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        flow = self._flow
        if grad_tensors is None:
            grad_tensors = kwargs.pop("grad_tensors", ())
        if flow.running or flow.calling:
            return self._engine.run_backward(tensors, grad_tensors, *args, **kwargs)
        inputs = args[2] if len(args) > 2 else kwargs.get("inputs", ())
        made = flow.run(tuple(tensors), tuple(grad_tensors or ()), tuple(inputs or ()))
        left = flow.within(made)
        flow.running += 1
        try:
            result = self._engine.run_backward(tensors, grad_tensors, *args, **kwargs)
        except BaseException as error:
            flow.ran(completed=False)
            flow.note_error(error, "B", (number for _, number in made))
            raise
        finally:
            flow.running -= 1
            flow.within(left)
        flow.ran(completed=True)
        return result


def _backward(flow: Flow, original: Callable[..., Any]) -> Callable[..., Any]:
    """Note what fails before the engine runs, as a gradient of another shape than its output."""

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(tensors, *args, **kwargs)
        except BaseException as error:
            roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
            flow.note_error(error, "B", flow.makers(roots), flow.freed.at(roots))
            raise

    return backward


def _gradient(flow: Flow) -> property:
    original: Any = torch.Tensor.grad

    def put(self: Tensor, value: Tensor | None) -> None:
        original.__set__(self, value)
        flow.assigned(self, value)

    return property(original.__get__, put, original.__delete__)


def _data(flow: Flow) -> property:
    original: Any = torch.Tensor.data

    def put(self: Tensor, value: Tensor) -> None:
        flow.buffers.replaced(self, value, flow.context)
        original.__set__(self, value)

    return property(original.__get__, put, original.__delete__)


def _retaining(flow: Flow, original: Callable[..., Any]) -> Callable[..., Any]:
    """Note that what a rank has received does not require a gradient, as its backward wants."""

    @functools.wraps(original)
    def retain_grad(self: Tensor) -> None:
        try:
            original(self)
        except RuntimeError as error:
            if received := flow.origins.received(self):
                flow.note_error(error, "R", received)
            raise

    return retain_grad


def _attribute(flow: Flow) -> Callable[..., None]:
    """Note where the program gives a parameter another ``main_grad``."""
    original: Any = nn.Parameter.__setattr__

    def __setattr__(self: nn.Parameter, name: str, value: Any) -> None:  # noqa: N807 - replaces that method
        original(self, name, value)
        if name == "main_grad":
            flow.set_main_grad(self)

    return __setattr__


def _resize(flow: Flow, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        in_flight = flow.buffers.resized(self._cdata, flow.context)
        return self if in_flight else original(self, size)

    return resize_


class _Operators(TorchDispatchMode):
    """Watches every operator, including those that the autograd engine runs."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self._flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._flow.buffers.operator(func, args, kwargs, self._flow.context)
        if self._flow.draws is not None:
            self._flow.draws.operator(func, kwargs)
        output = func(*args, **kwargs)
        for inputs, outputs in applied(func, args, kwargs, output):
            if outputs:
                self._flow.operator(kind_of(func), inputs, outputs)
        return output
