"""Runs the modules of a recorded step again without the schedule, one microbatch after the other: the *plain run*.

While the step runs, every outermost module call is kept: copies of its inputs, of its outputs, and of the gradients of
its outputs.  Before the first optimizer step that follows (or at the end of the process) the rank forks.  The forked
process calls the same modules on the same inputs with the same weights and runs stock autograd.  For each forward it
saves the outputs, the input gradient and the weight gradients, and beside each the program's own.  The program itself
is not affected: stores, hooks and random streams of the forked process are copies.

``dualpipe.record.plain`` compares the files of the ranks.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from .flow import Flow
from .graph import marks_below
from .log import program_line
from .marks import key_of
from .patches import Patches
from .regions import weak_storage
from .replay import Call, Leaf, Replay, copy_of, gradient_of
from .transport import Transport

_AUTOCAST = ("cpu", "cuda")
_POLL = 0.01


class _Roots:
    """Wraps the autograd engine, and notes the tensors from which it runs."""

    def __init__(self, note: Callable[[Iterable[Any]], None], engine: Any) -> None:
        self._note, self._engine = note, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        self._note(tensors)
        return self._engine.run_backward(tensors, *args, **kwargs)


class Plain:
    """The module calls of one step of one rank, and their plain run.

    ``path`` is the file to write, ``step`` the training step (from 1), ``seconds`` the limit for the plain run.
    """

    def __init__(
        self,
        flow: Flow,
        transport: Transport,
        path: str,
        step: int,
        seconds: float,
        containers: Collection[str] = (),
    ) -> None:
        self._flow, self._transport = flow, transport
        self._path, self._wanted, self._seconds = path, step, seconds
        self._containers = frozenset(containers)
        self._step, self._computed, self._done = 1, False, False
        self._calls: dict[int, list[Call]] = {}
        self._storages: list[Any] = []  # weak; while they live, no other storage gets the same key
        self._numbers: dict[int, int] = {}  # id of a parameter -> its number
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._weights: dict[int, Tensor] = {}  # by number: the value before the step
        self._before: dict[int, Tensor] = {}  # by number: the gradient before the step, if there was one
        self._trained: set[int] = set()  # the parameters with which a module has computed with gradients
        self._reached: set[int] = set()  # the parameters of modules for which the engine has run
        self._read: set[int] = set()
        self._losses: dict[int, set[float]] = {}  # forward -> values of its loss that the program read or kept
        self._roots: dict[int, float] = {}  # forward -> the value of the scalar from which its backward began
        self._looking = False  # whether the recorder itself is reading the value of a tensor
        self._clipped: dict[str, Any] | None = None
        self._changed: dict[int, Tensor] | None = None  # by number: the weights after the step
        self._begun: set[int] = set()  # forwards from whose loss a backward has begun
        self._collected: set[int] = set()  # forwards with two losses or more left when a later one's backward began

    def watch(self, patches: Patches) -> None:
        """Watch module calls, optimizers and what the program reads, until ``patches.undo()``."""
        patches.put(nn.Module, "__call__", self._watched(nn.Module.__call__))
        for name in ("item", "tolist", "__float__"):
            patches.put(torch.Tensor, name, self._reading(getattr(torch.Tensor, name)))
        patches.put(Variable, "_execution_engine", _Roots(self._ran_from, Variable._execution_engine))
        patches.later(register_optimizer_step_pre_hook(lambda *args: self.end_step(True)).remove)
        patches.wrap(nn.utils.clip_grad_value_, self._before_clipping)
        patches.wrap(nn.utils.clip_grad_norm_, self._before_clipping)

    def _before_clipping(self, original: Any) -> Any:
        def clip(parameters: Any, limit: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            self.end_step(True)
            more = {} if original.__name__ == "clip_grad_value_" else {"norm_type": norm_type}
            norm = original(parameters, limit, *args, **more, **kwargs)
            if isinstance(norm, Tensor) and self._done and self._changed is None and self._clipped is None:
                with _disable_current_modes():
                    found = {"limit": float(limit), "norm": self._value(norm), "type": float(norm_type)}
                    self._clipped = found | {"at": program_line()}
            return norm

        return clip

    def _ran_from(self, roots: Iterable[Any]) -> None:
        """The engine is about to run from these tensors.  A scalar among them is taken for a loss."""
        losses = [root for root in roots if isinstance(root, Tensor) and root.numel() == 1]
        if not losses or self._done or self._step != self._wanted or self._flow.calling or self._flow.running:
            return
        now = [{self._flow.find(number) for number in marks_below(loss)} for loss in losses]
        earlier = self._begun.difference(*now) & self._held_results(2)
        if len(earlier) > 1:  # one may be in a variable that is about to be assigned
            self._collected |= earlier
        for loss, begun in zip(losses, now, strict=True):
            self._begun |= begun
            self._roots.update(dict.fromkeys(begun, self._value(loss)))

    def _value(self, tensor: Tensor) -> float:
        """The value of a scalar, without counting it as read by the program."""
        self._looking = True
        try:
            with _disable_current_modes():
                return float(tensor.detach())
        finally:
            self._looking = False

    def _watched(self, original: Any) -> Any:
        @functools.wraps(original)
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - replaces that method
            flow = self._flow
            inside = flow.calling or flow.running or type(module).__qualname__ in self._containers
            if not inside and self._done:
                self._keep_changed()
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
            if self._looking:
                return original(tensor, *args)
            found = self._flow.origins.forwards_of(tensor)
            self._read |= found
            value = original(tensor, *args)
            if found and not self._done and isinstance(value, float):
                self._note_loss(found, value)
            return value

        return read

    def _note_loss(self, forwards: Iterable[int], value: float) -> None:
        for forward in forwards:
            self._losses.setdefault(forward, set()).add(value)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Call | None:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(key_of(tensor) is None or tensor.is_meta for tensor in tensors):
            return None
        self._computed = True
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module  # the wrapper exchanges messages on its own, which no other rank does in a plain run
        if refused := refusal(module):
            return Call(module, [], spec, [], [], [], [], {}, torch.empty(0), True, {}, [], [], refused=refused)
        with _disable_current_modes():
            self._keep_weights(module)
            weights = [(name, self._weights[self._numbers[id(p)]], p) for name, p in module.named_parameters()]
            return Call(
                module,
                [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves],
                spec,
                [self._leaf(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves],
                [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves],
                [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and self._has_arrived(leaf)],
                [(sub, name, t.detach().clone()) for sub, name, t in _held(module) if self._has_arrived(t)],
                {name: buffer.detach().clone() for name, buffer in module.named_buffers()},
                torch.get_rng_state(),
                torch.is_grad_enabled(),
                {device: torch.get_autocast_dtype(device) for device in _AUTOCAST if torch.is_autocast_enabled(device)},
                [part.training for part in module.modules()],
                [name for name, before, now in weights if not torch.equal(before, now.detach())],
            )

    def _leaf(self, tensor: Tensor) -> Leaf:
        self._storages.append(weak_storage(tensor))
        return key_of(tensor), tuple(tensor.shape)

    def _has_arrived(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and bool(
            {"M", "C"} & {letter for letter, _ in self._flow.origins.carried_by(tensor)}
        )

    def _keep_weights(self, module: nn.Module) -> None:
        """Keep the weights of a module as they are when it first computes with gradients, after any evaluation."""
        for name, parameter in module.named_parameters():
            if id(parameter) not in self._numbers:
                self._numbers[id(parameter)] = len(self._parameters)
                self._parameters.append((name, parameter))
            number = self._numbers[id(parameter)]
            if number not in self._trained:
                self._weights[number] = parameter.detach().clone()
                if torch.is_grad_enabled():
                    self._trained.add(number)

    def _keep_before(self, module: nn.Module) -> None:
        """Keep the gradients of a module of before the engine first runs for it: a program may reset them late."""
        for parameter in module.parameters():
            number = self._numbers[id(parameter)]
            if number not in self._reached:
                self._reached.add(number)
                gradient = gradient_of(parameter)
                if gradient is not None and bool(gradient.any()):
                    self._before[number] = gradient.detach().clone()

    def _end(self, call: Call, output: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        forwards = {forward for leaf in leaves for forward in self._flow.origins.forwards_of(leaf)}
        if len(forwards) != 1:
            return
        with _disable_current_modes():
            call.outputs = [leaf.detach().clone() for leaf in leaves]
            call.returned = [self._leaf(leaf) for leaf in leaves]
        for at, leaf in enumerate(leaves if not call.refused else ()):
            if leaf.grad_fn is not None:
                leaf.register_hook(functools.partial(self._keep_gradient, call, at))  # type: ignore[no-untyped-call]
        self._calls.setdefault(next(iter(forwards)), []).append(call)

    def _keep_gradient(self, call: Call, at: int, gradient: Tensor) -> None:
        with _disable_current_modes():
            self._keep_before(call.module)
            call.reached(at, gradient.detach().clone(), self._flow.spares_weights())

    def end_step(self, by_optimizer: bool) -> None:
        """The program is about to change its weights, or ends.  If this is the wanted step, make the plain run."""
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
                    self._transport.alone = True
                    parameters = [parameter for _, parameter in self._parameters]
                    final = {n: copy_of(gradient_of(parameter)) for n, parameter in enumerate(parameters)}
                    replay = Replay(parameters, self._weights)
                    self._save(
                        {
                            "forwards": {find(f): replay.run(calls) for f, calls in self._calls.items()},
                            "names": [name for name, _ in self._parameters],
                            "final": final,
                            "before": self._before,
                            "step": self._wanted,
                            "seen": sorted(find(forward) for forward in seen),
                            "collected": sorted(find(forward) for forward in self._collected),
                            "by_optimizer": by_optimizer,
                            "weights": self._weights,
                            "layers": self._layers(),
                            "roots": {find(forward): value for forward, value in self._roots.items()},
                            "losses": {find(forward): sorted(values) for forward, values in self._losses.items()},
                        }
                    )
                code = 0
            finally:
                os._exit(code)
        if not _ends(child, self._seconds):
            self._save({"error": f"the plain run had not ended after {self._seconds:g} s"})
        self._calls.clear()

    def end(self) -> None:
        """The program ends: make the plain run if there was none, and save what happened after the step."""
        self.end_step(False)
        if self._done:
            with _disable_current_modes():
                self._keep_changed()
                read = sorted(map(self._flow.find, self._read))
                self._save({"weights": self._changed, "clipped": self._clipped, "read": read}, ".after")

    def _keep_changed(self) -> None:
        """Keep the weights that the optimizers have changed, the first time that this is called."""
        if self._changed is None:
            with _disable_current_modes():
                self._changed = {n: parameter.detach().clone() for n, (_, parameter) in enumerate(self._parameters)}

    def _layers(self) -> dict[int, dict[str, int]]:
        """By forward, the numbers of layers that its modules have as attributes, such as ``layer_number``."""
        return {
            self._flow.find(forward): {
                f"{path}.{name}".lstrip("."): value
                for call in calls
                for path, part in call.module.named_modules()
                for name, value in vars(part).items()
                if "layer" in name and type(value) is int
            }
            for forward, calls in self._calls.items()
        }

    def _save(self, content: dict[str, Any], ending: str = "") -> None:
        path = self._path + ending
        torch.save(content, path + ".part")
        os.replace(path + ".part", path)

    def _seen(self) -> set[int]:
        """The forwards with a result that the program has read, or holds as one or several scalars: possible losses."""
        return self._read | self._held_results(max(2, len(self._calls)))

    def _held_results(self, most: int) -> set[int]:
        """The forwards with a result that the program holds, of at most one dimension and ``most`` elements."""
        held: set[int] = set()
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.dim() <= 1 and 0 < thing.numel() <= most:
                found = self._flow.origins.forwards_of(thing)
                held |= found
                if found and thing.numel() == 1 and thing.is_floating_point():
                    self._note_loss(found, self._value(thing))
        return held


def refusal(module: nn.Module) -> str:
    """Why a module cannot be run plainly with its own weights; empty if it can be."""
    if any(hasattr(parameter, "to_local") for parameter in module.parameters()):
        return "its weights are sharded over ranks (DTensor, as with fully_shard)"
    if not all(isinstance(parameter, nn.Parameter) for parameter in module.parameters()):
        return "it is called with other weights than its own (torch.func.functional_call)"
    return ""


def _held(module: nn.Module) -> Iterable[tuple[nn.Module, str, Tensor]]:
    """Tensors in attributes of a module and its parts, such as an input that a setter has put there."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield part, name, value
            elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor):
                yield part, name, value[0]


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
