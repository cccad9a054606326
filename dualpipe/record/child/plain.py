"""Run the modules of a recorded step once more, plainly: one microbatch after the other, without the schedule.

While the step runs, every outermost module call is kept: copies of what it takes, of what it returns, and of the
gradient that reaches what it returned.  Before the first optimizer step that follows (or at the end of the process) the
rank forks.  The fork calls the same modules on the same inputs with the weights that they had, runs stock autograd, and
saves for each forward its outputs, its input gradient and its weight gradients, with what the program had in their
place.  Nothing of that reaches the program: stores, hooks and random streams of the fork are copies.

``dualpipe.record.plain`` compares the ranks' files.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .flow import Flow
from .graph import marks_below
from .marks import Key, key_of
from .patches import Patches

Leaf = tuple[Key | None, tuple[int, ...]]
"""By which a tensor is recognised: its memory and its shape."""
_POLL = 0.01


class _Roots:
    """Wraps the autograd engine, and notes what it runs from."""

    def __init__(self, note: Callable[[Iterable[Any]], None], engine: Any) -> None:
        self._note, self._engine = note, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        self._note(tensors)
        return self._engine.run_backward(tensors, *args, **kwargs)


@dataclass
class _Call:
    """An outermost module call.  ``arrived`` are the positions of tensors that come from another stage."""

    module: nn.Module
    leaves: list[Any]
    spec: Any
    known: list[Leaf | None]
    needs_grad: list[bool]
    arrived: list[int]
    held: list[tuple[nn.Module, str, Tensor]]
    buffers: dict[str, Tensor]
    random: Tensor
    grad: bool
    outputs: list[Tensor] = field(default_factory=list)
    returned: list[Leaf] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)


class Plain:
    """The module calls of one step of one rank, and their plain run.

    ``path`` is the file to write, ``step`` the training step (from 1), ``seconds`` the limit for the plain run.
    """

    def __init__(self, flow: Flow, path: str, step: int, seconds: float, containers: Collection[str] = ()) -> None:
        self._flow, self._path, self._wanted, self._seconds = flow, path, step, seconds
        self._containers = frozenset(containers)
        self._step, self._computed, self._done = 1, False, False
        self._calls: dict[int, list[_Call]] = {}
        self._numbers: dict[int, int] = {}  # id of a parameter -> its number
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._weights: dict[int, Tensor] = {}  # by number: the value before the step
        self._before: dict[int, Tensor] = {}  # by number: a gradient that was there before the step
        self._read: set[int] = set()
        self._begun: set[int] = set()  # forwards from whose loss a backward has begun
        self._collected: set[int] = set()  # those whose loss was still there when a later one's backward began

    def watch(self, patches: Patches) -> None:
        """Watch module calls, optimizers and what the program reads, until ``patches.undo()``."""
        patches.put(nn.Module, "__call__", self._watched(nn.Module.__call__))
        for name in ("item", "tolist", "__float__"):
            patches.put(torch.Tensor, name, self._reading(getattr(torch.Tensor, name)))
        patches.put(Variable, "_execution_engine", _Roots(self._ran_from, Variable._execution_engine))
        patches.later(register_optimizer_step_pre_hook(lambda *args: self.end_step(True)).remove)
        for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
            patches.wrap(clip, self._before_clipping)

    def _before_clipping(self, original: Any) -> Any:
        def clip(*args: Any, **kwargs: Any) -> Any:
            self.end_step(True)
            return original(*args, **kwargs)

        return clip

    def _ran_from(self, roots: Iterable[Any]) -> None:
        """The engine runs from these; a scalar is a loss."""
        losses = [root for root in roots if isinstance(root, Tensor) and root.numel() == 1]
        if not losses or self._done or self._step != self._wanted or self._flow.calling or self._flow.running:
            return
        self._collected |= self._begun & self._held_results(2)
        for loss in losses:
            self._begun |= {self._flow.find(number) for number in marks_below(loss)}

    def _watched(self, original: Any) -> Any:
        @functools.wraps(original)
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - replaces that method
            flow = self._flow
            inside = flow.calling or flow.running or type(module).__qualname__ in self._containers
            if inside or self._done or self._step != self._wanted:
                self._computed = self._computed or not inside
                return original(module, *args, **kwargs)
            call = self._begin(module, args, kwargs)
            output = original(module, *args, **kwargs)
            if call is not None:
                self._end(call, output)
            return output

        return __call__

    def _reading(self, original: Any) -> Any:
        @functools.wraps(original)
        def read(tensor: Tensor, *args: Any) -> Any:
            self._read |= self._flow.forwards_of(tensor)
            return original(tensor, *args)

        return read

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> _Call | None:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(key_of(tensor) is None or tensor.is_meta for tensor in tensors):
            return None
        self._computed = True
        with _disable_current_modes():
            self._keep_weights(module)
            return _Call(
                module,
                [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves],
                spec,
                [_leaf(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves],
                [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves],
                [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and self._has_arrived(leaf)],
                [(sub, name, t.detach().clone()) for sub, name, t in _held(module) if self._has_arrived(t)],
                {name: buffer.detach().clone() for name, buffer in module.named_buffers()},
                torch.get_rng_state(),
                torch.is_grad_enabled(),
            )

    def _has_arrived(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and bool({"M", "C"} & {letter for letter, _ in self._flow.carried(tensor)})

    def _keep_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if id(parameter) in self._numbers:
                continue
            number = self._numbers[id(parameter)] = len(self._parameters)
            self._parameters.append((name, parameter))
            self._weights[number] = parameter.detach().clone()
            gradient = gradient_of(parameter)
            if gradient is not None and bool(gradient.any()):
                self._before[number] = gradient.detach().clone()

    def _end(self, call: _Call, output: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        forwards = {forward for leaf in leaves for forward in self._flow.forwards_of(leaf)}
        if len(forwards) != 1:
            return
        with _disable_current_modes():
            call.outputs = [leaf.detach().clone() for leaf in leaves]
            call.returned = [_leaf(leaf) for leaf in leaves]
        for at, leaf in enumerate(leaves):
            if leaf.grad_fn is not None:
                leaf.register_hook(functools.partial(_keep_gradient, call, at))  # type: ignore[no-untyped-call]
        self._calls.setdefault(next(iter(forwards)), []).append(call)

    def end_step(self, by_optimizer: bool) -> None:
        """The program is about to change its weights, or ends: run the step plainly, if it is the wanted one."""
        if self._done or not self._computed:
            return
        self._computed = False
        if self._step != self._wanted:
            self._step += 1
            return
        self._done = True
        find = self._flow.find
        seen = self._seen()
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with _disable_current_modes():
                    self._flow.calling = 1  # so that nothing of the plain run is recorded
                    self._save(
                        {
                            "forwards": {find(f): self._run(calls) for f, calls in self._calls.items()},
                            "names": [name for name, _ in self._parameters],
                            "final": {n: _copy(gradient_of(p)) for n, (_, p) in enumerate(self._parameters)},
                            "before": self._before,
                            "seen": sorted(find(forward) for forward in seen),
                            "collected": sorted(find(forward) for forward in self._collected),
                            "by_optimizer": by_optimizer,
                        }
                    )
                code = 0
            finally:
                os._exit(code)
        if not _ends(child, self._seconds):
            self._save({"error": f"the plain run had not ended after {self._seconds:g} s"})
        self._calls.clear()

    def _save(self, content: dict[str, Any]) -> None:
        torch.save(content, self._path + ".part")
        os.replace(self._path + ".part", self._path)

    def _seen(self) -> set[int]:
        """The forwards of which the program has read a result, or holds one that can be a loss or several."""
        return self._read | self._held_results(max(2, len(self._calls)))

    def _held_results(self, most: int) -> set[int]:
        """The forwards of which the program holds a result of at most one dimension and ``most`` elements."""
        held: set[int] = set()
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.dim() <= 1 and 0 < thing.numel() <= most:
                held |= self._flow.forwards_of(thing)
        return held

    def _run(self, calls: list[_Call]) -> dict[str, Any]:
        """The plain run of one forward and of its backward."""
        try:
            return self._run_calls([call for call in calls if call.grad] or calls)
        except Exception as error:  # of a module that cannot be called by itself
            return {"error": f"{type(error).__name__}: {error}"}

    def _run_calls(self, calls: list[_Call]) -> dict[str, Any]:
        weights: dict[int, Tensor] = {}
        made: dict[Leaf, Tensor] = {}
        inputs: list[Tensor] = []
        returned: list[tuple[_Call, int, Tensor]] = []
        taken: set[Leaf] = set()
        for call in calls:
            names = {name: buffer.clone() for name, buffer in call.buffers.items()}
            for name, parameter in call.module.named_parameters(remove_duplicate=False):
                number = self._numbers[id(parameter)]
                if number not in weights:
                    weights[number] = self._weights[number].clone().requires_grad_(parameter.requires_grad)
                names[name] = weights[number]
            leaves = list(call.leaves)
            for at, known in enumerate(call.known):
                if known in made:
                    leaves[at] = made[known]
                    taken.add(known)
                elif known is not None and (call.needs_grad[at] or at in call.arrived):
                    leaves[at] = leaves[at].clone().requires_grad_(leaves[at].is_floating_point())
                    inputs += [leaves[at]] if at in call.arrived else []
            for module, name, tensor in call.held:
                leaf = tensor.clone().requires_grad_()
                inputs.append(leaf)
                _put(module, name, leaf)
            torch.set_rng_state(call.random)
            args, kwargs = tree_unflatten(leaves, call.spec)
            with torch.set_grad_enabled(True):
                output = functional_call(call.module, names, args, kwargs, strict=False)
            for at, leaf in enumerate(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
                made[call.returned[at]] = leaf
                returned.append((call, at, leaf))
        roots = [
            (leaf, call.gradients[at])
            for call, at, leaf in returned
            if at in call.gradients and call.returned[at] not in taken and leaf.requires_grad
        ]
        if roots:
            torch.autograd.backward([leaf for leaf, _ in roots], [gradient for _, gradient in roots])
        last = calls[-1]
        return {
            "took": [copy for call in calls for copy in _arrivals(call)],
            "returned": [leaf for call in calls for leaf in call.outputs],
            "plainly": [leaf.detach().clone() for _, _, leaf in returned],
            "gradients": [last.gradients.get(at) for at in range(len(last.outputs))],
            "input gradients": [_copy(leaf.grad) for leaf in inputs],
            "weights": {number: _copy(leaf.grad) for number, leaf in weights.items()},
            "ran": bool(roots),
        }


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Where a program keeps a parameter's gradient: in ``main_grad``, as Megatron does, or else in ``grad``."""
    kept = getattr(parameter, "main_grad", None)
    return kept if isinstance(kept, Tensor) else parameter.grad


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _leaf(tensor: Tensor) -> Leaf:
    return key_of(tensor), tuple(tensor.shape)


def _keep_gradient(call: _Call, at: int, gradient: Tensor) -> None:
    with _disable_current_modes():
        call.gradients[at] = gradient.detach().clone()


def _arrivals(call: _Call) -> list[Tensor]:
    """What a call took from another stage, among its arguments or in an attribute."""
    return [call.leaves[at] for at in call.arrived if call.known[at] is not None] + [t for _, _, t in call.held]


def _held(module: nn.Module) -> Iterable[tuple[nn.Module, str, Tensor]]:
    """Tensors in attributes of a module and its parts, such as an input that a setter has put there."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield part, name, value
            elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor):
                yield part, name, value[0]


def _put(module: nn.Module, name: str, leaf: Tensor) -> None:
    setattr(module, name, [leaf] if isinstance(vars(module)[name], list) else leaf)


def _ends(child: int, seconds: float) -> bool:
    """Whether a process ends within the time; else it is killed."""
    until = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(_POLL)
    return True
