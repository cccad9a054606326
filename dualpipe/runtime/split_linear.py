"""Splits the backward of linear layers into B (input gradient) and W (weight gradient).

While a microbatch's F runs, the linear layers of its stage compute through an autograd Function that keeps weight and
bias from autograd's sight.  Its backward gives the input gradient and leaves the weight gradient to
``dualpipe.runtime.weightgrad``.  Between steps the modules are as the user built them.

Not every use of a layer can be split.  Weights that a stage uses outside their layer too, takes gradients of within
its forward, or computes anew at each call need the whole backward.  So the first microbatch of a stage is run whole
and watched.  Layers that cannot be split are run whole from then on and named once in the log.  A later microbatch
that does what the first one did not ends in ``WeightGradError``, before a gradient is wrong.

Until W each split layer's input and output gradient stay allocated.  LayerNorm, embedding and every other parameter
get their gradient in B.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import functional

from dualpipe.runtime.weightgrad import Use, WeightGradError, WeightGradStore, training

logger = logging.getLogger(__name__)
_MODULE: Any = nn.modules.module
_AUTOGRAD: Any = torch.autograd
"""The function in it through which every backward that Python starts goes is not exported."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of a stage: ``compute(layer, stage, ...)`` runs in place of the method ``method``."""

    name: str
    module: nn.Module
    method: str
    compute: Callable[..., Any]
    within: Sequence[nn.Module] = ()
    """The module and those of the stage that it is in."""


@dataclass
class SplitStage:
    """The linear layers of one stage, and which of their parameters need the whole backward."""

    name: str
    layers: Sequence[Layer]
    store: WeightGradStore
    learned: bool = False
    whole: set[Tensor | str] = field(default_factory=set)
    """The parameters whose gradients cannot be left to W, and the names of layers that cannot be split."""
    _watched: set[Hashable] = field(default_factory=set)
    _first: Hashable | None = None
    _watches: bool = False
    """Whether the F or B that is running is the first one, run whole."""
    _begins: bool = False
    """Whether it is of the step's first microbatch."""
    _called: set[str] = field(default_factory=set)
    _names: dict[Tensor, str] = field(default_factory=dict)
    _nodes: set[Node] = field(default_factory=set)
    _accumulators: dict[int, Node] = field(default_factory=dict)
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def begin(self) -> None:
        """A step begins: nothing waits for W, and no F waits for B."""
        self._first = None

    @contextmanager
    def forward(self, key: Hashable, split: bool) -> Iterator[None]:
        """Around the F of the microbatch ``key``.  ``split``: its W is apart from its B."""
        if not self.learned:
            self._watched.add(key)
        if self._first is None:
            self._first = key
        restore = self._patch(key, split)
        try:
            yield
        finally:
            restore()

    @contextmanager
    def backward(self, key: Hashable, split: bool) -> Iterator[None]:
        """Around the B of ``key``; what a checkpoint computes again is computed as in F."""
        hidden = split and key not in self._watched
        before = [(p, p.grad, _version(p.grad)) for p in self._names if p not in self.whole] if hidden else []
        restore = self._patch(key, split)
        outer = self.store.collect(key if split else None)
        try:
            yield
        finally:
            self.store.key = outer
            restore()
        self._watched.discard(key)
        for parameter, gradient, version in before:
            if parameter.grad is not gradient or _version(parameter.grad) != version:
                raise self.late(self._names[parameter], "adds in B, outside the layer, to the gradients of")

    def _patch(self, key: Hashable, split: bool) -> Callable[[], None]:
        """Let the layers compute by ``Layer.compute`` until what it returns is called.

        What the user has put in a method's place stays.
        """
        self._watches, self._begins = key in self._watched, key == self._first
        if not (self._watches or split):
            return _nothing
        engine = _AUTOGRAD._engine_run_backward
        patched: list[tuple[dict[str, Any], str]] = []
        for layer in self.layers:
            own = vars(layer.module)
            if layer.method not in own:
                own[layer.method] = partial(layer.compute, layer, self)
                patched.append((own, layer.method))
        if not self._watches:
            _AUTOGRAD._engine_run_backward = partial(self._run_engine, engine)
        return partial(_restore, engine, patched)

    def _run_engine(self, engine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Refuse to take gradients of weights that autograd does not see: it would take them for unused."""
        inputs = arguments[4] if len(arguments) > 4 else options.get("inputs", ())
        for wanted in inputs or ():
            tensor = wanted if isinstance(wanted, Tensor) else getattr(wanted.node, "variable", None)
            if tensor is not None and tensor in self._names and tensor not in self.whole:
                raise self.late(self._names[tensor], "takes gradients of the weights of")
        return engine(*arguments, **options)

    def learn(self, roots: Iterable[Node]) -> None:
        """After the first F: find the parameters that its graph, from ``roots``, uses outside their layers."""
        for node, parameter in _parameters(roots, set()):
            if parameter in self._names and parameter not in self.whole and node not in self._nodes:
                self.run_whole(self._names[parameter], [parameter], "its weights are also used outside the layer")
        for layer in self.layers:
            if layer.name not in self._called and any(p.requires_grad for p in layer.module.parameters(recurse=False)):
                self.log(layer.name, "it was not called (it is compiled, left out, or its weights are used directly)")
        self._nodes.clear()
        self.learned = True

    def watch(self, use: Use, x: Tensor, y: Tensor) -> None:
        """In the first F and B: remember how the stock layer's graph uses the parameters, and see gradients taken."""
        parameters = use.trained
        if not self.learned:
            above = {get_gradient_edge(x).node} if x.requires_grad else set()
            self._nodes.update(node for node, _ in _parameters([get_gradient_edge(y).node], above))

        def taken(gradient: Tensor) -> None:
            if not self.learned or not all(map(self.reaches, parameters)):
                self.run_whole(use.name, parameters, "a gradient is taken through it within the stage")

        y.register_hook(taken)  # type: ignore[no-untyped-call]

    def run_whole(self, name: str, parameters: Iterable[Tensor], reason: str) -> None:
        """From now on the gradients of these parameters are B's."""
        self.whole.add(name)
        self.whole.update(parameter for parameter in parameters if isinstance(parameter, nn.Parameter))
        self.whole.update(parameter for parameter, of in self._names.items() if of == name)
        self.log(name, reason)

    def log(self, name: str, reason: str) -> None:
        """Name a layer in the log, once for each reason."""
        if (name, reason) not in self._logged:
            self._logged.add((name, reason))
            logger.warning("dualpipe: %s: the backward of %s is not split into B and W: %s", self.name, name, reason)

    def reaches(self, parameter: Tensor) -> bool:
        """Whether the backward that is running will itself accumulate into ``parameter``."""
        node = self._accumulators.get(id(parameter))
        if node is None:
            node = self._accumulators[id(parameter)] = get_gradient_edge(parameter).node
        return _accumulates(node)

    def apply(self, use: Use, x: Tensor, stock: Callable[[], Tensor], within: Sequence[nn.Module]) -> Tensor:
        """The output of a layer: with its weights kept from autograd's sight, or as ``stock`` computes it."""
        if self._watches:  # without autograd too: a checkpoint takes the gradient later
            self._called.add(use.name)
            self._names.update((p, use.name) for p in use.trained if isinstance(p, nn.Parameter))
        if not torch.is_grad_enabled() or not use.trained or (self.whole and self._is_whole(use)):
            return stock()
        reason = _hooked(within, use.trained) or _unfit(x, use.weight, use.bias) or use.unfit(x)
        if reason is not None:
            if not (self._watches or self._begins):  # its gradient would be added before those that wait for W
                raise self.late(use.name, f"cannot split ({reason})")
            self.run_whole(use.name, use.trained, reason)
            return stock()
        if self._watches:
            y = stock()
            self.watch(use, x, y)
            return y
        # the anchor requires a gradient: without it autograd would skip a layer whose input needs none
        anchor = x.new_empty(0, requires_grad=True)
        split: Tensor = _SplitLinear.apply(x, anchor, use, self)  # type: ignore[no-untyped-call]
        return split

    def _is_whole(self, use: Use) -> bool:
        return use.name in self.whole or any(parameter in self.whole for parameter in use.trained)

    def late(self, name: str, what: str) -> WeightGradError:
        return WeightGradError(
            f"{self.name} {what} {name}, which its first microbatch did not, and only the first one decides what "
            "is split; build the pipeline with split_backward=False"
        )


def _nothing() -> None:
    """Restores the methods of layers of which none was patched."""


def _restore(engine: Callable[..., Any], patched: Sequence[tuple[dict[str, Any], str]]) -> None:
    _AUTOGRAD._engine_run_backward = engine
    for own, method in patched:
        own.pop(method, None)


class _SplitLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose backward gives dx, and leaves dW and db to the store."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, use: Use, stage: SplitStage) -> Tensor:
        # autograd refuses a weight that was modified before B; detached, it stays what F used if its data are exchanged
        ctx.save_for_backward(x, use.weight.detach())
        ctx.use, ctx.stage = use, stage
        return use.output(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (dy,), use = ctx.saved_tensors, gradients, ctx.use
        stage: SplitStage = ctx.stage
        anchor = ctx.next_functions[1][0]
        if stage.store.key is None or torch.is_grad_enabled() or not _accumulates(anchor):
            raise stage.late(use.name, "takes a gradient through")
        for parameter in use.trained:
            if stage.reaches(parameter):
                raise stage.late(use.name, "uses outside their layer the weights of")
        stage.store.defer(use, x.detach(), dy)
        return (use.input_gradient(x, dy, weight) if ctx.needs_input_grad[0] else None), None, None, None


def _parameters(roots: Iterable[Node], above: Set[Node]) -> Iterator[tuple[Node, Tensor]]:
    """The leaves of the graph below ``roots``, each with the node that uses it; not through the nodes ``above``."""
    todo = list(roots)
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
    """Whether the backward that is running accumulates into ``leaf``, as ``torch.autograd.grad`` does not."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # the leaf is what torch.autograd.grad was asked for
        return False


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


def _hooked(within: Sequence[nn.Module], parameters: Sequence[Tensor]) -> str | None:
    """Whether something runs in the backward that may look at the layer's gradients, which W has yet to compute."""
    for module in within:  # a loop: any() with a generator takes several times as long
        if module._backward_hooks or module._backward_pre_hooks:
            return "a backward hook of its module may look at its gradients"
    if _MODULE._global_backward_hooks or _MODULE._global_backward_pre_hooks:
        return "a backward hook of all modules may look at its gradients"
    for parameter in parameters:
        if parameter._backward_hooks:
            return "its weights have tensor hooks"
    return None


def _function_modes() -> bool:
    """Whether a mode watches functions of torch, other than the one that ``torch.set_default_device`` enters."""
    count = torch._C._len_torch_function_stack()
    if not count:
        return False
    modes = [torch._C._get_function_stack_at(number) for number in range(count)]
    return any(not isinstance(mode, torch.utils._device.DeviceContext) for mode in modes)


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


@dataclass(slots=True, eq=False)
class _StockLinear:
    """A use of ``nn.Linear``: PyTorch's own products on the same two-dimensional views, so the bits agree."""

    name: str
    weight: Tensor
    bias: Tensor | None
    trained: tuple[Tensor, ...]

    def unfit(self, x: Tensor) -> str | None:
        if functional.linear is not torch._C._nn.linear or _function_modes():
            return "torch.nn.functional.linear is replaced or watched"
        if not self.weight.numel():
            return "its weight is empty"
        if x.dim() < 2 or not x.is_contiguous() or not self.weight.is_contiguous():  # PyTorch takes other products
            return "its input or weight is not contiguous, or the input has no batch dimension"
        return None

    def output(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        dx = _rows(dy).mm(weight)
        return dx if x.dim() == 2 else dx.view(x.shape)

    def weight_gradients(self, x: Tensor, dy: Tensor) -> Sequence[Tensor]:
        x, dy = _rows(x), _rows(dy)
        return [dy.t().mm(x) if parameter is self.weight else dy.sum(0) for parameter in self.trained]


def _rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _forward(layer: Layer, stage: SplitStage, input: Tensor) -> Tensor:
    """What a linear layer of a stage runs in place of ``nn.Linear.forward``."""
    module: Any = layer.module
    weight, bias = module.weight, module.bias  # once: a parametrized layer computes them at each access
    stock = partial(functional.linear, input, weight, bias)
    return (
        stock()
        if torch.compiler.is_compiling()
        else stage.apply(_StockLinear(layer.name, weight, bias, training(weight, bias)), input, stock, layer.within)
    )


def linear_layer(name: str, module: nn.Module) -> Layer | None:
    """The ``Layer`` of a module whose forward is that of ``nn.Linear``, else ``None``."""
    stock = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return Layer(name or type(module).__name__, module, "forward", _forward) if stock else None


def find_layers(
    module: nn.Module, store: WeightGradStore, name: str, layer_of: Callable[[str, nn.Module], Layer | None]
) -> SplitStage:
    """The stage ``module`` with every layer in it that ``layer_of`` knows how to split.

    Other kinds of layers that have a matrix of weights are named in the log.
    """
    layers: list[Layer] = []
    others: Counter[str] = Counter()
    for path, part, within in _parts(module):
        layer = layer_of(path, part)
        if layer is not None:
            layers.append(replace(layer, within=within))
        elif _compiled(part) or any(p.requires_grad and p.dim() > 1 for p in part.parameters(recurse=False)):
            others[f"{type(part).__name__}{', compiled' if _compiled(part) else ''}"] += 1
    if others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items()))
        logger.info("dualpipe: %s: the weight gradients of these layers are computed in B, not in W: %s", name, kinds)
    return SplitStage(name, layers, store)


def split_linears(module: nn.Module, store: WeightGradStore, name: str = "the stage") -> SplitStage:
    """The stage ``module`` with its ``nn.Linear`` layers.

    A subclass with a ``forward`` of its own is left whole, as is what ``torch.compile`` has compiled.
    """
    return find_layers(module, store, name, linear_layer)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """``module`` and all that is in it, each once, by name, with the modules it is in; what is compiled is one part."""
    todo: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", module, (module,))]
    seen = {module}
    while todo:
        name, part, within = todo.pop()
        yield name, part, within
        if not _compiled(part):
            inner = [(n, child) for n, child in part.named_children() if child not in seen]
            seen.update(child for _, child in inner)
            todo += [(f"{name}.{n}" if name else n, child, (*within, child)) for n, child in reversed(inner)]


def _compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # there only where somebody compiles; importing it takes seconds
    return module._compiled_call_impl is not None or bool(dynamo and isinstance(module, dynamo.OptimizedModule))
