"""A stage whose linear layers split their backward into B (input gradient) and W (weight gradient).

While a microbatch's F runs, the linear layers of its stage compute through an autograd Function that hides weight and
bias from autograd.  Its backward gives the input gradient and defers the weight gradient to
``dualpipe.runtime.weightgrad``.  Between steps the modules are as the user built them.

Not every use of a layer can be split.  Weights that a stage also uses outside their layer, differentiates within
its forward, or computes anew at each call need the full backward.  So the first microbatch of a stage runs with full
backwards and is observed.  Layers that cannot be split run unsplit from then on and are named once in the log.  If a
later microbatch uses a layer as the first one did not, ``WeightGradError`` is raised before a gradient is wrong.

Until W each split layer's input and output gradient stay allocated.  LayerNorm, embedding and every other parameter
get their gradient in B.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from dualpipe.runtime.weightgrad import DeferredGradients, Use, WeightGradError

logger = logging.getLogger(__name__)
_MODULE: Any = nn.modules.module
_AUTOGRAD: Any = torch.autograd
"""``torch.autograd``; its ``_engine_run_backward``, which runs every backward that Python starts, is private."""
_UNCHANGED: AbstractContextManager[None] = nullcontext()
"""The context of an F or B with a full backward whose microbatch is not observed: its layers are not changed."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of a stage: ``compute(layer, stage, ...)`` replaces its ``method`` while the stage runs."""

    name: str
    module: nn.Module
    method: str
    compute: Callable[..., Any]
    within: Sequence[nn.Module] = ()
    """The module and those of the stage that contain it."""


@dataclass
class SplitStage:
    """The linear layers of one stage, and which of their parameters need the full backward."""

    name: str
    layers: Sequence[Layer]
    store: DeferredGradients
    learned: bool = False
    unsplit: set[Tensor | str] = field(default_factory=set)
    """The parameters whose gradients cannot be deferred, and the names of layers that cannot be split."""
    _watched: set[Hashable] = field(default_factory=set)
    _first: Hashable | None = None
    _watching: bool = False
    """Whether the running F or B belongs to the observed first microbatch, which has a full backward."""
    _at_first: bool = False
    """Whether it belongs to the step's first microbatch."""
    _called: set[str] = field(default_factory=set)
    _names: dict[Tensor, str] = field(default_factory=dict)
    _nodes: set[Node] = field(default_factory=set)
    _accumulators: dict[int, Node] = field(default_factory=dict)
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def begin(self) -> None:
        """Begin a step, in which nothing is deferred yet."""
        self._first = None

    def forward(self, key: Hashable, split: bool) -> AbstractContextManager[None]:
        """A context in which to run the F of a microbatch.

        ``key`` identifies its W; ``split`` says whether that W is in a later slot than its B.
        """
        if not self.learned:
            self._watched.add(key)
        if self._first is None:
            self._first = key
        return self._forward(key, split) if split or key in self._watched else _UNCHANGED

    def backward(self, key: Hashable, split: bool) -> AbstractContextManager[None]:
        """A context in which to run the B of the same microbatch.  Layers that a checkpoint recomputes run as in F."""
        return self._backward(key, split) if split or key in self._watched else _UNCHANGED

    @contextmanager
    def _forward(self, key: Hashable, split: bool) -> Iterator[None]:
        restore = self._patch(key, split)
        try:
            yield
        finally:
            restore()

    @contextmanager
    def _backward(self, key: Hashable, split: bool) -> Iterator[None]:
        hidden = split and key not in self._watched
        before = [(p, p.grad, _version(p.grad)) for p in self._names if p not in self.unsplit] if hidden else []
        restore = self._patch(key, split)
        outer = self.store.defer_to(key if split else None)
        try:
            yield
        finally:
            self.store.key = outer
            restore()
        self._watched.discard(key)
        for parameter, gradient, version in before:
            if parameter.grad is not gradient or _version(parameter.grad) != version:
                raise self.unlike_first(self._names[parameter], "adds in B, outside the layer, to the gradients of")

    def _patch(self, key: Hashable, split: bool) -> Callable[[], None]:
        """Let the layers compute by ``Layer.compute`` until the function that this returns is called.

        A method that the user has replaced stays.
        """
        self._watching, self._at_first = key in self._watched, key == self._first
        engine = _AUTOGRAD._engine_run_backward
        patched: list[tuple[dict[str, Any], str]] = []
        for layer in self.layers:
            own = vars(layer.module)
            if layer.method not in own:
                own[layer.method] = partial(layer.compute, layer, self)
                patched.append((own, layer.method))
        if not self._watching:
            _AUTOGRAD._engine_run_backward = partial(self._run_engine, engine)
        return partial(_restore, engine, patched)

    def _run_engine(self, engine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Refuse to take gradients of weights that are hidden from autograd, which would report them as unused."""
        inputs = arguments[4] if len(arguments) > 4 else options.get("inputs", ())
        for wanted in inputs or ():
            tensor = wanted if isinstance(wanted, Tensor) else getattr(wanted.node, "variable", None)
            if tensor is not None and tensor in self._names and tensor not in self.unsplit:
                raise self.unlike_first(self._names[tensor], "takes gradients of the weights of")
        return engine(*arguments, **options)

    def learn(self, roots: Iterable[Node]) -> None:
        """After the first F: find the parameters that its graph, from ``roots``, uses outside their layers."""
        for node, parameter in _parameters(roots, set()):
            if parameter in self._names and parameter not in self.unsplit and node not in self._nodes:
                self.leave_unsplit(self._names[parameter], [parameter], "its weights are also used outside the layer")
        for layer in self.layers:
            if layer.name not in self._called and any(p.requires_grad for p in layer.module.parameters(recurse=False)):
                self.log(layer.name, "it was not called (it is compiled, left out, or its weights are used directly)")
        self._nodes.clear()
        self.learned = True

    def watch(self, use: Use, x: Tensor, y: Tensor) -> None:
        """In the first F: record where the stock layer's graph uses the parameters, and hook gradients taken of it."""
        parameters = use.trained
        if not self.learned:
            above = {get_gradient_edge(x).node} if x.requires_grad else set()
            self._nodes.update(node for node, _ in _parameters([get_gradient_edge(y).node], above))

        def differentiated(gradient: Tensor) -> None:
            if not self.learned or not all(map(self.reaches, parameters)):
                self.leave_unsplit(use.name, parameters, "the stage's own code takes a gradient through it")

        y.register_hook(differentiated)  # type: ignore[no-untyped-call]

    def leave_unsplit(self, name: str, parameters: Iterable[Tensor], reason: str) -> None:
        """From now on B computes the gradients of these parameters."""
        self.unsplit.add(name)
        self.unsplit.update(parameter for parameter in parameters if isinstance(parameter, nn.Parameter))
        self.unsplit.update(parameter for parameter, of in self._names.items() if of == name)
        self.log(name, reason)

    def log(self, name: str, reason: str) -> None:
        """Name a layer in the log, once for each reason."""
        if (name, reason) not in self._logged:
            self._logged.add((name, reason))
            logger.warning("dualpipe: %s: the backward of %s is not split into B and W: %s", self.name, name, reason)

    def reaches(self, parameter: Tensor) -> bool:
        """Whether the running backward will itself accumulate into ``parameter``."""
        node = self._accumulators.get(id(parameter))
        if node is None:
            node = self._accumulators[id(parameter)] = get_gradient_edge(parameter).node
        return _accumulates(node)

    def apply(self, use: Use, x: Tensor, stock: Callable[[], Tensor], within: Sequence[nn.Module]) -> Tensor:
        """The layer's output: with its weights hidden from autograd, or as ``stock`` computes it."""
        if self._watching:  # without autograd too: a checkpoint takes the gradient later
            self._called.add(use.name)
            self._names.update((p, use.name) for p in use.trained if isinstance(p, nn.Parameter))
        if not torch.is_grad_enabled() or not use.trained or (self.unsplit and self._is_unsplit(use)):
            return stock()
        reason = _hooked(within, use.trained) or _unfit(x, use.weight, use.bias) or use.unfit(x)
        if reason is not None:
            if not (self._watching or self._at_first):  # its gradient would be added before the deferred ones
                raise self.unlike_first(use.name, f"cannot split ({reason})")
            self.leave_unsplit(use.name, use.trained, reason)
            return stock()
        if self._watching:
            y = stock()
            self.watch(use, x, y)
            return y
        # the anchor requires a gradient: without it autograd would skip a layer whose input needs none
        anchor = x.new_empty(0, requires_grad=True)
        split: Tensor = _SplitLinear.apply(x, anchor, use, self)  # type: ignore[no-untyped-call]
        return split

    def _is_unsplit(self, use: Use) -> bool:
        return use.name in self.unsplit or any(parameter in self.unsplit for parameter in use.trained)

    def unlike_first(self, name: str, what: str) -> WeightGradError:
        """The error for a later microbatch that does something with a layer that the first one did not do."""
        return WeightGradError(
            f"{self.name} {what} {name}, which its first microbatch did not, and only the first one decides what "
            "is split; build the pipeline with split_backward=False"
        )


def _restore(engine: Callable[..., Any], patched: Sequence[tuple[dict[str, Any], str]]) -> None:
    _AUTOGRAD._engine_run_backward = engine
    for own, method in patched:
        own.pop(method, None)


class _SplitLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose backward gives dx, and defers dW and db."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, use: Use, stage: SplitStage) -> Tensor:
        # autograd refuses a weight modified before B; detached, it keeps the data F used even if .data is replaced
        ctx.save_for_backward(x, use.weight.detach())
        ctx.use, ctx.stage = use, stage
        return use.output(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (dy,), use = ctx.saved_tensors, gradients, ctx.use
        stage: SplitStage = ctx.stage
        anchor = ctx.next_functions[1][0]
        if stage.store.key is None or torch.is_grad_enabled() or not _accumulates(anchor):
            raise stage.unlike_first(use.name, "takes a gradient through")
        for parameter in use.trained:
            if stage.reaches(parameter):
                raise stage.unlike_first(use.name, "uses outside their layer the weights of")
        stage.store.defer(use, x.detach(), dy)
        return (use.input_gradient(x, dy, weight) if ctx.needs_input_grad[0] else None), None, None, None


def _parameters(roots: Iterable[Node], above: Set[Node]) -> Iterator[tuple[Node, Tensor]]:
    """The leaves of the graph below ``roots``, each with the node that uses it; not through the nodes ``above``.

    A root that is a leaf itself, the output of a stage that returns its weight, uses itself.
    """
    todo = list(roots)
    yield from ((root, root.variable) for root in todo if hasattr(root, "variable"))
    seen = {*todo, *above}
    while todo:
        node = todo.pop()
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None:
                yield node, variable
            else:
                seen.add(following)
                todo.append(following)


def _accumulates(leaf: Node) -> bool:
    """Whether the running backward accumulates into ``leaf``, as ``torch.autograd.grad`` does not."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # the leaf is an input of torch.autograd.grad
        return False


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


def _hooked(within: Sequence[nn.Module], parameters: Sequence[Tensor]) -> str | None:
    """Why a hook that runs in B may read the layer's gradients, before W has computed them; else ``None``."""
    for module in within:  # a loop: any() with a generator takes several times as long
        if module._backward_hooks or module._backward_pre_hooks:
            return "a backward hook of its module may read its gradients"
    if _MODULE._global_backward_hooks or _MODULE._global_backward_pre_hooks:
        return "a backward hook of all modules may read its gradients"
    for parameter in parameters:
        if parameter._backward_hooks:
            return "its weights have tensor hooks"
    return None


def _unfit(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why no use of a layer with such tensors can be split; ``None`` if it can."""
    if torch.is_autocast_enabled(x.device.type):
        return "it runs under autocast"
    if type(weight) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
        return "its weight is not a plain parameter when the layer runs"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"its input is a {type(x).__name__}"
    if not (weight.is_floating_point() and x.dtype == weight.dtype):
        return f"its input is {x.dtype} and its weight {weight.dtype}"
    if x.layout is not torch.strided or weight.layout is not torch.strided or x.is_nested:
        return "its input or weight is not a dense tensor"
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "it runs within a transform of torch.func"
    return None
