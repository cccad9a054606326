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
import math
import os
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from .draws import Draws, Generators
from .edges import Edges, Observed, leaves_below
from .flow import Flow
from .graph import marked_below
from .kept import Kept
from .log import program_line
from .losses import Losses
from .marks import key_of
from .masters import Masters
from .patches import Patches
from .regions import copied
from .replay import Call, Replay, leaf_of, refusal
from .transport import Transport

_AUTOCAST = ("cpu", "cuda")
_POLL = 0.01
_OUTPUT = "dualpipe.record.output"  # in a node's metadata: the calls that returned its result, and the positions there
FIRST_KEPT = 0
"""Stands for the first training step whose gradients an optimizer uses."""
DISCARDED = (
    "the program threw away the gradients of this step before an optimizer's step, and computed again: compare the "
    "next step, by its number"
)


class Plain:
    """The module calls of one step of one rank, and their plain run.

    ``path`` is the file to write, ``step`` the training step (from 1, or ``FIRST_KEPT``), ``seconds`` the limit for the
    plain run.
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
        self._discarded = 0  # how often the program had thrown away its gradients by then
        self._optimized = False  # whether an optimizer has made a step since the wanted one was computed
        self._anew = 0  # how many training steps it has ended so
        self._calls: dict[int, list[Call]] = {}
        self._kept = Kept()
        self._edges = Edges(flow)
        self._losses = Losses(flow)
        self._draws = flow.draws = Draws()
        self._masters = Masters(flow.parameters)
        flow.made = (self._masters.made, self._losses.places.made)
        self._clipped: dict[str, Any] | None = None

    def watch(self, patches: Patches) -> None:
        """Watch module calls, optimizers and what the program reads, until ``patches.undo()``."""
        patches.put(nn.Module, "__call__", self._watched(nn.Module.__call__))
        self._losses.watch(patches)
        self._masters.watch(patches)
        patches.put(Variable, "_execution_engine", Observed(self._ran_from, self._within, Variable._execution_engine))
        patches.later(register_optimizer_step_pre_hook(lambda *args: self._optimize()).remove)
        patches.wrap(nn.utils.clip_grad_norm_, self._before_clipping)

    def _optimize(self) -> None:
        self._optimized = True
        if self._done:
            with _disable_current_modes():
                self._kept.steps(self._masters)
        self.end_step(True)

    def _before_clipping(self, original: Any) -> Any:
        def clip(parameters: Any, limit: float, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            if math.isinf(limit):  # it only computes the norm
                return original(parameters, limit, norm_type, *args, **kwargs)
            self.end_step(True)
            norm = original(parameters, limit, norm_type, *args, **kwargs)
            if self._done and self._kept.changed is None:
                with _disable_current_modes():
                    self._kept.clipped(self._masters)
                    found = {"limit": float(limit), "norm": self._losses.value(norm), "type": float(norm_type)}
                    self._clipped = self._clipped or found | {"at": program_line()}
            return norm

        return clip

    def _ran_from(self, roots: Sequence[Any], gradients: Sequence[Any], inputs: Sequence[Any]) -> None:
        """The engine is about to run from these tensors.  A scalar among them is taken for a loss."""
        if self._done:
            return
        self._losses.scalars.clear()
        if not self._is_wanted() or self._flow.calling or self._flow.running:
            return
        losses = [root for root in roots if isinstance(root, Tensor) and root.numel() == 1]
        for root in roots:
            for call, at in [output for node in marked_below(root) for output in node.metadata.get(_OUTPUT, ())[-1:]]:
                call.apart.add(at)
        if losses:
            self._losses.begin(losses, bool(inputs))
        spares = bool(inputs) and not any(target in self._flow.parameters for target in inputs)
        every = {self._flow.find(number) for number in self._flow.makers(roots)}
        for root, gradient in zip(roots, gradients, strict=False):
            if isinstance(root, Tensor) and isinstance(gradient, Tensor) and root.numel() > 1:
                # an input that a module returns as it is has no maker of its own
                made = {self._flow.find(number) for number in self._flow.makers((root,))} or every
                for forward in made if len(made) == 1 else ():
                    self._edges.run_from(forward, root, gradient, spares, self._calls.get(forward, ()))

    def _within(self) -> AbstractContextManager[None]:
        """What sees the draws of a run of the engine, as long as calls are kept."""
        return nullcontext() if self._done or not self._is_wanted() else self._draws.engine_run()

    def _watched(self, original: Any) -> Any:
        @functools.wraps(original)
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - replaces that method
            flow = self._flow
            inside = flow.calling or flow.running or type(module).__qualname__ in self._containers
            if not inside:
                self._begin_anew()
            if not inside and self._done:
                self._kept.step_ends()
            if inside or self._done or not self._is_wanted():
                self._computed = self._computed or not inside
                return original(module, *args, **kwargs)
            call = self._begin(module, args, kwargs)
            with self._draws.kept([] if call is None else call.drawn.forward):
                output = original(module, *args, **kwargs)
            if call is not None:
                arrived = [tree_leaves((args, kwargs))[at] for at in call.arrived]
                self._end(call, output, [*arrived, *(t for _, _, t in _held(module) if self._has_arrived(t))])
            return output

        return __call__

    def _is_wanted(self) -> bool:
        return self._wanted in (FIRST_KEPT, self._step)

    def _begin_anew(self) -> None:
        """The program computes.  If it has thrown away its gradients before that, a new training step begins."""
        if self._flow.attempts.count == self._discarded:
            return
        self._discarded = self._flow.attempts.count
        if (self._done and self._optimized) or not (self._done or self._computed):
            return
        self._anew += 1
        if self._done or self._step == self._wanted:
            self._save({"error": DISCARDED, "discarded": self._anew})
        if self._step == self._wanted:
            self._done = self._optimized = True
            return
        self._done = False  # it is done if the program has clipped the gradients before it threw them away
        self._step += 1
        self._computed = False
        self._forget()

    def _forget(self) -> None:
        """Forget what was kept of a step."""
        self._clipped = None
        self._calls.clear()
        self._kept.forget()
        self._edges.forget()
        self._losses.forget()
        self._draws.forget()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Call | None:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or any(key_of(tensor) is None or tensor.is_meta for tensor in tensors):
            return None
        self._computed, self._optimized = True, False
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module  # the wrapper exchanges messages on its own, which no other rank does in a plain run
        if refused := refusal(module):
            return Call(module, [], spec, [], [], [], [], {}, Generators.now(), True, {}, [], [], refused=refused)
        with _disable_current_modes():
            changed = self._kept.module_runs(module)
            return Call(
                module,
                [copied(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
                spec,
                [leaf_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves],
                [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves],
                [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and self._has_arrived(leaf)],
                [(sub, name, copied(t)) for sub, name, t in _held(module) if self._has_arrived(t)],
                {name: copied(buffer) for name, buffer in module.named_buffers()},
                Generators.now(),
                torch.is_grad_enabled(),
                {device: torch.get_autocast_dtype(device) for device in _AUTOCAST if torch.is_autocast_enabled(device)},
                [part.training for part in module.modules()],
                changed,
            )

    def _has_arrived(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and bool(
            {"M", "C"} & {letter for letter, _ in self._flow.origins.carried_by(tensor)}
        )

    def _end(self, call: Call, output: Any, inputs: Sequence[Tensor]) -> None:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        forwards = {forward for leaf in leaves for forward in self._flow.origins.forwards_of(leaf)}
        if len(forwards) != 1:
            return
        with _disable_current_modes():
            call.outputs = [copied(leaf) for leaf in leaves]
            call.returned = [leaf_of(leaf) for leaf in leaves]
        for at, leaf in enumerate(leaves if not call.refused else ()):
            node: Any = leaf.grad_fn
            if node is not None:
                node.metadata.setdefault(_OUTPUT, []).append((call, at))
                leaf.register_hook(functools.partial(self._keep_gradient, call, at))  # type: ignore[no-untyped-call]
        (forward,) = forwards
        self._calls.setdefault(forward, []).append(call)
        self._edges.begins(forward, [leaf for leaf in leaves_below(inputs) if self._has_arrived(leaf)])

    def _keep_gradient(self, call: Call, at: int, gradient: Tensor | None) -> None:
        if gradient is None:  # a node gives none to an input that its function leaves out
            return
        with _disable_current_modes():
            self._kept.engine_runs(call.module)
            call.reached(at, copied(gradient), self._flow.spares_weights())
        self._draws.reached(call.drawn)

    def end_step(self, by_optimizer: bool) -> None:
        """The program is about to change its weights, or ends.  If this is the wanted step, make the plain run."""
        self._discarded = self._flow.attempts.count
        if self._done or not self._computed:
            return
        self._computed = False
        if not self._is_wanted():
            self._step += 1
            return
        self._done = True
        find = self._flow.find
        losses = self._losses.end_step(len(self._calls))
        calls: dict[int, list[Call]] = {}
        for forward, each in self._calls.items():
            calls.setdefault(find(forward), []).extend(each)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with _disable_current_modes():
                    self._flow.calling = 1  # so that nothing of the plain run is recorded
                    self._transport.alone = True
                    kept = self._kept
                    gradients = kept.gradients(self._masters)
                    replay = Replay(kept.parameters, kept.weights, self._draws)
                    self._save(
                        {
                            "forwards": {f: replay.run(each) | self._edges.of(f) for f, each in calls.items()},
                            "names": [name for name, _ in kept.named],
                            **gradients,
                            "before": kept.before,
                            "step": self._step,
                            "discarded": self._anew,
                            "by_optimizer": by_optimizer,
                            "weights": kept.weights,
                            "layers": self._layers(),
                            **losses,
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
                self._kept.step_ends()
                after = {"clipped": self._clipped, "read": self._losses.read(), "later": self._kept.later}
                self._save({"weights": self._kept.changed, **after}, ".after")

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
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(content, path + ".part")
        os.replace(path + ".part", path)


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
