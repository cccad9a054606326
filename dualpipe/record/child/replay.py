"""The plain run of one forward and of its backward: the same module calls, with stock autograd and no schedule.

Most gradients are those of autograd.  A program that defers weight gradients hides the weights from autograd and
computes these gradients itself, in the backward or later.  Then the gradient is what that code adds in a backward of
this forward alone, and it is checked against the slope of the module: the difference of its output between two nearby
weights, in double precision.  If that code adds nothing in the backward, because it keeps the work for later, the slope
alone is left to compare with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_unflatten

from .draws import Drawn, Draws, Generators
from .ends import run_backward
from .graph import functions_of
from .marks import Key, key_of
from .regions import copied, is_readable, weak_storage

_STEP = 1e-5
"""How far the weights are moved for a slope, relative to their size."""


@dataclass(frozen=True)
class Leaf:
    """By which a tensor is recognised: its memory and its shape.

    ``storage`` is a weak reference.  While it lives, no other storage gets the same key.
    """

    key: Key | None
    shape: tuple[int, ...]
    storage: Any = field(compare=False, repr=False)


@dataclass
class Total:
    """The gradient of a tensor, summed over the runs of the engine.

    Several runs add up, as those of two losses.  But those for the weights and those for the input alone are two halves
    of one backward, each with all of the gradient.
    """

    gradient: Tensor | None = None
    with_weights: bool = False

    def add(self, gradient: Tensor, spares: bool) -> None:
        """A run has this gradient; it ``spares`` the weights if it is for the input alone."""
        if spares and self.with_weights:
            return
        before = self.gradient if spares or self.with_weights else None
        self.gradient = gradient if before is None else before + gradient
        self.with_weights = self.with_weights or not spares


@dataclass
class Call:
    """An outermost module call.

    ``arrived`` are the positions of tensors that come from another stage, ``autocast`` the type of each device for
    which autocast was on, ``training`` the modes of its modules, ``changed`` the weights that had changed since the
    step began, ``totals`` the gradients of its outputs by position,
    ``apart`` the outputs that the program uses outside of later calls, too, ``random`` the states of the random
    generators before the call, ``drawn`` those from which it drew, ``refused`` the reason why it cannot be run plainly,
    if there is one.
    """

    module: nn.Module
    leaves: list[Any]
    spec: Any
    known: list[Leaf | None]
    needs_grad: list[bool]
    arrived: list[int]
    held: list[tuple[nn.Module, str, Tensor]]
    buffers: dict[str, Tensor]
    random: Generators
    grad: bool
    autocast: dict[str, torch.dtype]
    training: list[bool]
    changed: list[str]
    drawn: Drawn = field(default_factory=Drawn)
    outputs: list[Tensor] = field(default_factory=list)
    returned: list[Leaf] = field(default_factory=list)
    totals: dict[int, Total] = field(default_factory=dict)
    apart: set[int] = field(default_factory=set)
    refused: str = ""

    def reached(self, at: int, gradient: Tensor, spares: bool) -> None:
        """The engine has reached an output with a gradient, in a run that ``spares`` the weights or does not."""
        self.totals.setdefault(at, Total()).add(gradient, spares)

    @property
    def gradients(self) -> dict[int, Tensor]:
        """The gradient of each output that a run has reached."""
        return {at: total.gradient for at, total in self.totals.items() if total.gradient is not None}


@dataclass
class _Made:
    """What the calls returned again (copies), the leaves that they took from other stages, the weights by number."""

    returned: list[Tensor]
    inputs: list[Tensor]
    weights: dict[int, Tensor]
    roots: list[tuple[Tensor, Tensor]]
    """The outputs that the recorded backward began from, with the gradients that it got for them."""
    need_gradients: list[bool]
    """Whether each of the outputs in ``returned`` does."""
    functions: dict[int, str]
    """By number of a weight the function of the program that computes its gradient, with its line, if one does."""


class Replay:
    """Runs forwards of one rank plainly.

    Parameters
    ----------
    parameters:
        The parameters by number.
    weights:
        Their values before the step.
    draws:
        Lets the modules draw the same random numbers again.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], weights: Mapping[int, Tensor], draws: Draws) -> None:
        self._parameters, self._weights, self._draws = parameters, weights, draws
        self._numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._checked: set[int] = set()  # parameters whose gradients were compared with a slope
        self._outside: dict[int, Tensor | None] = {}  # of the current forward: see ``run_backward``

    def run(self, calls: Sequence[Call]) -> dict[str, Any]:
        """What the plain run of one forward gives, or an ``error``.  Changes the gradients of the parameters."""
        if refused := next((call.refused for call in calls if call.refused), ""):
            return {"error": refused}
        other = self._draws.other([call.drawn for call in calls])
        try:
            with self._draws.plain_run():
                return self._run([call for call in calls if call.grad] or list(calls)) | {"drawn": other}
        except Exception as error:  # of a module that cannot be called by itself
            return {"error": f"{type(error).__name__}: {error}"}

    def _run(self, calls: Sequence[Call]) -> dict[str, Any]:
        self._forget_gradients()
        made = self._call(calls)
        self._outside = run_backward(made.roots)
        weights = {number: copy_of(leaf.grad) for number, leaf in made.weights.items()}
        hidden = [n for n, leaf in made.weights.items() if leaf.requires_grad and leaf.grad is None and made.roots]
        slopes: dict[int, float] = {}
        wrong: dict[int, tuple[float, float]] = {}
        for number in hidden:
            kept = weights[number] = copy_of(gradient_of(self._parameters[number]))
            if kept is None or not bool(kept.any()):
                weights[number] = None
                slopes[number] = self._slope(calls, number)
            elif number not in self._checked:
                self._checked.add(number)
                slope, own = self._slope(calls, number), along(kept, number)
                if abs(slope - own) > 1e-2 * max(abs(slope), abs(own)):
                    wrong[number] = own, slope
        gradients = [[self._outer(call.gradients.get(at)) for at in range(len(call.outputs))] for call in calls]
        return {
            "data": _data(calls[0]),
            "took": [copy for call in calls for copy in _arrivals(call)],
            "returned": [leaf for call in calls for leaf in call.outputs],
            "plainly": made.returned,
            "gradients": gradients[-1],
            "output gradients": [gradient for each in gradients for gradient in each],
            "input gradients": [copy_of(leaf.grad) for leaf in made.inputs],
            "weights": weights,
            "slopes": slopes,
            "wrong": wrong,
            "functions": made.functions,
            "changed": sorted({name for call in calls for name in call.changed}),
            "ran": bool(made.roots),
            "needs gradient": any(made.need_gradients),
            "need gradients": made.need_gradients,
        }

    def _outer(self, gradient: Tensor | None) -> Tensor | None:
        """The part of an output's gradient that does not come through other outputs."""
        return self._outside.get(id(gradient), gradient)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            kept = getattr(parameter, "main_grad", None)
            if isinstance(kept, Tensor):
                kept.zero_()
            parameter.grad = None

    def _slope(self, calls: Sequence[Call], number: int) -> float:
        """The derivative of the outputs, weighted with their gradients, along ``direction`` of one parameter."""
        size = float(self._weights[number].double().abs().max()) or 1.0
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                made = self._call(calls, (number, sign * _STEP * size))
                outer = [(leaf, self._outer(gradient)) for leaf, gradient in made.roots]
                ends.append(sum(float((leaf.double() * g.double()).sum()) for leaf, g in outer if g is not None))
        return (ends[0] - ends[1]) / (2 * _STEP * size)

    def _call(self, calls: Sequence[Call], moved: tuple[int, float] | None = None) -> _Made:
        """Call the modules again as they were called.

        With ``moved`` the call is in double precision and without gradients, and the weight of this number is moved by
        so much along its direction.
        """
        with_grad = moved is None

        def kept(tensor: Tensor) -> Tensor:
            return tensor.clone() if with_grad or not tensor.is_floating_point() else tensor.double()

        weights: dict[int, Tensor] = {}
        results: dict[tuple[int, int], Tensor] = {}  # by the number of the call, and the position in what it returned
        made: dict[Leaf, tuple[int, int]] = {}  # which result the program had in this memory last
        ends: set[tuple[int, int]] = set()  # what no later call has taken
        inputs: list[Tensor] = []
        returned: list[Tensor] = []
        for at_call, call in enumerate(calls):
            names = {name: kept(buffer) for name, buffer in call.buffers.items()}
            for name, parameter in call.module.named_parameters(remove_duplicate=False):
                number = self._numbers[id(parameter)]
                if number not in weights:
                    weight = kept(self._weights[number])
                    if moved is not None and moved[0] == number:
                        weight = weight + moved[1] * direction(number, weight)
                    weights[number] = weight.requires_grad_(parameter.requires_grad and with_grad)
                    vars(weight).update(vars(parameter))  # as ``main_grad``, to which a backward may add by itself
                names[name] = weights[number]
            leaves = [kept(leaf) if isinstance(leaf, Tensor) and not with_grad else leaf for leaf in call.leaves]
            for at, known in enumerate(call.known):
                if known in made and made[known][1] not in calls[made[known][0]].apart:
                    leaves[at] = results[made[known]]
                    ends.discard(made[known])
                elif known is not None and with_grad and (call.needs_grad[at] or at in call.arrived):
                    leaves[at] = leaves[at].clone().requires_grad_(leaves[at].is_floating_point())
                    inputs += [leaves[at]] if at in call.arrived else []
            for module, name, tensor in call.held:
                leaf = kept(tensor).requires_grad_(with_grad)
                inputs.append(leaf)
                _put(module, name, leaf)
            call.random.restore()
            args, kwargs = tree_unflatten(leaves, call.spec)
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(with_grad))
                stack.enter_context(self._draws.given(call.drawn.forward))
                for device, dtype in call.autocast.items() if with_grad else ():
                    stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
                for part, mode in zip(call.module.modules(), call.training, strict=False):
                    part.training = mode
                output = functional_call(call.module, names, args, kwargs, strict=False)
            for at, leaf in enumerate(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
                made[call.returned[at]] = at_call, at  # perhaps what the call has taken, as that of ``nn.Identity``
                results[at_call, at] = leaf
                ends.add((at_call, at))
                if leaf.requires_grad:
                    leaf.register_hook(lambda _, drawn=call.drawn: self._draws.reached_again(drawn))  # type: ignore[no-untyped-call]
                returned.append(leaf.detach().clone())  # a later call may change it in place
        roots = [
            (leaf, calls[number].gradients[at])
            for (number, at), leaf in results.items()
            if (number, at) in ends and at in calls[number].gradients and (leaf.requires_grad or not with_grad)
        ]
        functions = functions_of(results.values(), weights) if with_grad else {}
        return _Made(returned, inputs, weights, roots, [leaf.requires_grad for leaf in results.values()], functions)


def refusal(module: nn.Module) -> str:
    """Why a module cannot be run plainly with its own weights; empty if it can be."""
    if any(hasattr(parameter, "to_local") for parameter in module.parameters()):
        return "its weights are sharded over ranks (DTensor, as with fully_shard)"
    if not all(is_readable(parameter) for parameter in module.parameters()):
        return "the memory of its weights is freed when it is called"
    if not all(isinstance(parameter, nn.Parameter) for parameter in module.parameters()):
        return "it is called with other weights than its own (torch.func.functional_call)"
    return ""


def direction(number: int, like: Tensor) -> Tensor:
    """The direction in which the weights of a parameter are moved, in double precision."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def along(gradient: Tensor, number: int) -> float:
    """The component of a gradient along ``direction``."""
    return float((gradient.double() * direction(number, gradient)).sum())


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """Where a program keeps a parameter's gradient: in ``main_grad``, as Megatron does, or else in ``grad``."""
    kept = getattr(parameter, "main_grad", None)
    return kept if isinstance(kept, Tensor) else parameter.grad


def leaf_of(tensor: Tensor) -> Leaf:
    key = key_of(tensor)
    return Leaf(key, tuple(tensor.shape), weak_storage(tensor) if key else None)


def copy_of(tensor: Tensor | None) -> Tensor | None:
    """A copy, which is dense."""
    if tensor is None:
        return None
    return copied(tensor) if tensor.layout is torch.strided else tensor.detach().to_dense()


def _arrivals(call: Call) -> list[Tensor]:
    """What a call took from another stage, among its arguments or in an attribute."""
    return [call.leaves[at] for at in call.arrived if call.known[at] is not None] + [t for _, _, t in call.held]


def _data(call: Call) -> str:
    """A digest of what a call took from no other stage, as the tokens of its microbatch; empty if there is none."""
    own = [leaf for at, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor) and at not in call.arrived]
    digest = hashlib.sha256()
    for leaf in own:
        digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
        digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if any(leaf.numel() > 1 for leaf in own) else ""


def _put(module: nn.Module, name: str, leaf: Tensor) -> None:
    setattr(module, name, [leaf] if isinstance(vars(module)[name], list) else leaf)
